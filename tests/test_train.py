"""`megafork train` and `megafork score` on the real parts: ranks, megatron-core, vLLM."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megafork.config import TrainConfig, load_config
from megafork.parallel.topology import free_port
from megafork.rollout.journal import Journal
from tests import reference
from tests.commands import (
    QUICKSTART,
    ROOT,
    environment,
    left_over,
    megafork,
    processes_of,
    small_run,
)

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
    "forking/kept_fraction",
    "forking/mean_entropy_inside",
    "forking/mean_entropy_outside",
    "forking/boundary_fraction",
    "loss/policy",
    "ratio/clip_low_fraction",
    "ratio/clip_high_fraction",
    "mismatch/kl",
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
    "policy_version",
    "sampling/groups_dropped",
}

RUNS = {
    "tp1-truncating-generation-config": ["parallel.tp=1", "forking.scope=batch"],
    "pp2": ["parallel.tp=1", "parallel.pp=2", "forking.select=random"],
    "tp2-pp2": ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"],
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A finished run: (folder, its model's folder, the completed process)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    shutil.copytree(QUICKSTART / "model", model)
    if "truncating" in request.param:
        path = model / "generation_config.json"
        raw = json.loads(path.read_text()) | {"do_sample": True, "top_k": 1, "temperature": 0.1}
        path.write_text(json.dumps(raw))
    arguments = small_run(folder / "run", f"model.path={model}", *RUNS[request.param])
    done = megafork(*arguments, mark=folder)
    assert done.returncode == 0, done.stderr
    assert left_over(folder) == []
    return folder / "run", model, done


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics(run):
    run_dir, _, _ = run
    rows = lines(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) >= STEP_METRICS
        # The entropies spread, so about rho of the tokens is kept, and the same ones are inside.
        assert 0.2 <= row["forking/kept_fraction"] <= 0.22
        assert row["entropy/p50"] <= row["entropy/p80"] <= row["entropy/p95"]
        assert row["ratio/first_update_max_offset"] == 0.0
        assert row["mismatch/mean_difference"] <= 1e-5
        assert row["grad_norm"] > 0
    assert [row["policy_version"] for row in rows] == [2, 3]
    config = load_config(TrainConfig, run_dir / "config.toml", [])
    for row in rows:
        inside, outside = row["forking/mean_entropy_inside"], row["forking/mean_entropy_outside"]
        assert (inside > outside) == (config.forking.select == "top") or (
            config.forking.select == "random"
        )
        if config.forking.scope == "batch":
            assert row["entropy/threshold"] == row["entropy/p80"]


def test_sampling_is_not_truncated_by_the_model_folder(run):
    run_dir, model, done = run
    raw = json.loads((model / "generation_config.json").read_text())
    assert ("top_k=1" in done.stderr) == ("top_k" in raw)
    groups = Journal.read(run_dir / "rollouts" / "step_000001.jsonl")
    distinct = [len({tuple(s.token_ids) for s in group.samples}) for group in groups]
    assert sum(distinct) > 1.5 * len(distinct)  # top_k=1 would give one response per group


def test_the_journal_holds_every_generated_group(run):
    run_dir, _, _ = run
    for row in lines(run_dir / "metrics.jsonl"):
        groups = Journal.read(run_dir / "rollouts" / f"step_{row['step']:06d}.jsonl")
        accuracy = [s.accuracy for group in groups for s in group.samples]
        assert sum(accuracy) / len(accuracy) == pytest.approx(row["reward/accuracy"])
        dropped = [group for group in groups if not group.has_signal]
        assert len(dropped) == row["sampling/groups_dropped"]
        assert all(len(s.logprobs) == len(s.token_ids) for g in groups for s in g.samples)


def test_the_final_checkpoint_is_the_trained_model(run):
    run_dir, model, _ = run
    final = run_dir / "checkpoints" / "final"
    before = Qwen3ForCausalLM.from_pretrained(model).state_dict()
    after = Qwen3ForCausalLM.from_pretrained(final).state_dict()
    assert set(before) == set(after)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * len(before)
    assert AutoTokenizer.from_pretrained(final).decode([1, 2, 3])
    assert [row["step"] for row in lines(run_dir / "eval.jsonl")] == [0, 2]
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").iterdir())


def test_a_run_is_not_overwritten(run):
    run_dir, model, _ = run
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = megafork(*small_run(run_dir, f"model.path={model}", "parallel.tp=1"))
    assert done.returncode == 2
    assert f"run.dir={run_dir} holds another run" in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "layout", [["parallel.tp=1"], ["parallel.tp=2", "parallel.pp=2"], ["parallel.dp=2"]], ids=str
)
def test_score_is_the_same_at_every_layout(tmp_path, layout):
    folder = reference.save_model(tmp_path / "model", tied=False)
    groups = reference.make_groups(7, 1, seed=2)
    rows = [
        {"prompt_ids": g.prompt_ids, "response_ids": g.samples[0].token_ids, "id": g.prompt_index}
        for g in groups
    ]
    rows.insert(3, {"prompt_ids": [4, 5], "response_ids": [], "id": "no response"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = megafork(
        *("score", "--model", folder, "--input", tmp_path / "in.jsonl"),
        *("--output", tmp_path / "out.jsonl", "model.dtype=float32"),
        *("batch_sequences=3", "micro_batch_tokens=32", *layout),
    )
    assert done.returncode == 0, done.stderr
    scored = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in scored] == [row["id"] for row in rows]
    model = reference.load_model(folder, torch.float64)
    for row in scored:
        if not row["response_ids"]:
            assert row["logprobs"] == row["entropies"] == []
            continue
        with torch.no_grad():
            z = reference.response_logits(model, row["prompt_ids"], row["response_ids"])
        logprobs, entropies = reference.logprobs_and_entropies(z, row["response_ids"])
        assert row["logprobs"] == pytest.approx(logprobs.tolist(), abs=2e-5)
        assert row["entropies"] == pytest.approx(entropies.tolist(), abs=2e-5)


def test_score_takes_text(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "6 2 4>48:", "response": "6*4=24;2*24=48."}\n')
    done = megafork(
        *("score", "--model", QUICKSTART / "model", "--input", tmp_path / "in.jsonl"),
        *("--output", tmp_path / "out.jsonl", "model.dtype=float32"),
    )
    assert done.returncode == 0, done.stderr
    [row] = lines(tmp_path / "out.jsonl")
    assert len(row["entropies"]) == len("6*4=24;2*24=48.")
    assert row["response"] == "6*4=24;2*24=48."


def test_train_against_a_server_that_runs_already(tmp_path):
    port = free_port()
    config, url = str(QUICKSTART / "config.toml"), f"http://127.0.0.1:{port}"
    environ = environment(tmp_path) | {"MEGAFORK_API_KEY": "shared"}
    command = [sys.executable, "-m", "megafork", "serve", config, "run.dir=unused"]
    options = ["--port", str(port), "--log", str(tmp_path / "vllm.log")]
    server = subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        assert url in server.stdout.readline()
        arguments = ["parallel.tp=1", "training.steps=1", f"rollout.url={url}"]
        for key, status in (("wrong", 2), ("shared", 0)):
            done = subprocess.run(
                [sys.executable, "-m", "megafork", *small_run(tmp_path / key, *arguments)],
                cwd=ROOT,
                env=environ | {"MEGAFORK_API_KEY": key},
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode == status, done.stderr
            refused = f"no rollout server answers at rollout.url={url}" in done.stderr
            assert refused == (status == 2)
        assert len(lines(tmp_path / "shared" / "metrics.jsonl")) == 1
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert left_over(tmp_path) == []
    finally:
        server.kill()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_launcher(tmp_path, signal_number):
    """While ranks and server are at work; the ranks' own parent is the launcher."""
    command = [sys.executable, "-m", "megafork", *small_run(tmp_path / "run", "training.steps=500")]
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 150
        while not (tmp_path / "run" / "eval.jsonl").exists():
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(processes_of(tmp_path)) >= 5  # launcher, two ranks, supervisor, server
        launcher.send_signal(signal_number)
        assert launcher.wait(30) != 0
        assert left_over(tmp_path, seconds=20) == []
    finally:
        launcher.kill()
