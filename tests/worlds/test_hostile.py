"""Checkpoints and ranks that would have code run: whoever reads them refuses."""

from __future__ import annotations

import io
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist

from megafork.checkpoint import sharded
from megafork.checkpoint.torch_dist import TorchDistReader
from megafork.config import ModelConfig, ParallelConfig
from megafork.errors import UserError
from megafork.evaluation.source import find_model
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from tests.helpers.commands import QUICKSTART
from tests.helpers.conversion import to_hf, to_megatron
from tools.benchmarks.ranks import run_ranks


class Calls:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return to_megatron(QUICKSTART / "model", tmp_path_factory.mktemp("good") / "checkpoint")


@pytest.fixture
def evil(tmp_path, checkpoint):
    """A copy whose index is as it should be, but for one value more."""
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.planner_data = Calls(tmp_path / "made")
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    return copy


def evaluated(checkpoint, scratch):
    with find_model(checkpoint).as_hf(scratch):
        pass


@pytest.mark.parametrize("read", [to_hf, evaluated], ids=["convert", "eval"])
def test_an_index_that_runs_code_is_refused(tmp_path, evil, read):
    with pytest.raises(UserError, match=r"\.metadata cannot be read .*posix\.mkdir"):
        read(evil, tmp_path / "hf")
    assert not (tmp_path / "made").exists()


DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "cut": pickle.dumps({"a": 1})[:-3],
    "another object": pickle.dumps([1, 2]),
    "a number": pickle.dumps(7),
    "a huge list": b"\x80\x04]" + b"h\x00" * 5 + b".",
    "a length of 2**60": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_index_is_named(tmp_path, checkpoint, content):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (copy / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata cannot be read"):
        TorchDistReader(copy)


def resumed(checkpoint):
    mesh = initialize(ParallelConfig(tp=2))
    model = ModelConfig(path=str(QUICKSTART / "model"))
    scorer = Scorer(model, ParallelConfig(tp=2), mesh, micro_batch_tokens=64)
    try:
        sharded.load(checkpoint, scorer.stages, None, mesh)
    except UserError as error:
        return str(error)
    return "loaded"


def with_evil_index(checkpoint, made):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = Calls(made)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def with_evil_common(checkpoint, made):
    torch.save({"a": Calls(made)}, checkpoint / "common.pt")


def with_evil_object(checkpoint, made):
    """In place of an object of megatron's that holds nothing."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if "_extra_state" in i.fqn)
    content = io.BytesIO()
    torch.save([Calls(made)], content)
    (checkpoint / "__9_9.distcp").write_bytes(content.getvalue())
    info = metadata.storage_data[index]
    info.relative_path, info.offset = "__9_9.distcp", 0
    info.length = len(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("damage", [with_evil_index, with_evil_common, with_evil_object])
def test_a_resumed_run_runs_nothing(tmp_path, checkpoint, damage):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    damage(copy, tmp_path / "made")
    outcomes = run_ranks(2, resumed, copy)
    assert not (tmp_path / "made").exists()
    for told in outcomes:
        assert told.startswith(f"the checkpoint {copy} cannot be read (")
        assert told.count("\n") == 0


def test_a_good_one_is_resumed(checkpoint):
    assert run_ranks(2, resumed, checkpoint) == ["loaded"] * 2


def one_rank_is_hostile(made):
    mesh = initialize(ParallelConfig(tp=2))
    evil = Calls(made / str(mesh.rank))
    values = [None, None]
    for collective in (
        lambda: mesh.all_gather_object(evil if mesh.rank else 1),
        lambda: mesh.broadcast_object(evil, src=1),
        lambda: dist.broadcast_object_list([evil], src=1),
        lambda: dist.all_gather_object(values, evil if mesh.rank else 1),
        lambda: dist.scatter_object_list([None], [1, evil] if mesh.rank else None, src=1),
        lambda: dist.gather_object(evil, values if mesh.rank == 0 else None, dst=0),
    ):
        try:
            collective()
        except pickle.UnpicklingError as error:
            assert "mkdir, which nothing of ours writes" in str(error)
        mesh.any_rank(False)
    return sorted(path.name for path in made.iterdir())


def test_a_rank_that_sends_code_is_refused(tmp_path):
    assert run_ranks(2, one_rank_is_hostile, tmp_path) == [[], []]
