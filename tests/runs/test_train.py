"""`megafork train` and `megafork score` on the real parts: ranks, megatron-core, vLLM."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megafork.checkpoint.model_card import is_unchanged
from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.metrics.catalogue import METRICS
from megafork.rollout.journal import Journal
from tests.helpers.commands import (
    QUICKSTART,
    left_over,
    lines,
    megafork,
    small_run,
    tiny_engine,
)
from tests.helpers.pages import read_page

STEP_METRICS = {
    "step",
    "reward/mean",
    "reward/accuracy",
    "response/length_mean",
    "response/truncated_fraction",
    "entropy/mean",
    "entropy/threshold",
    "entropy/p50",
    "entropy/p80",
    "entropy/p95",
    "forking/rho",
    "forking/kept_fraction",
    "forking/mean_entropy_inside",
    "forking/mean_entropy_outside",
    "forking/boundary_fraction",
    "loss/policy",
    "update/empty",
    "ratio/clip_low_fraction",
    "ratio/clip_high_fraction",
    "ratio/clip_dual_fraction",
    "mismatch/kl",
    "mismatch/k1",
    "mismatch/mean_difference",
    "mismatch/max_difference",
    "mismatch/large_fraction",
    "mismatch/truncated_tokens",
    "mismatch/masked_tokens",
    "grad_norm",
    "lr",
    "tokens",
    "time/generate",
    "time/reward",
    "time/score",
    "time/update",
    "time/sync",
    "time/total",
    "throughput/tokens_per_second",
    "throughput/generated_tokens_per_second",
    "policy_version",
    "sampling/groups_dropped",
}

RUNS = {
    "tp1-truncating-generation-config": ["parallel.tp=1", "forking.scope=batch"],
    "pp2-vpp2-cispo": [
        "parallel.tp=1",
        "parallel.pp=2",
        "parallel.vpp=2",
        "forking.select=random",
        "forking.rho_end=0.1",
        "forking.rho_steps=2",
        "algorithm.objective=cispo",
        "mismatch.correction=truncate",
    ],
    "tp2-sp-cp2-gspo": [
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
        "parallel.cp=2",
        "forking.entropy_of=current",
        "forking.ties=hash",
        "algorithm.objective=gspo",
        "algorithm.denominator=sequence_tokens",
        "algorithm.clip_low=3e-4",
        "algorithm.clip_high=4e-4",
        "mismatch.correction=mask",
        "mismatch.level=sequence",
        "reward.overlong_buffer_tokens=8",
    ],
}


ON_VLLM = ("tp1-truncating-generation-config",)
"""What a server makes of a folder's generation_config.json is vLLM's; the others are on the tiny
engine."""


def _runs():
    """The first in every run of the tests: it has the most to look at, and one process trains."""
    for name in RUNS:
        slow = [] if name in ON_VLLM else [pytest.mark.slow]
        yield pytest.param(name, marks=[*slow, pytest.mark.xdist_group(f"train-{name}")])


@pytest.fixture(scope="module", params=_runs())
def run(request, tmp_path_factory):
    """A finished run: (folder, its model's folder, the completed process)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    shutil.copytree(QUICKSTART / "model", model)
    if "truncating" in request.param:
        path = model / "generation_config.json"
        raw = json.loads(path.read_text()) | {"do_sample": True, "top_k": 1, "temperature": 0.1}
        path.write_text(json.dumps(raw))
    settings = [f"model.path={model}", *RUNS[request.param]]
    if request.param not in ON_VLLM:
        settings.append(f"rollout.python={tiny_engine(folder)}")
    done = megafork(*small_run(folder / "run", *settings), mark=folder)
    assert done.returncode == 0, done.stderr
    assert left_over(folder) == []
    return folder / "run", model, done


def test_metrics(run):
    run_dir, _, _ = run
    rows = lines(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) >= STEP_METRICS
        assert set(row) <= {metric.name for metric in METRICS}
        # The entropies spread, so about rho of the tokens is kept, and the same ones are inside.
        assert 1 <= row["forking/kept_fraction"] / row["forking/rho"] <= 1.1
        assert row["entropy/p50"] <= row["entropy/p80"] <= row["entropy/p95"]
        assert row["ratio/first_update_max_offset"] == 0.0
        assert row["mismatch/mean_difference"] <= 1e-5
        assert abs(row["mismatch/k1"]) <= row["mismatch/mean_difference"]
        assert row["mismatch/mean_difference"] <= row["mismatch/max_difference"] <= 1e-3
        assert row["mismatch/large_fraction"] == 0
        assert row["mismatch/truncated_tokens"] == row["mismatch/masked_tokens"] == 0
        assert row["grad_norm"] > 0
    assert [row["policy_version"] for row in rows] == [2, 3]
    config = load_config(TrainConfig, run_dir / "config.toml", [])
    assert [row["forking/rho"] for row in rows] == [0.2, config.forking.rho_end or 0.2]
    for row in rows:
        inside, outside = row["forking/mean_entropy_inside"], row["forking/mean_entropy_outside"]
        assert (inside > outside) == (config.forking.select == "top") or (
            config.forking.select == "random"
        )
        if config.forking.scope == "batch":
            assert row["entropy/threshold"] == row["entropy/p80"]


def test_no_library_warns(run):
    _, _, done = run
    told = done.stdout + done.stderr
    assert not [line for line in told.splitlines() if "Warning" in line or "corrupted" in line]


def test_the_forking_tokens_are_told(run):
    run_dir, model, _ = run
    name = AutoTokenizer.from_pretrained(model).decode
    reports = lines(run_dir / "forking_tokens.jsonl")
    for report, row in zip(reports, lines(run_dir / "metrics.jsonl"), strict=True):
        assert report["step"] == row["step"]
        kept = report["selected"] / report["tokens"]
        assert kept == pytest.approx(row["forking/kept_fraction"])
        assert sum(token["selected"] for token in report["most_selected"]) == report["selected"]
        assert report["highest_entropy"]
        for token in [*report["highest_entropy"], *report["most_selected"]]:
            assert token["text"] == name([token["id"]]) != ""


def test_entropies_are_kept_and_reported(run):
    run_dir, model, done = run
    name = AutoTokenizer.from_pretrained(model).decode
    metrics = {row["step"]: row for row in lines(run_dir / "metrics.jsonl")}
    histograms = lines(run_dir / "entropy_histogram.jsonl")
    assert [row["step"] for row in histograms] == [1, 2]
    for row in histograms:
        kept = sum(row["selected"]) / sum(row["tokens"])
        assert kept == pytest.approx(metrics[row["step"]]["forking/kept_fraction"])
    samples = lines(run_dir / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 4 + [2] * 4
    for row in samples:
        [group] = [
            group
            for group in Journal.read(run_dir / "rollouts" / f"step_{row['step']:06d}.journal")
            if group.prompt_index == row["group"]
        ]
        [sample] = [s for s in group.samples if s.uid == row["uid"]]
        assert (row["prompt_ids"], row["token_ids"]) == (
            group.prompt_ids,
            sample.token_ids.tolist(),
        )
        assert (row["reward"], row["accuracy"]) == (sample.reward, sample.accuracy)
        assert row["text"] == [name([token]) for token in sample.token_ids]
        assert row["prompt"] == name(group.prompt_ids)
        if row["loss"] and row["threshold"] is not None:  # null for forking.select=random
            for entropy, selected in zip(row["entropies"], row["selected"], strict=True):
                above = entropy - row["threshold"]  # 0 may be either with forking.ties=hash
                assert above >= 0 if selected else above <= 0
    page = read_page(run_dir / "report.html")
    assert page.by_id("state").text == "finished: 2 of 2 steps"
    assert len(page.all("article")) == len(samples)
    assert f"report      {run_dir}/report.html" in done.stderr


def test_sampling_is_not_truncated_by_the_model_folder(run):
    run_dir, model, done = run
    raw = json.loads((model / "generation_config.json").read_text())
    assert ("top_k=1" in done.stderr) == ("top_k" in raw)
    groups = Journal.read(run_dir / "rollouts" / "step_000001.journal")
    distinct = [len({tuple(s.token_ids) for s in group.samples}) for group in groups]
    assert sum(distinct) > 1.5 * len(distinct)  # top_k=1 would give one response per group


def test_the_journal_holds_every_generated_group(run):
    run_dir, _, _ = run
    for row in lines(run_dir / "metrics.jsonl"):
        groups = Journal.read(run_dir / "rollouts" / f"step_{row['step']:06d}.journal")
        accuracy = [s.accuracy for group in groups for s in group.samples]
        assert sum(accuracy) / len(accuracy) == pytest.approx(row["reward/accuracy"])
        dropped = [group for group in groups if not group.has_signal]
        assert len(dropped) == row["sampling/groups_dropped"]
        assert all(len(s.logprobs) == len(s.token_ids) for g in groups for s in g.samples)
        done = megafork("rollouts", run_dir, "--step", row["step"])
        printed = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["prompt_index"] for row in printed] == [g.prompt_index for g in groups]
        for one, group in zip(printed, groups, strict=True):
            tokens = [sample["token_ids"] for sample in one["samples"]]
            assert tokens == [sample.token_ids.tolist() for sample in group.samples]


def test_the_final_checkpoint_is_the_trained_model(run):
    run_dir, model, _ = run
    final = run_dir / "checkpoints" / "final"
    before = Qwen3ForCausalLM.from_pretrained(model).state_dict()
    after = Qwen3ForCausalLM.from_pretrained(final).state_dict()
    assert set(before) == set(after)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * len(before)
    assert AutoTokenizer.from_pretrained(final).decode([1, 2, 3])
    evaluations = lines(run_dir / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2]
    names = {re.sub(r"@\d+", "@N", name) for row in evaluations for name in row}
    assert names <= {metric.name for metric in METRICS}
    card = (final / "README.md").read_text()
    shown = ["| before training | {:.1%} |", "| after step 2 | {:.1%} |"]
    for line, row in zip(shown, evaluations, strict=True):
        assert line.format(row["eval/accuracy"]) in card
    assert is_unchanged(card)
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").iterdir())


def test_the_servers_log_holds_no_traceback(run):
    """Whoever looks for a cause there would take a harmless one for it."""
    run_dir, _, _ = run
    assert "Traceback" not in (run_dir / "vllm.log").read_text()


def test_a_run_is_not_overwritten(run):
    run_dir, model, _ = run
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = megafork(*small_run(run_dir, f"model.path={model}", "parallel.tp=1"))
    assert done.returncode == 2
    assert f"run.dir={run_dir} holds another run" in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before
