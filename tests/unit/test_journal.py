"""The journal of finished groups: what was appended is there after a crash, damage is named."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from megafork.data.sample import Group, Sample
from megafork.errors import UserError
from megafork.rollout.journal import Journal, journalled_steps, json_lines, read_step


def group(prompt_index: int) -> Group:
    logprobs = [-0.1, -1.1754943508222875e-38, -2.3841855067985307e-07]
    sample = Sample(4 * prompt_index, [5, 7, 1], logprobs, False, reward=0.5, accuracy=1.0)
    return Group(prompt_index, [3, 2], 3, [sample])


def test_round_trip_is_exact_and_in_order(tmp_path):
    path = tmp_path / "rollouts" / "step_1.journal"
    with Journal(path) as journal:
        for index in (4, 0, 2):
            journal.append(group(index))
    with Journal(path) as journal:  # a resumed step goes on
        journal.append(group(9))
    assert Journal.read(path) == [group(index) for index in (4, 0, 2, 9)]


def test_no_file_is_no_groups(tmp_path):
    assert Journal.read(tmp_path / "none.journal") == []


@pytest.mark.parametrize("cut", [1, 20, 60, -5])
def test_a_torn_last_record_is_dropped_said_and_overwritten(tmp_path, caplog, cut):
    path = tmp_path / "step.journal"
    with Journal(path) as journal:
        journal.append(group(0))
        second = path.stat().st_size
        journal.append(group(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] if cut > 0 else whole[: second - cut])
    assert Journal.read(path) == [group(0)]
    assert f"{path}, byte {second}: dropped a group not written to its end" in caplog.text
    with Journal(path) as journal:
        journal.append(group(2))
    assert Journal.read(path) == [group(0), group(2)]


def test_every_flipped_bit_is_found_and_costs_one_group(tmp_path):
    """Each bit of the second of three records; the other two are read whatever happens to it."""
    path = tmp_path / "step.journal"
    groups = [group(index) for index in range(3)]
    ends = []
    with Journal(path) as journal:
        for each in groups:
            journal.append(each)
            ends.append(path.stat().st_size)
    content = path.read_bytes()
    for bit in range(8 * ends[0], 8 * ends[1]):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        damaged = []
        assert list(Journal.each(path, damaged.append)) == [groups[0], groups[2]], bit
        [damage] = damaged
        assert damage.offset == ends[0] and damage.prompt_index in (1, None)
    assert str(damage).startswith(f"{path}, byte {ends[0]}: prompt 1's group is damaged (")


def test_reading_finds_its_place_again(tmp_path, monkeypatch, caplog):
    """Whatever stands between two records, and however it lies to the blocks that are read."""
    path = tmp_path / "step.journal"
    with Journal(path) as journal:
        journal.append(group(0))
    record = path.read_bytes()
    for block in (9, 16, 1 << 20):
        monkeypatch.setattr("megafork.rollout.journal._BLOCK", block)
        for between in (b"x", record[:30], record[9:], record[:9] * 5, bytes(100)):
            path.write_bytes(record + between + record)
            assert Journal.read(path) == [group(0), group(0)]
            assert f"{path}, byte {len(record)}: a record is damaged" in caplog.text
            caplog.clear()
            with Journal(path) as journal:  # a resumed step goes on behind it
                journal.append(group(1))
            assert Journal.read(path) == [group(0), group(0), group(1)]


def test_a_journal_of_the_former_format_is_read(tmp_path, caplog):
    """JSON lines; each change of a response's weights is one version more."""
    former = {
        "prompt_index": 3,
        "prompt_ids": [3, 2],
        "policy_version": 5,
        "samples": [
            {"uid": 12, "token_ids": [5, 7, 1], "logprobs": [-0.1, -0.2, math.nan],
             "truncated": False, "reward": math.nan, "accuracy": 1.0, "failure": "timeout",
             "version_changes": [1, 1, 2]},
            {"uid": 13, "token_ids": [], "logprobs": [], "truncated": True,
             "version_changes": [0]},
        ],
    }  # fmt: skip
    path = tmp_path / "step_000001.jsonl"
    line = json.dumps(former).encode()
    path.write_bytes(line + b"\n" + line[:-20])
    [read] = Journal.read(path)
    assert f"{path}:2: dropped a group not written to its end" in caplog.text
    first, second = read.samples
    assert (read.prompt_index, read.prompt_ids, read.policy_version) == (3, [3, 2], 5)
    assert first.token_ids.tolist() == [5, 7, 1] and first.truncated is False
    assert first.logprobs.tobytes() == np.array([-0.1, -0.2, math.nan], np.float32).tobytes()
    assert math.isnan(first.reward) and (first.accuracy, first.failure) == (1.0, "timeout")
    assert first.versions == ((5, 0), (7, 1), (8, 2)) and second.versions == ((6, 0),)
    with Journal(tmp_path / "step_000001.journal") as journal:  # the run goes on
        journal.append(group(4))
    assert set(read_step(tmp_path, 1)) == {3, 4}
    assert journalled_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "damaged",
    [b'{"prompt_index": 1, "poli', b"", b"[1]", b"3", b"{}"]
    + [json.dumps({"prompt_index": 1, "prompt_ids": [3], "policy_version": 1, "samples": [
        {"uid": 1, "truncated": False} | wrong]}).encode()
       for wrong in ({"token_ids": [1], "logprobs": []}, {"token_ids": [2**40], "logprobs": [0]})],
)  # fmt: skip
def test_damage_to_the_former_format_names_file_and_line(tmp_path, damaged):
    path = tmp_path / "step.jsonl"
    good = b'{"prompt_index": 1, "prompt_ids": [3], "policy_version": 1, "samples": []}'
    path.write_bytes(b"\n".join([good, damaged, good]) + b"\n")
    with pytest.raises(UserError, match=r"step\.jsonl:2 .*delete"):
        Journal.read(path)


def test_what_a_run_has_generated_is_printed(tmp_path):
    for step in (1, 2):
        with Journal(tmp_path / "rollouts" / f"step_{step:06d}.journal") as journal:
            journal.append(group(step))
    every = [json.loads(line) for line in json_lines(tmp_path)]
    assert [row["prompt_index"] for row in every] == [1, 2]
    [row] = map(json.loads, json_lines(tmp_path, step=2))
    assert row == json.loads(next(json_lines(tmp_path / "rollouts" / "step_000002.journal")))
    [sample] = row["samples"]
    assert (row["prompt_ids"], sample["token_ids"]) == ([3, 2], [5, 7, 1])
    assert np.array_equal(np.array(sample["logprobs"], np.float32), group(2).samples[0].logprobs)
    for path, step, cause in (
        (tmp_path, 3, "holds no journal of step 3"),
        (tmp_path / "elsewhere", None, "neither a run's folder nor a journal"),
        (tmp_path / "rollouts" / "step_000002.journal", 2, "name the run's folder"),
        (tmp_path / "rollouts", None, "holds no journal"),
    ):
        with pytest.raises(UserError, match=cause):
            list(json_lines(path, step))


def test_a_reward_that_is_no_number_survives(tmp_path):
    for reward in (math.nan, math.inf, -math.inf):
        bad = replace(group(0), samples=[replace(group(0).samples[0], reward=reward)])
        with Journal(tmp_path / f"{reward}.journal") as journal:
            journal.append(bad)
        [read] = Journal.read(tmp_path / f"{reward}.journal")
        assert repr(read) == repr(bad)
        assert group(0).is_finite and not read.is_finite


def test_kill_after_append_loses_nothing(tmp_path):
    path = tmp_path / "step.journal"

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
