"""A run's folder of checkpoints: which stay, which are damaged, what a failed save leaves."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import select
import shutil
import socket

import numpy
import pytest
import torch

from megafork.checkpoint import writer as writer_module
from megafork.checkpoint.hf import HF
from megafork.checkpoint.store import MANIFEST, STATE
from megafork.errors import UserError
from tests.helpers import reference
from tests.helpers.trained import load, make_trained, own_tensors, save, store_of
from tools.benchmarks.measuring import memory, peak_from_here
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow


def save_several(folder, target, steps, config):
    policy = make_trained(folder, {"dp": 2})
    store = store_of(policy, target, model=folder, **config)
    for step in steps:
        with torch.no_grad():
            policy.stages[0].gpt.decoder.final_layernorm.weight.fill_(step)
        save(policy, store, step)
        store.poll()
    store.finish()
    return sorted(path.name for path in target.iterdir())


def test_names(tmp_path):
    """A million steps sort after all before them; other names are left alone and not looked at."""
    folder = reference.save_model(tmp_path / "model", tied=False)
    target = tmp_path / "out"
    for name in ("step_000001.partial", "step_backup", "step_000007x", "final"):
        (target / name).mkdir(parents=True)
    config = {"keep_last": 2}
    [left, _] = run_ranks(2, save_several, folder, target, [999_999, 1_000_000, 1_000_001], config)
    users = ["final", "step_000007x", "step_backup"]
    assert left == sorted(["step_1000000", "step_1000001", *users])
    assert run_ranks(2, find_newest, folder, target) == ["step_1000001"] * 2


def save_after_damage(folder, target):
    policy = make_trained(folder, {})
    store = store_of(policy, target, keep_last=2)
    found = store.newest().name
    save(policy, store, 3)
    store.finish()
    return found, sorted(path.name for path in target.iterdir())


def test_a_damaged_checkpoint_is_not_one_of_those_that_are_kept(tmp_path, two_checkpoints):
    shutil.copytree(two_checkpoints / "out", tmp_path / "out")
    cut(tmp_path / "out" / "step_000002" / STATE)
    [(found, left)] = run_ranks(1, save_after_damage, two_checkpoints / "model", tmp_path / "out")
    assert found == "step_000001"
    assert left == ["step_000001", "step_000002", "step_000003"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_old_checkpoints_go_and_multiples_stay(tmp_path, asynchronous):
    folder = reference.save_model(tmp_path / "model", tied=False)
    config = {"keep_last": 2, "keep_every": 4, "asynchronous": asynchronous}
    for names in run_ranks(2, save_several, folder, tmp_path / "out", range(1, 8), config):
        assert names == ["step_000004", "step_000006", "step_000007"]


def find_newest(folder, target):
    policy = make_trained(folder, {"dp": 2})
    store = store_of(policy, target)
    path = store.newest()
    if path is None:
        return None
    state = store.load(path, policy.stages, policy.optimizer)
    weight = policy.stages[0].gpt.decoder.final_layernorm.weight
    assert (weight == state["step"]).all()
    return path.name


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_unreadable(path):
    """Whoever reads it, root too."""
    path.unlink()
    path.mkdir()


DAMAGE = {
    "a tensor file is cut": lambda folder: cut(next(folder.glob("__0_*.distcp"))),
    "one bit of it is flipped": lambda folder: flip(next(folder.glob("__1_*.distcp"))),
    "the state is gone": lambda folder: (folder / STATE).unlink(),
    "a file cannot be read": lambda folder: make_unreadable(next(folder.glob("__1_*.distcp"))),
    "the config is changed": lambda folder: flip(folder / HF / "config.json"),
    "there is no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "the manifest is cut": lambda folder: cut(folder / MANIFEST),
    "the manifest is of another kind": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "it was not written to its end": lambda folder: folder.rename(f"{folder}.partial"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    model = reference.save_model(folder / "model", tied=False)
    run_ranks(2, save_several, model, folder / "out", [1, 2], {})
    assert run_ranks(2, find_newest, model, folder / "out") == ["step_000002"] * 2
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capfd, two_checkpoints, damage):
    folder = two_checkpoints / "model"
    shutil.copytree(two_checkpoints / "out", tmp_path / "out")
    DAMAGE[damage](tmp_path / "out" / "step_000002")
    assert run_ranks(2, find_newest, folder, tmp_path / "out") == ["step_000001"] * 2
    if "not written" not in damage:
        told = capfd.readouterr().err
        assert f"{tmp_path}/out/step_000002 is damaged (" in told
        assert told.count("passed over") == 1


def test_no_checkpoint_is_none(tmp_path):
    folder = reference.save_model(tmp_path / "model", tied=False)
    assert run_ranks(2, find_newest, folder, tmp_path / "out") == [None, None]


def save_without_room(folder, target, asynchronous):
    """The second save may write files of 100 kB at most, as on a disk that is full."""
    policy = make_trained(folder, {"tp": 2})
    store = store_of(policy, target, asynchronous=asynchronous)
    with torch.no_grad():
        policy.stages[0].gpt.decoder.final_layernorm.weight.fill_(1)
    save(policy, store, 1)
    store.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        save(policy, store, 2)
        store.finish()
    except UserError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, asynchronous):
    folder = reference.save_model(tmp_path / "model", tied=False)
    target = tmp_path / "out"
    outcomes = run_ranks(2, save_without_room, folder, target, asynchronous)
    assert [name for name, _ in outcomes] == ["UserError", "PeerError"]
    message = outcomes[0][1]
    assert "the checkpoint of step 2 could not be written" in message
    assert f"{target / 'step_000001'} is untouched" in message
    assert "File too large" in message or "OSError" in message  # as megatron tells it
    assert [path.name for path in target.iterdir()] == ["step_000001"]
    assert run_ranks(2, find_newest, folder, target) == ["step_000001"] * 2


def seed(value):
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(value)


def draw():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def save_generators(folder, target):
    policy = make_trained(folder, {"dp": 2})
    seed(7 + policy.mesh.rank)
    draw()
    store = store_of(policy, target)
    save(policy, store, 1)
    store.finish()
    return draw()


def draw_after_load(folder, target, layout):
    policy = make_trained(folder, layout)
    seed(99)
    load(policy, store_of(policy, target))
    return draw()


def test_random_generators_go_on(tmp_path):
    """At their own layout; at another there is none that they would belong to."""
    folder = reference.save_model(tmp_path / "model", tied=False)
    before = run_ranks(2, save_generators, folder, tmp_path / "out")
    assert before[0] != before[1]
    assert run_ranks(2, draw_after_load, folder, tmp_path / "out", {"dp": 2}) == before
    seed(99)
    assert run_ranks(2, draw_after_load, folder, tmp_path / "out", {"tp": 2}) == [draw()] * 2


def bytes_for_a_save(folder, target, layout):
    """(bytes beyond what this rank held before, of its optimizer's state)"""
    policy = make_trained(folder, layout, updates=1, dtype="bfloat16")
    state = sum(tensor.nbytes for name, tensor in own_tensors(policy).items() if "adam" in name)
    store = store_of(policy, target, asynchronous=False)
    before = peak_from_here()
    save(policy, store, 1)
    return 2**20 * (memory("VmHWM") - before), state


@pytest.mark.parametrize("layout", [{}, {"dp": 2}], ids=str)
def test_a_save_copies_no_optimizer_state(tmp_path, layout):
    """megatron copies more than all of it twice, and for two replicas more than four times."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048}
    folder = reference.save_model(tmp_path / "model", tied=False, **sizes)
    world = layout.get("dp", 1)
    for copied, state in run_ranks(world, bytes_for_a_save, folder, tmp_path / "out", layout):
        print(f"{copied / 2**20:.0f} MiB for a save of {state / 2**20:.0f} MiB of optimizer state")
        assert state > 70 * 2**20
        assert copied < state / 8


def test_a_process_that_writes_holds_no_connection_open():
    """A thread that starts a process meanwhile waits for the end of a pipe that a fork has too."""
    reads, writes = os.pipe()
    ours, theirs = socket.socketpair()
    let_go, told = multiprocessing.Event(), multiprocessing.Event()

    def write():
        writer_module._let_go_of_connections()
        assert os.fstat(writes).st_rdev == os.stat(os.devnull).st_rdev  # its number is taken
        let_go.set()
        told.wait()

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    os.close(writes)
    theirs.close()
    assert let_go.wait(30)
    ready, _, _ = select.select([reads, ours], [], [], 30)
    while len(ready) < 2:
        ready, _, _ = select.select([reads, ours], [], [], 30)
    assert os.read(reads, 1) == ours.recv(1) == b""
    assert writer.is_alive()
    told.set()
    writer.join(30)
    assert writer.exitcode == 0
    os.close(reads)
    ours.close()
