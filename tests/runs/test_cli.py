"""What a user gets wrong: one message that names cause and fix, status 2, nothing left running."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

# Imported before the forks, so that no command pays for them again.
import megafork.evaluation.scoring
import megafork.train
from megafork import __version__
from megafork.cli import app
from megafork.config import TrainConfig
from megafork.config.load import load_config, save_config
from megafork.config.settings import known_settings
from megafork.errors import UserError
from megafork.trainer.run_dir import final_model
from tests.helpers.commands import (
    QUICKSTART,
    ROOT,
    environment,
    executed_megafork,
    left_over,
    megafork,
    small_run,
)


def data_with(tmp_path, line):
    path = tmp_path / "data.jsonl"
    good = json.dumps({"prompt": "6 2 4>48:", "answer": "48"})
    path.write_text(f"{good}\n{line}\n")
    return f"data.train={path}"


CASES = {
    "unknown key": (lambda _: "forking.roh=0.1", "did you mean forking.rho?"),
    "tp": (lambda _: "parallel.tp=3", "parallel.tp=3 must divide model.num_kv_heads=2: use 1 or 2"),
    "pp": (lambda _: "parallel.pp=3", "parallel.pp=3 must divide model.num_layers=4"),
    "model folder": (lambda p: f"model.path={p}/none", "none is not a folder"),
    "no config": (lambda p: f"model.path={p}", "holds no config.json"),
    "data file": (lambda p: f"data.train={p}/none.jsonl", "none.jsonl does not exist"),
    "not json": (lambda p: data_with(p, "{broken"), "data.jsonl, line 2: not JSON"),
    "no column": (lambda p: data_with(p, '{"question": "x"}'), "line 2: no column 'prompt'"),
    "verifier": (lambda _: "reward.verifier=nowhere:f", "'nowhere:f' cannot be imported"),
    "positions": (
        lambda _: "rollout.max_response_tokens=500",
        "exceeds the model's max_position_embeddings=128",
    ),
    "no key": (lambda _: "rollout.url=http://127.0.0.1:9", "MEGAFORK_API_KEY"),
    "python": (lambda _: "rollout.python=/no/python", "/no/python is not an executable"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_costs_a_second_and_is_told_once(tmp_path, case):
    override, message = CASES[case]
    done = megafork(*small_run(tmp_path / "run", override(tmp_path)), mark=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_told_by_the_command_itself(tmp_path):
    """By a Python that has imported nothing before."""
    done = executed_megafork(*small_run(tmp_path / "run", "forking.roh=0.1"), mark=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "did you mean forking.rho?" in line
    assert not (tmp_path / "run").exists()


def test_a_plan_tells_nothing_of_its_libraries(tmp_path):
    """What they say when they are imported."""
    of = ["plan", QUICKSTART / "config.toml", "--nodes", "2", "--mean-response-tokens", "-5"]
    done = executed_megafork(*of, mark=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def told_without_torch(tmp_path, *commands):
    """Run the commands one after the other in one Python, which must not import torch.

    Returns their (exit status, lines on stdout, lines on stderr).
    """
    program = (
        "import contextlib, io, json, sys\n"
        "from megafork.cli import main\n"
        "def run(arguments):\n"
        "    sys.argv[1:] = arguments\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try: main()\n"
        "        except SystemExit as end: status = end.code or 0\n"
        "    return status, out.getvalue().splitlines(), err.getvalue().splitlines()\n"
        "found = [run(arguments) for arguments in json.loads(sys.argv[1])]\n"
        "print(json.dumps([found, 'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([[*map(str, c)] for c in commands])],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    found, has_torch = json.loads(done.stdout)
    assert not has_torch
    return found


def test_another_run_is_refused_before_torch_is_imported(tmp_path):
    """And so before a rank or a server is started, at a layout of two ranks."""
    group = tmp_path / "run" / "rollouts" / "step_000001.journal"
    group.parent.mkdir(parents=True)
    group.touch()
    command = small_run(tmp_path / "run", "parallel.tp=2")
    for status, out, [line] in told_without_torch(tmp_path, command, [*command, "--dry-run"]):
        assert (status, out) == (2, [])
        assert line.startswith(
            f"error: run.dir={tmp_path}/run holds another run (rollouts/step_000001.journal): "
        )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["rollouts"]


def test_a_dry_run_tells_simple_mistakes_before_torch_is_imported(tmp_path):
    (tmp_path / "file").touch()
    mistakes = {
        "forking.roh=0.1": "did you mean forking.rho?",
        "model.path=nowhere": "nowhere is not a folder",
        "data.train=none.jsonl": "none.jsonl does not exist",
        f"run.dir={tmp_path}/file/run": "file is no folder that one may write to",
    }
    commands = [[*small_run(tmp_path / "run"), mistake, "--dry-run"] for mistake in mistakes]
    found = told_without_torch(tmp_path, *commands)
    for (status, out, [line]), message in zip(found, mistakes.values(), strict=True):
        assert (status, out) == (2, [])
        assert line.startswith("error: ") and message in line


def test_a_run_that_is_done_says_so_before_torch_is_imported(tmp_path):
    """And is left as it is."""
    run = tmp_path / "run"
    overrides = small_run(run)[2:]
    final, manifest = run / "checkpoints" / "final", run / "checkpoints/step_000002/manifest.json"
    for folder in (final, manifest.parent):
        folder.mkdir(parents=True)
    save_config(
        load_config(TrainConfig, QUICKSTART / "config.toml", overrides), run / "config.toml"
    )
    manifest.touch()
    (final / "config.json").touch()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = ("train", "--resume", run)
    for status, [line], err in told_without_torch(tmp_path, again, [*again, "--dry-run"]):
        assert (status, err) == (0, [])
        assert line == (
            f"{run} has done all of training.steps=2; its model is in {final}. To train longer: "
            f"megafork train --resume {run} training.steps=4"
        )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    config = load_config(TrainConfig, run / "config.toml", [])
    assert final_model(config) == final
    assert final_model(load_config(TrainConfig, run / "config.toml", ["training.steps=3"])) is None
    os.utime(final / "config.json", (1, 1))  # of the run before it was made longer
    assert final_model(config) is None
    (final / "config.json").unlink()
    assert final_model(config) is None


@pytest.mark.parametrize(
    ("layout", "command"),
    [("parallel.tp=1", megafork), ("parallel.tp=2", executed_megafork)],
    ids=["parallel.tp=1", "parallel.tp=2"],
)
def test_a_server_that_does_not_come_up_ends_the_run(tmp_path, layout, command):
    """A Python without vLLM: the trainer's ranks are up by then."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'vllm'\" >&2\nexit 1\n")
    fake.chmod(0o755)
    done = command(*small_run(tmp_path / "run", layout, f"rollout.python={fake}"), mark=tmp_path)
    assert done.returncode == 2
    assert "No module named 'vllm'" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert left_over(tmp_path) == []


def test_a_server_that_is_too_slow_ends_the_run(tmp_path):
    override = "rollout.startup_timeout_s=1"
    done = megafork(*small_run(tmp_path / "run", "parallel.tp=1", override), mark=tmp_path)
    assert done.returncode == 2
    assert "startup_timeout_s=1" in done.stderr
    assert left_over(tmp_path) == []


def test_a_missing_tokenizer_is_named(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (model / name).symlink_to(QUICKSTART / "model" / name)
    arguments = ["parallel.tp=1", f"model.path={model}"]
    done = megafork(*small_run(tmp_path / "run", *arguments), mark=tmp_path)
    assert done.returncode == 2
    assert "holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json)" in done.stderr
    assert left_over(tmp_path) == []


def test_a_world_of_the_wrong_size_is_named(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*torchrun, "-m", "megafork", *small_run(tmp_path / "run", "parallel.tp=2")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "torchrun started 3 ranks, no multiple of parallel.tp=2 * pp=1 * cp=1 = 2" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 1: not JSON"),
        (
            '{"prompt_ids": [1]}',
            "line 1: needs prompt_ids and response_ids, or prompt and response",
        ),
        ('{"prompt_ids": [], "response_ids": [1]}', "line 1: the prompt has no token"),
        ('{"prompt_ids": [1], "response_ids": ["x"]}', "response_ids must be a list of integers"),
        (
            '{"prompt_ids": [1], "response_ids": [99]}',
            "line 1: response_ids holds 99, outside",
        ),
    ],
)
def test_score_names_the_line_it_cannot_score(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line + "\n")
    done = megafork(
        *("score", "--model", QUICKSTART / "model", "--input", tmp_path / "in.jsonl"),
        *("--output", tmp_path / "out.jsonl", "model.dtype=float32"),
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_doctor_reports_what_is_here():
    done = megafork("doctor")
    assert done.returncode == 0, done.stdout
    for name in ("torch", "megatron-core", "transformers", "vLLM"):
        assert re.search(rf"^ok +{name} \d", done.stdout, re.MULTILINE), done.stdout
    if not torch.cuda.is_available():
        assert re.search(r"^no GPU +TransformerEngine", done.stdout, re.MULTILINE)
        assert re.search(r"^communication +gloo$", done.stdout, re.MULTILINE)


def test_doctor_names_what_is_broken_and_the_command_that_mends_it(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ImportError: torchvision::nms does not exist' >&2\nexit 1\n")
    fake.chmod(0o755)
    done = megafork("doctor", "--python", fake)
    assert done.returncode == 1
    assert "torchvision::nms does not exist" in done.stdout
    assert "mend:  " in done.stdout
    assert "cannot run here without vLLM" in done.stdout


def test_too_few_open_files_are_named(tmp_path):
    """Before anything is imported that would need them."""
    limit = (resource.RLIMIT_NOFILE, (64, 64))
    done = megafork(
        *small_run(tmp_path / "run"), mark=tmp_path, prepare=lambda: resource.setrlimit(*limit)
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: this process may have 64 files open (ulimit -n), and needs ")
    assert not (tmp_path / "run").exists()


def test_as_many_files_are_allowed_as_may_be():
    def prepare():
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

    assert megafork("keys", prepare=prepare).returncode == 0


def test_the_version_is_that_of_the_package():
    assert CliRunner().invoke(app, ["--version"]).output == f"megafork {__version__}\n"


def commands(chosen, *path):
    """Yield the words of every command, groups included."""
    yield path
    for name, command in getattr(chosen, "commands", {}).items():
        yield from commands(command, *path, name)


@pytest.mark.parametrize("path", [*commands(typer.main.get_command(app))], ids=" ".join)
def test_every_command_has_its_help_behind_h(path):
    short, long = (CliRunner().invoke(app, [*path, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0 and "Usage: " in short.output
    assert short.output == long.output


@pytest.mark.parametrize(
    ("line", "completions"),
    [("megafork tr", ["train"]), ("megafork convert v", ["verify"]), ("megafork x", [])],
)
def test_a_shell_completes_commands(line, completions):
    variables = {
        "_MEGAFORK_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    done = CliRunner().invoke(app, [], prog_name="megafork", env=variables)
    assert done.output.split() == completions


def keys(*words):
    """The settings that `megafork keys` lists: {key: (default, type, meaning)}."""
    done = CliRunner().invoke(app, ["keys", *words], catch_exceptions=False)
    assert done.exit_code == 0
    listed = re.findall(r"^(\S+) +(\S+) +(.+)\n((?: +.+\n)+)", done.output, re.MULTILINE)
    return {key: (default, kind, " ".join(text.split())) for key, default, kind, text in listed}


def test_keys_lists_every_setting():
    assert keys() == keys("train")
    assert keys().keys() == {setting.key for setting in known_settings(TrainConfig)}
    rho = ("0.2", "float > 0, <= 1", "fraction of the tokens, by entropy")
    assert keys()["forking.rho"] == rho
    assert keys("eval").keys() > {"metrics.extract", "data.id_key"}


def test_keys_are_found_by_words():
    of_selection = keys("forking")
    assert of_selection.keys() == {key for key in keys() if key.startswith("forking.")}
    assert keys("train", "rollout.temp").keys() == {"rollout.temperature"}
    assert keys("eval", "rollout", "url").keys() == {"rollout.url"}
    assert keys("Clip-higher").keys() == {"algorithm.clip_high"}  # by its meaning


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["forking.roh"], "'forking.roh': the nearest are forking.rho"),
        (["eval", "temprature"], "`megafork eval` .* 'temprature': .* rollout.temperature"),
        (["qqq"], "'qqq': `megafork keys train` lists them all"),
    ],
)
def test_keys_that_are_not_found_name_the_nearest(words, message):
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, ["keys", *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a config file, or --resume with a run's folder"),
        (("--resume", "/nowhere"), "--resume /nowhere: there is no run in this folder"),
    ],
)
def test_train_wants_a_config_or_a_run(arguments, message):
    done = megafork("train", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
