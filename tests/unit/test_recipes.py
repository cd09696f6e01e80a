"""The recipes: settings, plan, scripts and what their READMEs say, without a model or a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess

import pytest
from megatron.core.parallel_state import RankGenerator
from typer.testing import CliRunner

from megafork.cli import app
from megafork.config import ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.shape import ModelShape
from megafork.plan.dry_run import place
from megafork.plan.nodes import NODES, SHAPES, Nodes
from megafork.plan.step_time import CLAIM, step_time
from tests.helpers.commands import QUICKSTART, ROOT, left_over, megafork

EXAMPLES = ROOT / "examples"
# Nodes that train and that serve, as run.sbatch asks for them.
RECIPES = {"qwen3-8b-base": (1, 0), "qwen3-14b-base": (2, 2), "qwen3-32b-base": (4, 4)}
PROMPT_TOKENS = 200
recipes = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a model: config.json and a tokenizer, no weights. And a few rows."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as a dry run sets it for its own process

    def make(name):
        model = tmp_path / "model"
        model.mkdir()
        shutil.copy(EXAMPLES / name / "model_config.json", model / "config.json")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(QUICKSTART / "model" / file, model)
        rows = [{"prompt": f"6 2 {n}>48:", "answer": "48"} for n in range(1, 6)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return make


def overrides(folder):
    """The toy tokenizer has no letters for the recipes' template."""
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'rows.jsonl'}",
        f"data.eval={folder / 'rows.jsonl'}",
        f"run.dir={folder / 'run'}",
        "data.template={problem}",
    ]


def dry_run(name, folder, *more):
    config = str(EXAMPLES / name / "config.toml")
    serve = f"--serve-nodes={RECIPES[name][1]}"
    arguments = ["train", config, "--dry-run", "--node", "h100", serve, *overrides(folder), *more]
    return CliRunner().invoke(app, arguments)


def planned(name, mean, *more):
    config = load_config(TrainConfig, EXAMPLES / name / "config.toml", more)
    shape = shape_of(name)
    nodes = Nodes(NODES["h100"], *RECIPES[name])
    time = step_time(
        config, shape, nodes, mean_response_tokens=mean, mean_prompt_tokens=PROMPT_TOKENS
    )
    return config, shape, nodes, time


def shape_of(name):
    return SHAPES[name.removesuffix("-base")]


@recipes
def test_the_shape_of_a_recipe_is_the_one_that_plan_knows(name, folder):
    assert ModelShape.from_folder(folder(name) / "model") == shape_of(name)


@recipes
def test_a_recipe_has_the_papers_settings(name):
    config, shape, _, _ = planned(name, 4000)
    shape.check(config.model, config.parallel)
    rollout, training, algorithm = config.rollout, config.training, config.algorithm
    assert (rollout.prompts_per_step, rollout.group_size) == (512, 16)
    assert (rollout.max_response_tokens, rollout.temperature) == (20480, 1.0)
    assert rollout.dynamic_sampling and rollout.max_policy_lag == 0
    assert (training.prompts_per_minibatch, training.lr, training.warmup_steps) == (32, 1e-6, 10)
    assert (training.weight_decay, training.grad_clip) == (0.1, 1.0)
    assert (algorithm.clip_low, algorithm.clip_high) == (0.2, 0.28)
    assert (algorithm.denominator, algorithm.overlong_filtering) == ("tokens", True)
    assert config.reward.overlong_buffer_tokens == 4096
    assert (config.forking.select, config.forking.rho) == ("top", 0.2)
    assert (config.kl.coefficient, config.entropy_bonus.coefficient) == (0, 0)
    assert config.eval.samples == 32
    assert config.data.template == (
        "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
    )


@recipes
def test_a_recipe_dry_runs_and_fits_its_nodes(name, folder):
    path = folder(name)
    before = sorted(path.rglob("*"))
    done = dry_run(name, path)
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(path.rglob("*")) == before, "written"
    config = planned(name, 4000)[0]
    assert "prompts_per_step = 512" in done.output
    assert "not in" in done.output and "fetch them before the run" in done.output
    last = config.parallel.world_size - 1
    assert re.search(rf"node {RECIPES[name][0] - 1}: ranks \d+-{last}, ", done.output)
    # What the README says of memory is this: the eighth number after the layers is the total.
    text = (EXAMPLES / name / "README.md").read_text()
    stages = re.findall(r"^\d +\d+(?: +[\d.]+){7} +([\d.]+) ", done.output, re.MULTILINE)
    assert len(stages) == config.parallel.pp and all(stage in text for stage in stages)
    total = re.search(r"GiB on a GPU of a server: ([\d.]+)", done.output)[1]
    cache = re.search(r"KV cache\n[\d.]+ +[\d.]+ +([\d.]+)\n", done.output)[1]
    responses = re.search(r": (\d+) responses of 22528 at once", done.output)[1]
    assert f"{total}, of which {cache} KV cache: {responses} responses of 22,528 tokens" in text
    host = re.search(r"a training node's host: ([\d.]+) of 2048", done.output)
    said = re.search(r"host of a trainer +(\d+) GiB", text)
    assert float(said[1]) == pytest.approx(float(host[1]), abs=0.6)
    assert f"seconds of a step: {CLAIM}\ngenerate  score " in done.output
    assert "- not measured: data-sheet rates times efficiencies" in done.output


@recipes
def test_a_readme_says_what_the_plan_says(name):
    text = (EXAMPLES / name / "README.md").read_text()
    for mean in (2000, 4000, 6000):
        config, _, _, time = planned(name, mean)
        parts = [time.seconds[part] for part in ("generate", "score", "update")]
        phases = " + ".join(f"{seconds:.0f}" for seconds in parts)
        speed = f"{time.total:.0f} | {time.tokens_per_second_per_gpu:.0f}"
        assert f"| {mean} | {phases} | {speed} |" in text
        if config.rollout.placement == "disaggregated":
            lagging = planned(name, mean, "rollout.max_policy_lag=1")[3]
            assert f"{lagging.total:.0f}" in text
            assert f"{lagging.tokens_per_second_per_gpu:.0f}" in text


@recipes
def test_the_ablations_of_a_readme_are_settings(name):
    text = (EXAMPLES / name / "README.md").read_text()
    found = re.findall(r"^ *sbatch .*run\.sbatch +(.+=.+)$", text, re.MULTILINE)
    assert len(found) == 3
    selections = set()
    for line in found:
        for rho in ("0.1", "0.5"):
            settings = line.replace("$rho", rho).split()
            forking = planned(name, 4000, *settings)[0].forking
            selections.add((forking.select, forking.rho))
    assert selections == {("top", 0.1), ("top", 0.5), ("all", 0.2), ("bottom", 0.2)}


@recipes
def test_a_batch_script_hands_on_its_nodes_and_arguments(name, tmp_path):
    script = EXAMPLES / name / "run.sbatch"
    config = planned(name, 4000)[0]
    train, serve = RECIPES[name]
    assert f"#SBATCH --nodes={train + serve}\n" in script.read_text()
    assert config.parallel.world_size == 8 * train
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sbatch").write_text(
        'echo "$SERVE_NODES ${SERVERS_PER_NODE:-}"; printf "%s\\n" "$@"\n'
    )
    done = subprocess.run(
        ["bash", script, "forking.rho=0.1", "run.dir=a b"],
        env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    per_node = str(8 // config.rollout.tensor_parallel) if serve else ""
    assert done.stdout.splitlines() == [
        f"{serve} {per_node}",
        f"{tmp_path}/examples/{name}/config.toml",
        "forking.rho=0.1",
        "run.dir=a b",
    ]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@recipes
def test_a_batch_script_is_clean(name):
    script = EXAMPLES / name / "run.sbatch"
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_plan_that_does_not_fit_is_an_error_with_its_remedy(folder):
    done = dry_run("qwen3-8b-base", folder("qwen3-8b-base"), "training.micro_batch_tokens=90112")
    assert isinstance(done.exception, UserError)
    assert "the plan does not fit: training needs" in str(done.exception)
    assert "set model.recompute=full (now none)" in str(done.exception)
    assert "GiB on a GPU of the trainer" in done.output  # told before


def a_run_there(path):
    (path / "run" / "rollouts").mkdir(parents=True)
    (path / "run" / "rollouts" / "step_000001.journal").touch()
    return []


def a_file_there(path):
    (path / "file").touch()
    return [f"run.dir={path}/file/run"]


def other_weights(path):
    shutil.copy(QUICKSTART / "model" / "model.safetensors", path / "model")
    return []


def an_address(text):
    def change(path):
        return ["rollout.placement=disaggregated", f"rollout.url={text}"]

    return change


FAULTS = {
    "another run": (a_run_there, "holds another run"),
    "no folder": (a_file_there, r"cannot be written: .*/file is no folder"),
    "other weights": (other_weights, r"has shape .* but its config.json asks for \[151936, 4096\]"),
    "address": (
        an_address("node7:8000"),
        "rollout.url=node7:8000 is not the address of a server: give http",
    ),
    "ranks": (lambda path: ["parallel.dp=3"], "= 12 ranks do not fill nodes of 8 GPUs"),
    "verifier": (lambda path: ["reward.verifier=no:f"], "'no:f' cannot be imported"),
    "data": (lambda path: ["data.train=nothing.jsonl"], "nothing.jsonl does not exist"),
    "no serving nodes": (
        lambda path: ["rollout.placement=disaggregated"],
        "share the GPUs of the 8 ranks, at the same time: 119.7 GiB of 79.1: give --serve-nodes",
    ),
    "servers beside ranks": (
        lambda path: ["rollout.placement=disaggregated", "parallel.dp=1"],
        r"rollout.servers=8 \* tensor_parallel=1 GPUs do not fit the 4 that a node's 4 ranks leave",
    ),
    "no length": (lambda path: ["--mean-response-tokens=0"], "mean"),
    "node": (lambda path: ["--node=h1000"], "--node h1000 is neither one of a100-80g"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dry_run_finds(fault, folder, monkeypatch):
    monkeypatch.setenv("MEGAFORK_API_KEY", "key")
    change, message = FAULTS[fault]
    path = folder("qwen3-8b-base")
    done = dry_run("qwen3-8b-base", path, *change(path))
    assert isinstance(done.exception, UserError), done.output
    assert re.search(message, str(done.exception)), str(done.exception)


def test_the_command_starts_nothing_and_writes_nothing(tmp_path):
    config = QUICKSTART / "config.toml"
    run = tmp_path / "run"
    done = megafork("train", config, f"run.dir={run}", "--dry-run", mark=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "46 tensors in" in done.stdout and "prompts   4096; " in done.stdout
    first = json.loads((QUICKSTART / "data" / "train.jsonl").read_text().splitlines()[0])["prompt"]
    assert f"# first prompt\n{len(first)} tokens\n| {first}\n" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert left_over(tmp_path) == []


def test_options_of_a_dry_run_start_no_real_one(folder):
    path = folder("qwen3-8b-base")
    config = str(EXAMPLES / "qwen3-8b-base" / "config.toml")
    done = CliRunner().invoke(app, ["train", config, "--node=h200", *overrides(path)])
    assert str(done.exception).endswith("are for --dry-run: add it")


@pytest.mark.parametrize("sizes", [(8, 1, 4, 1), (4, 2, 2, 2), (2, 2, 1, 4)])
def test_ranks_are_where_megatron_puts_them(sizes):
    tp, cp, dp, pp = sizes
    parallel = ParallelConfig(tp=tp, cp=cp, pp=pp)
    megatrons = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    for axis, name in enumerate(("tp", "cp", "dp", "pp")):
        for group in megatrons.get_ranks(name):
            where = [place(rank, parallel, dp) for rank in group]
            assert [w[axis] for w in where] == list(range(sizes[axis]))
            assert len({w[:axis] + w[axis + 1 :] for w in where}) == 1


def test_each_problem_is_taken_once():
    spec = importlib.util.spec_from_file_location("dapo_math", EXAMPLES / "dapo_math.py")
    dapo_math = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dapo_math)
    rows = [{"q": " 1+1? ", "a": 2}, {"q": "2+2?", "a": "4"}, {"q": "1+1?", "a": 2}]
    assert dapo_math.examples(rows, "q", "a") == [
        {"prompt": "1+1?", "answer": "2"},
        {"prompt": "2+2?", "answer": "4"},
    ]
