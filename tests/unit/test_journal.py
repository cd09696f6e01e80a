"""The journal of finished groups: what was appended is there after a crash, damage is named."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest

from megafork.errors import UserError
from megafork.rollout.journal import Journal
from megafork.types import Group, Sample


def group(prompt_index: int) -> Group:
    logprobs = [-0.1, -1.1754943508222875e-38, -2.3841855067985307e-07]
    sample = Sample(4 * prompt_index, [5, 7, 1], logprobs, False, reward=0.5, accuracy=1.0)
    return Group(prompt_index, [3, 2], 3, [sample])


def test_round_trip_is_exact_and_in_order(tmp_path):
    path = tmp_path / "rollouts" / "step_1.jsonl"
    with Journal(path) as journal:
        for index in (4, 0, 2):
            journal.append(group(index))
    with Journal(path) as journal:  # a resumed step goes on
        journal.append(group(9))
    assert Journal.read(path) == [group(index) for index in (4, 0, 2, 9)]


def test_no_file_is_no_groups(tmp_path):
    assert Journal.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_torn_last_line_is_dropped_said_and_overwritten(tmp_path, caplog, cut):
    path = tmp_path / "step.jsonl"
    with Journal(path) as journal:
        journal.append(group(0))
        journal.append(group(1))
    path.write_bytes(path.read_bytes()[:-cut])
    assert Journal.read(path) == [group(0)]
    assert f"{path}:2" in caplog.text
    with Journal(path) as journal:
        journal.append(group(2))
    assert Journal.read(path) == [group(0), group(2)]


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("megafork.disk._BLOCK", 16)
    path = tmp_path / "step.jsonl"
    with Journal(path) as journal:
        journal.append(group(0))
    whole = path.read_bytes()
    for torn in (whole[:-1], whole + whole[:-1], whole + whole[:1]):
        path.write_bytes(torn)
        Journal(path).close()
        assert path.read_bytes() == (whole if torn.startswith(whole) else b"")


@pytest.mark.parametrize("damaged", [b'{"prompt_index": 1, "poli', b"", b"[1]", b"3", b"{}"])
def test_damage_before_the_end_names_file_and_line(tmp_path, damaged):
    path = tmp_path / "step.jsonl"
    with Journal(path) as journal:
        for index in range(3):
            journal.append(group(index))
    lines = path.read_bytes().split(b"\n")
    lines[1] = damaged
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"step\.jsonl:2 .*delete"):
        Journal.read(path)


def test_a_reward_that_is_no_number_survives(tmp_path):
    for reward in (math.nan, math.inf, -math.inf):
        bad = replace(group(0), samples=[replace(group(0).samples[0], reward=reward)])
        with Journal(tmp_path / f"{reward}.jsonl") as journal:
            journal.append(bad)
        [read] = Journal.read(tmp_path / f"{reward}.jsonl")
        assert repr(read) == repr(bad)
        assert group(0).is_finite and not read.is_finite


def test_kill_after_append_loses_nothing(tmp_path):
    path = tmp_path / "step.jsonl"

    def append_and_die():
        journal = Journal(path)
        for index in range(5):
            journal.append(group(index))
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=append_and_die)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert Journal.read(path) == [group(index) for index in range(5)]
