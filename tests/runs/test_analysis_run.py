"""`megafork analyze run` on a small run's folder: a model before, a checkpoint, a model after."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megafork.analysis.from_run import score_settings
from megafork.analysis.glyphs import Font
from megafork.analysis.run import RunAnalysis, analyze_run, write_rollouts
from megafork.checkpoint.convert import hf_to_megatron
from megafork.config import ScoreConfig, TrainConfig
from megafork.config.load import load_config, save_config
from megafork.data.sample import Group, Sample
from megafork.errors import UserError
from megafork.rollout.journal import Journal
from megafork.system.signals import ended_by_signals
from tests.helpers.commands import QUICKSTART, lines, megafork

PROMPT = [10, 21, 6, 21, 8, 19, 8, 12]


def make_groups(count=6):
    """Random responses, two to a prompt; the last group was aborted."""
    generator = torch.Generator().manual_seed(0)
    return [
        Group(
            index,
            PROMPT,
            1,
            [
                Sample(
                    uid=2 * index + i,
                    token_ids=torch.randint(3, 21, (12 + i,), generator=generator).tolist(),
                    logprobs=[-1.0] * (12 + i),
                    truncated=i == 1,
                    accuracy=float(i),
                )
                for i in range(2)
            ],
            is_whole=index < count - 1,
        )
        for index in range(count)
    ]


def make_run(folder):
    """What a run of two steps leaves, with random changes for training."""
    config = load_config(
        TrainConfig,
        str(QUICKSTART / "config.toml"),
        [
            f"run.dir={folder}",
            f"model.path={QUICKSTART / 'model'}",
            "parallel.tp=1",
            "training.steps=2",
        ],
    )
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    save_config(config, folder / "config.toml")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "entropy/p80": 0.5 / s}) + "\n" for s in (1, 2))
    )
    shutil.copytree(QUICKSTART / "model", checkpoints / "final")
    [weights] = (checkpoints / "final").glob("*.safetensors")
    torch.manual_seed(0)
    changed = {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape).to(tensor.dtype)
        for name, tensor in safetensors.torch.load_file(weights).items()
    }
    safetensors.torch.save_file(changed, weights, metadata={"format": "pt"})
    with Journal(folder / "rollouts" / "step_000002.journal") as journal:
        for group in make_groups():
            journal.append(group)
    return folder


def asked(run, output, **changes):
    return RunAnalysis(
        **{
            "run": run,
            "output": output,
            "responses": "rollouts",
            "samples": 1,
            "temperatures": False,
            "last_steps": 1,
            "initial": None,
            "all_checkpoints": True,
            "rho": None,
            "scope": "batch",
            "min_count": 2,
            "min_responses": 1,
            "num_words": 10,
            "font": Font(),
            "overrides": [],
        }
        | changes
    )


@pytest.mark.slow
def test_one_command_for_a_run(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    kept = run / "checkpoints" / "step_000001"
    hf_to_megatron(QUICKSTART / "model", kept, max_file_bytes=10**9)
    done = megafork(
        "analyze",
        "run",
        run,
        "--output",
        out,
        "--min-count",
        2,
        "--min-responses",
        1,
        "batch_sequences=3",
    )
    assert done.returncode == 0, done.stderr
    responses = lines(out / "responses.jsonl")
    assert [row["id"] for row in responses] == list(range(10))
    for name in ("initial", "step_000001", "final"):
        scored = lines(out / f"scored_{name}.jsonl")
        assert [row["response_ids"] for row in scored] == [r["response_ids"] for r in responses]
        for row, response in zip(scored, responses, strict=True):
            assert row.items() >= response.items()
            assert len(row["logprobs"]) == len(row["entropies"]) == len(row["response_ids"])
    summary = json.loads((out / "analysis.json").read_text())
    assert summary["num_tokens"] == sum(len(row["response_ids"]) for row in responses) == 125
    unchanged, final = json.loads((out / "overlap.json").read_text())["rows"]
    assert (unchanged["model"], unchanged["step"], unchanged["overlap"]) == ("step_000001", 1, 1.0)
    assert (final["model"], final["step"]) == ("step_000002", 2) and 0 < final["overlap"] < 1
    tables = {"training", "change", "overlap"} | {
        f"{kind}_{name}"
        for kind in ("entropy_percentiles", "entropy_histogram", "tokens")
        for name in ("initial", "final")
    }
    for stem in tables:
        kind, *rest = stem.split("_")
        name = f"{kind}_{rest[1]}_{rest[0]}" if kind == "entropy" else stem
        assert (out / f"{name}.csv").is_file() and (out / f"{name}.json").is_file(), name
    assert len(list(out.glob("*.png"))) == 9
    assert not list(out.glob(".*")) and not list(out.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_held_out_responses_and_two_temperatures(tmp_path):
    """The run's own prompts, server and verifier are handed on."""
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    heldout = tmp_path / "heldout.jsonl"
    rows = lines(QUICKSTART / "data" / "heldout.jsonl")[:6]
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(TrainConfig, run / "config.toml", [f"data.eval={heldout}"])
    save_config(config, run / "config.toml")
    options = (
        "--responses",
        "generate",
        "--temperatures",
        "--samples",
        2,
        "--min-count",
        1,
        "--min-responses",
        1,
    )
    done = megafork("analyze", "run", run, "--output", out, *options)
    assert done.returncode == 0, done.stderr
    responses = lines(out / "scored_final.jsonl")
    assert [row["prompt"] for row in responses] == [r["prompt"] for r in rows for _ in range(2)]
    for row in responses:  # sampled by the model that scores them
        assert row["logprobs"] == pytest.approx(row["rollout_logprobs"], abs=1e-4)
    sweep = json.loads((out / "temperatures" / "temperatures.json").read_text())
    [p80] = [
        row["entropy_nats"]
        for row in json.loads((out / "entropy_final_percentiles.json").read_text())["rows"]
        if row["percentile"] == 80
    ]
    assert sweep["threshold"] == pytest.approx(p80, rel=1e-5)
    assert (sweep["problems"], sweep["samples"]) == (6, 2)
    assert {(row["above"], row["below"]) for row in sweep["rows"]} >= {(1, 1), (0.6, 1), (1, 1.4)}


def test_two_temperatures_are_compared_with_one(tmp_path):
    run = make_run(tmp_path / "run")
    config = load_config(TrainConfig, run / "config.toml", ["rollout.temperature=0.8"])
    save_config(config, run / "config.toml")
    with pytest.raises(UserError, match=r"temperature=0\.8 and entropies at 0\.8"):
        analyze_run(asked(run, tmp_path / "out", temperatures=True))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.toml", "there is no run in this folder"),
        ("metrics.jsonl", "no metrics.jsonl with a step"),
        ("checkpoints/final", "does not exist: end the run first"),
        ("rollouts", "holds no responses"),
    ],
)
def test_a_run_that_is_not_whole(tmp_path, missing, message):
    run = make_run(tmp_path / "run")
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message):
        analyze_run(asked(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def change_settings(run, *settings):
    save_config(load_config(TrainConfig, run / "config.toml", settings), run / "config.toml")


def test_a_run_that_was_made_longer(tmp_path):
    """The final model is then that of the steps before, until all are done."""
    run = make_run(tmp_path / "run")
    change_settings(run, "training.steps=3")
    with pytest.raises(UserError, match=r"2 of training\.steps=3, so .*final is not its last"):
        analyze_run(asked(run, tmp_path / "out"))


def test_a_run_whose_model_has_gone(tmp_path):
    run = make_run(tmp_path / "run")
    change_settings(run, "model.path=nowhere")
    with pytest.raises(UserError, match=r"model.path=nowhere .* name the model with --initial"):
        analyze_run(asked(run, tmp_path / "out"))


def test_scoring_holds_as_many_tokens_as_training_did():
    config = load_config(
        TrainConfig,
        QUICKSTART / "config.toml",
        ["training.micro_batch_tokens=48000", "parallel.pp=2", "forking.entropy_temperature=0.5"],
    )
    score = load_config(ScoreConfig, None, ["model.path=x", *score_settings(config)])
    assert (score.micro_batch_tokens, score.temperature) == (48000, 0.5)
    assert (score.parallel.tp, score.parallel.pp) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": "nowhere.jsonl"}, "--responses=nowhere.jsonl is no file"),
        ({"overrides": ["parallel.tp=3"]}, "parallel.tp=3"),
        ({"overrides": ["paralel.tp=2"]}, "did you mean parallel"),
        ({"initial": Path("nowhere")}, "--initial nowhere is no folder"),
    ],
)
def test_a_wrong_argument(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        analyze_run(asked(make_run(tmp_path / "run"), tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_rollouts_as_responses(tmp_path):
    journal = Journal(tmp_path / "step_000007.journal")
    first, *_ = make_groups(3)
    unjudged = [replace(sample, accuracy=0.0, failure="error") for sample in first.samples]
    journal.append(replace(first, samples=unjudged))  # judged again below, as a resumed run does
    for group in make_groups(3):
        journal.append(group)
    journal.close()
    write_rollouts(tmp_path, [7], tmp_path / "out.jsonl")
    rows = lines(tmp_path / "out.jsonl")
    samples = [s for g in make_groups(3)[:2] for s in g.samples]
    assert [row["response_ids"] for row in rows] == [s.token_ids.tolist() for s in samples]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    assert [row["accuracy"] for row in rows] == [0.0, 1.0] * 2
    assert {row["step"] for row in rows} == {7}
    assert [row["finish_reason"] for row in rows] == ["stop", "length"] * 2


def test_a_signal_leaves_no_converted_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit, match="75"),
        ended_by_signals(),
        tempfile.TemporaryDirectory(dir=tmp_path) as folder,
    ):
        (Path(folder) / "weights").write_bytes(b"much")
        os.kill(os.getpid(), signal.SIGTERM)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_rollouts_of_aborted_groups_alone(tmp_path):
    with Journal(tmp_path / "step_000001.journal") as journal:
        journal.append(make_groups(1)[0])
    with pytest.raises(UserError, match="no whole group"):
        write_rollouts(tmp_path, [1], tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))
