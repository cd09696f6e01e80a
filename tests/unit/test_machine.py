"""What a run needs of a machine without a GPU, and what is said where it has less."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from typer.testing import CliRunner

from megafork.cli import app
from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.plan import machine
from megafork.plan.nodes import GIB
from megafork.system import heap
from tests.helpers.commands import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"
CODER = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
"""Qwen2.5-Coder-0.5B's config.json"""


ELSEWHERE = ("model.recompute=full", 'rollout.url="http://127.0.0.1:8000"')


def settings(folder, *more):
    """The quickstart's, for a model of that shape, in 16 responses of 96 tokens at once."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CODER))
    overrides = [
        f"model.path={folder}",
        "parallel.tp=1",
        "model.dtype=float32",
        "rollout.max_response_tokens=96",
        "training.micro_batch_tokens=2048",
        *more,
    ]
    return load_config(TrainConfig, QUICKSTART / "config.toml", overrides)


def with_memory(monkeypatch, total, free):
    monkeypatch.setattr(machine, "available", lambda: (int(total * GIB), int(free * GIB)))


@pytest.fixture
def forked(monkeypatch):
    """What is traced, in a fork, which has the imports that a new process would begin with."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(machine.multiprocessing, "get_context", lambda _: fork)


def test_a_small_run_is_not_traced(monkeypatch):
    monkeypatch.setattr(machine, "machine_memory", None)
    with_memory(monkeypatch, 24, 20)
    machine.check_machine(load_config(TrainConfig, QUICKSTART / "config.toml", []))


@pytest.mark.parametrize(
    ("total", "changes", "way"),
    [
        (21, (), "lower training.micro_batch_tokens=2048 or set model.recompute=full"),
        (14, (*ELSEWHERE, "checkpoint.asynchronous=true"), "set checkpoint.asynchronous=false"),
        (20, ("model.recompute=full",), "; use a rollout server on another machine (rollout.url)"),
        (26, ("model.recompute=full", "rollout.servers=2"), "; lower rollout.servers=2 or use a"),
        (8, (), "take a smaller model or a larger machine"),
    ],
)
def test_what_a_machine_cannot_hold_is_refused(forked, tmp_path, monkeypatch, total, changes, way):
    with_memory(monkeypatch, total, total)
    with pytest.raises(UserError, match=f"GiB of memory and this machine has {total}") as refused:
        machine.check_machine(settings(tmp_path / "model", *changes))
    assert way in str(refused.value)


def test_what_is_not_free_now_is_told(tmp_path, monkeypatch, capsys):
    with_memory(monkeypatch, 64, 9.5)
    machine.check_machine(settings(tmp_path / "model"))
    assert "9.5 of this machine's 64.0 are free" in capsys.readouterr().err


def test_parts_follow_the_settings(tmp_path):
    """Weights, gradients, Adam's moments: 16 bytes a parameter in float32."""
    config = settings(tmp_path / "model", "checkpoint.asynchronous=false", "rollout.servers=2")
    shape = machine.ModelShape.from_folder(config.model.path)
    needs = machine.machine_memory(config, shape)
    assert needs.model / 494_032_768 == pytest.approx(16, rel=0.01)
    assert needs.save == 0
    one = settings(tmp_path / "model")
    assert needs.servers == 2 * machine.machine_memory(one, shape).servers
    assert machine.machine_memory(one, shape).save / 494_032_768 == pytest.approx(12, rel=0.01)
    url = settings(tmp_path / "model", 'rollout.url="http://127.0.0.1:8000"')
    assert machine.machine_memory(url, shape).servers == 0


@pytest.mark.parametrize(("limit", "total"), [("4294967296\n", 4 * GIB), ("max\n", None)])
def test_a_container_s_limit_counts(tmp_path, monkeypatch, limit, total):
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    without = heap.available()
    monkeypatch.setattr(heap, "_CGROUP", tmp_path)
    found, free = heap.available()
    assert found == (total or without[0])
    assert total is None or free <= 3 * GIB


def test_a_dry_run_looks_at_this_machine(tmp_path, monkeypatch):
    """Where it has no GPU, and no --node is given."""
    arguments = ["train", str(QUICKSTART / "config.toml"), f"run.dir={tmp_path}/run", "--dry-run"]
    monkeypatch.setattr("megafork.cli._has_gpu", lambda: False)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "# memory\nweights, gradients, optimizer " in done.output
    assert "this machine" in done.output and "# time" not in done.output
    monkeypatch.setattr("megafork.plan.dry_run.available", lambda: (GIB, GIB))
    done = CliRunner().invoke(app, arguments)
    assert str(done.exception).startswith("the plan does not fit: the run needs ")
