"""What decides the ranks' collectives comes from each rank's own files and environment: where one
has it otherwise, all end with the difference in place of a hang."""

from __future__ import annotations

import json
import os

import pytest

from megafork.config import ModelConfig, ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from megafork.train import train
from tests.helpers import reference
from tests.helpers.commands import REQUIRED
from tools.benchmarks.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), tied=True, layers=1)


def build(folder, layout, change):
    """The message, on a rank of a world whose rank 1 has `change` in place."""
    parallel = ParallelConfig(**layout)
    mesh = initialize(parallel)
    settings = {"micro_batch_tokens": 64}
    if mesh.rank == 1:
        folder, settings = change(folder, settings)
    with pytest.raises(UserError) as caught:
        Scorer(ModelConfig(path=str(folder)), parallel, mesh, **settings)
    return str(caught.value)


def another_config(folder, settings):
    """Every shape fits."""
    other = folder.with_name("other")
    other.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (other / "config.json").write_text(json.dumps(config))
    return other, settings


def another_budget(folder, settings):
    return folder, {"micro_batch_tokens": 32}


def another_head(folder, settings):
    """As on a node without Triton, or with MEGAFORK_TRITON=0."""
    from megafork.model import packed

    assert packed.kernels.usable
    packed.kernels.usable = lambda tensor: True
    return folder, settings


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 1, "dp": 2}], ids=str)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_config, "rms_norm_eps is 1e-05 on rank 1 and 1e-06 on rank 0"),
        (another_budget, "micro_batch_tokens is 32 on rank 1 and 64 on rank 0"),
        (another_head, "the Triton head is True on rank 1 and False on rank 0"),
    ],
)
def test_a_rank_that_differs_is_told_on_all(folder, layout, change, message):
    for told in run_ranks(2, build, folder, layout, change, timeout=60):
        assert message in told and "the same on all" in told


def start_a_run():
    """With a file that is another one on the second node."""
    rho = 0.3 if os.environ["RANK"] == "1" else 0.2
    config = load_config(TrainConfig, None, [*REQUIRED, f"forking.rho={rho}"])
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


def test_a_run_with_other_settings_on_one_rank_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for told in run_ranks(2, start_a_run):
        assert told.startswith("settings differ between ranks: forking.rho is 0.3 on rank 1 and")
    assert not list(tmp_path.iterdir())


def equal_or_not():
    mesh = initialize(ParallelConfig())
    mesh.require_equal("what is here", {"a": 1, "b": [1.5, "x"]})
    messages = []
    for values in ({"a": mesh.rank // 2}, {"a": 1} | ({"b": 2} if mesh.rank == 2 else {})):
        with pytest.raises(UserError) as caught:
            mesh.require_equal("what is here", values)
        messages.append(str(caught.value))
    assert os.environ["WORLD_SIZE"] == "3"
    return messages


def test_equal_values_pass_and_a_missing_one_does_not():
    first, *others = run_ranks(3, equal_or_not)
    assert all(other == first for other in others)
    assert "a is 1 on rank 2 and 0 on rank 0" in first[0]
    assert "b is 2 on rank 2 and not there on rank 0" in first[1]
