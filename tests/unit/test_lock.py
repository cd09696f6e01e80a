"""One holder of a folder at a time; a dead one is told from one that lives, here and elsewhere."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, replace

import pytest

from megafork.errors import UserError
from megafork.system import lock
from megafork.system.lock import HELD, NAME, Holder, held, refuse_held

FORK = multiprocessing.get_context("fork")
FRESH, OLD = 0.0, 1000.0
"""Seconds since the last touch"""


def hold_until(folder, begun, ended):
    os.environ.pop(HELD, None)
    with held(folder, "run.dir"):
        begun.set()
        ended.wait()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    begun, ended = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold_until, args=(tmp_path, begun, ended))
    process.start()
    assert begun.wait(30)
    process.end = ended.set
    yield process
    with contextlib.suppress(AttributeError):
        process.kill()
    process.join()


def elsewhere(folder, seconds_ago):
    """A lock of a process on another machine."""
    path = folder / NAME
    other = replace(Holder.this_process(), host="node7", boot="another", pid=1, token="theirs")
    path.write_text(json.dumps(asdict(other)))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def assert_refused(folder, pid):
    for attempt in (lambda: refuse_held(folder, "run.dir"), held(folder, "run.dir").__enter__):
        with pytest.raises(UserError) as caught:
            attempt()
        assert f"run.dir={folder} is in use by process {pid} on " in str(caught.value)
        assert "wait until it has ended" in str(caught.value)


def test_a_second_one_is_refused_and_names_the_first(tmp_path, holder):
    assert_refused(tmp_path, holder.pid)


def test_one_that_stands_still_lives(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    os.utime(tmp_path / NAME, (0, 0))
    assert_refused(tmp_path, holder.pid)


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_what_has_ended_holds_nothing(tmp_path, holder, how):
    holder.kill() if how == "killed" else holder.end()
    holder.join()
    assert (tmp_path / NAME).exists() == (how == "killed")
    refuse_held(tmp_path, "run.dir")
    with held(tmp_path, "run.dir"):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    """The holder was killed; its pid and its fresh touch say nothing on this machine."""
    (tmp_path / NAME).write_text(json.dumps(asdict(Holder.this_process())))
    refuse_held(tmp_path, "run.dir")
    with held(tmp_path, "run.dir"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}'])
def test_a_damaged_lock_that_nobody_holds_is_taken(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    refuse_held(tmp_path, "run.dir")
    with held(tmp_path, "run.dir"):
        pass


def test_a_stale_one_of_another_machine_is_taken(tmp_path):
    elsewhere(tmp_path, OLD)
    refuse_held(tmp_path, "run.dir")
    with held(tmp_path, "run.dir"):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_touched_one_of_another_machine_is_refused(tmp_path, monkeypatch):
    path = elsewhere(tmp_path, FRESH)
    with pytest.raises(UserError, match="is in use by process 1 on node7, since"):
        refuse_held(tmp_path, "run.dir")
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.utime(path))
    with pytest.raises(UserError, match="is in use by process 1 on node7, since"):
        held(tmp_path, "run.dir").__enter__()


def test_one_of_another_machine_that_ends_meanwhile_is_followed(tmp_path, monkeypatch):
    path = elsewhere(tmp_path, FRESH)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: path.unlink())
    with held(tmp_path, "run.dir"):
        pass


def test_one_of_another_machine_that_falls_silent_is_waited_for(tmp_path, monkeypatch, capfd):
    elsewhere(tmp_path, FRESH)
    monkeypatch.setattr(lock, "STALE_S", 0.05)
    monkeypatch.setattr(lock, "_LOOK_S", 0.01)
    with held(tmp_path, "run.dir"):
        pass
    assert "is process 1 on node7" in capfd.readouterr().err


def test_where_there_are_no_locks_the_touch_decides(tmp_path, monkeypatch):
    (tmp_path / NAME).write_text(json.dumps(asdict(Holder.this_process())))

    def no_locks(descriptor, kind):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="is in use"):
        refuse_held(tmp_path, "run.dir")
    os.utime(tmp_path / NAME, (0, 0))
    with held(tmp_path, "run.dir"):
        pass


def stand_still_meanwhile(folder):
    lock._BEAT_S = 0.01
    os.environ.pop(HELD, None)
    with held(folder, "run.dir"):
        elsewhere(folder, FRESH)
        time.sleep(60)


def test_who_has_lost_it_writes_no_more(tmp_path):
    process = FORK.Process(target=stand_still_meanwhile, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((tmp_path / NAME).read_text())["token"] == "theirs"


def test_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_S", 0.01)
    with held(tmp_path, "run.dir"):
        path = tmp_path / NAME
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def hold_for_me(folder, outcome):
    with held(folder, "run.dir"):
        refuse_held(folder, "run.dir")
        outcome.value = 1


def test_who_was_started_by_the_holder_is_let_in(tmp_path):
    outcome = FORK.Value("i")
    with held(tmp_path, "run.dir"):
        child = FORK.Process(target=hold_for_me, args=(tmp_path, outcome))
        child.start()
        child.join()
        assert (tmp_path / NAME).exists()
    assert outcome.value == 1


RACERS = 8


def race(folder, start, winners, losers):
    """Who wins holds the lock until all others have lost."""
    os.environ.pop(HELD, None)
    start.wait()
    try:
        with held(folder, "run.dir"):
            with winners.get_lock():
                winners.value += 1
            for _ in range(RACERS - 1):
                if not losers.acquire(timeout=60):  # two have won
                    return
    except UserError:
        losers.release()


@pytest.mark.parametrize("left", ["nothing", "a stale one", "a dead one's"])
def test_of_many_at_once_one_wins(tmp_path, left):
    if left == "a stale one":
        elsewhere(tmp_path, OLD)
    elif left == "a dead one's":
        (tmp_path / NAME).write_text(json.dumps(asdict(Holder.this_process())))
    winners, losers, start = FORK.Value("i"), FORK.Semaphore(0), FORK.Barrier(RACERS)
    arguments = tmp_path, start, winners, losers
    racers = [FORK.Process(target=race, args=arguments) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert winners.value == 1


def test_a_link_in_its_place_is_not_followed(tmp_path):
    target = tmp_path / "elsewhere"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(target)
    with pytest.raises(UserError, match="cannot be written"):
        held(tmp_path / "run", "run.dir").__enter__()
    assert not target.exists()
