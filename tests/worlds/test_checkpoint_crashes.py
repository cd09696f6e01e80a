"""Whatever ends a save, and wherever: the checkpoint before it stays, and the next save works."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from tests.helpers import reference
from tests.helpers.commands import MARK, left_over
from tests.helpers.trained import load, make_trained, save, store_of
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model") / "model", tied=False)


def mark(policy, step):
    with torch.no_grad():
        policy.stages[0].gpt.decoder.final_layernorm.weight.fill_(step)


def save_marked(policy, store, step):
    mark(policy, step)
    save(policy, store, step)
    store.finish()


def load_marked(policy, store):
    """The newest step; its weights have to be that step's."""
    mark(policy, 0)
    step = load(policy, store)["step"]
    assert (policy.stages[0].gpt.decoder.final_layernorm.weight == step).all()
    return step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def die_at(event, name):
    """kill -9 of this process at its first such event (sys.audit) on a path with such an end."""

    def hook(happened, arguments):
        path = arguments[happened == "os.rename"] if happened == event else None
        if not isinstance(path, str | os.PathLike) or (event == "open" and arguments[1] != "w"):
            return
        if re.search(name, os.fspath(path)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_and_die(folder, target, event, name):
    policy = make_trained(folder, {})
    store = store_of(policy, target, keep_last=1)
    save_marked(policy, store, 1)
    die_at(event, name)
    save_marked(policy, store, 2)


def go_on_after(folder, target):
    policy = make_trained(folder, {})
    store = store_of(policy, target, keep_last=1)
    found = load_marked(policy, store)
    save_marked(policy, store, 3)
    return found


# In the order in which they come: (event, path, the checkpoint that the next start finds).
MOMENTS = [
    ("os.mkdir", r"step_000002\.partial$", 1),
    ("open", r"/generators\.pt$", 1),
    ("open", r"/\.metadata\.tmp$", 1),
    ("open", r"/metadata\.json$", 1),
    ("open", r"/state\.json$", 1),
    ("open", r"/manifest\.json$", 1),
    ("os.rename", r"/step_000002$", 1),
    ("shutil.rmtree", r"/step_000001$", 2),
    ("os.remove", r"manifest\.json$", 2),
    ("os.rmdir", r"step_000001$", 2),
]


@pytest.mark.parametrize(("event", "name", "left"), MOMENTS)
def test_a_save_may_be_killed_at_any_moment(tmp_path, model, event, name, left):
    target = tmp_path / "out"
    with pytest.raises(AssertionError, match="rank 0 died"):
        run_ranks(1, save_and_die, model, target, event, name)
    assert run_ranks(1, go_on_after, model, target) == [left]
    assert names(target) == ["step_000003"]


def power_cut(folder, target):
    """What would be lost, had the power been cut when the name was given and when the old one went.

    A file or folder that was not synced after it was written is lost.
    """
    policy = make_trained(folder, {})
    store = store_of(policy, target, keep_last=1)
    save_marked(policy, store, 1)
    record, lost, exact = target.parent / "synced", {}, os.fsync

    def fsync(descriptor):
        exact(descriptor)
        with record.open("a") as file:  # also from the process that writes the tensors
            file.write(f"{os.fstat(descriptor).st_ino}\n")

    def synced(path):
        return str(path.stat().st_ino) in record.read_text().split()

    def look(happened, arguments):
        if happened == "os.rename" and str(arguments[1]).endswith("step_000002"):
            folder = Path(arguments[0])
            lost["renamed"] = [p.name for p in (folder, *folder.rglob("*")) if not synced(p)]
            record.write_text("")
        if happened == "shutil.rmtree" and str(arguments[0]).endswith("step_000001"):
            lost["removed"] = [] if synced(target) else ["the new name"]

    os.fsync = fsync
    sys.addaudithook(look)
    save_marked(policy, store, 2)
    return lost


def test_a_name_is_given_when_all_is_on_the_disk(tmp_path, model):
    [lost] = run_ranks(1, power_cut, model, tmp_path / "out")
    assert lost == {"renamed": [], "removed": []}


def outcome_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def save_with_a_killed_writer(folder, target, victim):
    """The process that writes for rank `victim` is killed at its first tensor."""
    policy = make_trained(folder, {"tp": 2})
    store = store_of(policy, target)
    save_marked(policy, store, 1)
    exact = filesystem_async._write_item
    if policy.mesh.rank == victim:
        filesystem_async._write_item = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    told = outcome_of(lambda: save_marked(policy, store, 2))
    left = names(target)
    filesystem_async._write_item = exact
    save_marked(policy, store, 3)  # what the others reported of the failed save is not taken for it
    return told, left, load_marked(policy, store)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_writer_is_no_checkpoint(tmp_path, model, victim):
    """As the kernel kills one when memory runs out."""
    target = tmp_path / "out"
    [first, second] = run_ranks(2, save_with_a_killed_writer, model, target, victim, timeout=60)
    (kind, message), left, newest = first
    assert (kind, left, newest) == ("UserError", ["step_000001"], 3)
    assert f"rank {victim}'s writer ended with status -9" in message
    assert f"{target / 'step_000001'} is untouched" in message
    assert second[0][0] == "PeerError"
    assert second[2] == 3


def die_while_writing(folder, target):
    os.environ[MARK] = str(target)  # for what is started, not forked, from here on
    policy = make_trained(folder, {})

    def write(*_, **__):
        (target / "writer").write_text(str(os.getpid()))
        signal.pause()

    filesystem_async._write_item = write
    save(policy, store_of(policy, target), 1)
    while not (target / "writer").exists() or not (target / "writer").read_text():
        os.sched_yield()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_ends_with_its_trainer(tmp_path, model):
    """It could else write into the folder that the resumed run has begun. Nor does another stay."""
    with pytest.raises(AssertionError, match="rank 0 died"):
        run_ranks(1, die_while_writing, model, tmp_path / "out")
    writer = int((tmp_path / "out" / "writer").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert left_over(tmp_path / "out") == []


def save_without_room(folder, target, room, begun):
    """The second save may write files of `room` bytes at most, as on a disk that is full.

    begun: only what comes after the tensors, which a forked process writes meanwhile.
    """
    policy = make_trained(folder, {"tp": 2})
    store = store_of(policy, target)
    save_marked(policy, store, 1)

    def limited():
        if begun:
            save(policy, store, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        if not begun:
            save(policy, store, 2)
        store.finish()

    return outcome_of(limited)


@pytest.mark.parametrize(
    ("room", "begun"),
    [(0, False), (1_000, False), (3_000, False), (100_000, False), (0, True), (60_000, True)],
)
def test_wherever_the_disk_is_full(tmp_path, model, room, begun):
    """For megatron's common.pt (2 kB), the generators (60 kB), a tensor; then megatron's metadata
    (80 kB)."""
    target = tmp_path / "out"
    (kind, message), _ = run_ranks(2, save_without_room, model, target, room, begun)
    assert kind == "UserError", message
    assert "the checkpoint of step 2 could not be written" in message
    assert f"{target / 'step_000001'} is untouched" in message
    assert names(target) == ["step_000001"]


def save_into(folder, target):
    policy = make_trained(folder, {"tp": 2})
    return outcome_of(lambda: save_marked(policy, store_of(policy, target), 1))


def test_a_folder_that_cannot_be_made_is_named(tmp_path, model):
    (tmp_path / "out").write_text("a file")
    [(kind, message), (other, _)] = run_ranks(2, save_into, model, tmp_path / "out")
    assert (kind, other) == ("UserError", "PeerError")
    assert f"could not be written to {tmp_path}/out" in message
    assert "there is none before it" in message
