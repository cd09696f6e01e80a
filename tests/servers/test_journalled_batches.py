"""A batch is a function of the journal: what is in it is not asked for again, damage is named."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from dataclasses import replace

import pytest

from megafork.config import DataConfig, RewardConfig, RolloutConfig
from megafork.data.prompts import PromptStream, read_prompts
from megafork.data.sample import Group, Sample
from megafork.data.token_table import token_table
from megafork.data.tokenizer import HfTokenizer
from megafork.errors import UserError
from megafork.rollout.client import RolloutClient
from megafork.rollout.collector import Collector
from megafork.rollout.journal import Journal, journal_path, read_step
from megafork.rollout.judging import Judging
from megafork.rollout.sampling import Sampling
from megafork.rollout.step_journals import StepJournals
from megafork.verifiers.verifier import Judge
from tests.helpers.background import BackgroundLoop
from tests.helpers.commands import QUICKSTART, megafork, tiny_run
from tests.helpers.replays import TOLERANCE, comparable, journalled, replayed_in_one_go
from tests.helpers.rollout_servers import running, wait_for
from tests.helpers.shared_servers import ON_QUICKSTART, quickstart_server


@pytest.fixture
def server(tmp_path_factory):
    with quickstart_server(tmp_path_factory) as started:
        yield started


@contextlib.contextmanager
def collecting(client, folder, verifier="by_spelling", **rollout):
    data = DataConfig(train=str(QUICKSTART / "data" / "train.jsonl"))
    tokenizer = HfTokenizer(QUICKSTART / "model")
    settings = {"prompts_per_step": 12, "group_size": 4, "seeded": True, "surplus": "carry"}
    config = RolloutConfig(**settings | {"max_response_tokens": 32} | rollout)
    reward = RewardConfig(verifier=f"tests.helpers.verifiers:{verifier}", workers=1)
    with Judge(reward) as judge:
        yield Collector(
            fleet=client,
            prompts=PromptStream(read_prompts(data.train, data, tokenizer.encode), seed=0),
            judging=Judging(tokenizer, judge, 32),
            journals=StepJournals(folder),
            rollout=config,
            sampling=Sampling(max_tokens=32, stop_token_ids=(1,)),
        )


def contents(batch):
    """Of each sample that is trained on: what it is, and its tokens."""
    table = token_table(batch.groups)
    return {
        uid: (float(reward), table.token_R[rows].tolist(), table.rollout_logprob_R[rows].tolist())
        for b, (uid, reward) in enumerate(
            zip(table.uid_B.tolist(), table.reward_B.tolist(), strict=True)
        )
        for rows in [table.rows(b)]
    }


def nowhere():
    """Whatever needs a server fails."""
    return RolloutClient("http://127.0.0.1:9", "key")


@ON_QUICKSTART
def test_journals_of_former_replicas_are_the_same_batch(server, tmp_path):
    """A run that a version with a file for each data-parallel replica began."""
    with collecting(server.client(timeout_s=60.0), tmp_path) as collector:
        batch = asyncio.run(collector.collect(1, 0))
        assert batch.reward_seconds > 0.0
    path = journal_path(tmp_path, 1)
    groups = Journal.read(path)
    path.unlink()
    for replica, name in enumerate((path.name, "step_000001-replica1.journal")):
        with Journal(tmp_path / name) as journal:
            for group in groups:
                if group.prompt_index % 2 == replica:
                    journal.append(group)
    with collecting(nowhere(), tmp_path) as collector:
        again = asyncio.run(collector.collect(1, 0))
        assert again.num_replayed == len(batch.generated)
        assert contents(again) == contents(batch) and len(contents(batch)) == 48


@ON_QUICKSTART
def test_tokens_that_nobody_trains_on_are_let_go(server, tmp_path):
    with collecting(
        server.client(timeout_s=60.0), tmp_path, "some_prompts_only", max_policy_lag=1
    ) as collector:
        batch = asyncio.run(collector.collect(1, 0))
    kept = {group.prompt_index for group in batch.groups + collector.carried}
    assert batch.num_dropped > 0
    for group in batch.generated:
        for sample in group.samples:
            assert sample.num_tokens > 0
            assert len(sample.token_ids) == (sample.num_tokens if group.has_signal else 0)
    assert {group.prompt_index for group in batch.generated if group.has_signal} == kept


@ON_QUICKSTART
def test_carried_groups_are_found_in_the_journal(server, tmp_path):
    """A checkpoint holds no tokens; the batch after it has them."""
    settings = {"max_policy_lag": 1, "oversampling": 2.0, "dynamic_sampling": False}
    with collecting(server.client(timeout_s=60.0), tmp_path, **settings) as collector:
        first = asyncio.run(collector.collect(1, 0))
        assert len(collector.carried) == 12
        second = asyncio.run(collector.collect(2, 0))
        assert [group.step for group in second.groups] == [1] * 12
    state = json.loads(json.dumps(first.state))
    with collecting(nowhere(), tmp_path, **settings) as collector:
        collector.restore(state)
        assert contents(asyncio.run(collector.collect(2, 0))) == contents(second)
    (tmp_path / "step_000001.journal").unlink()
    with collecting(nowhere(), tmp_path, **settings) as collector:
        collector.restore(state)
        with pytest.raises(UserError, match=r"step_000001.journal: prompt \d+'s group, which was"):
            asyncio.run(collector.collect(2, 0))


@ON_QUICKSTART
def test_a_group_that_was_judged_again_is_taken_once(server, tmp_path):
    options = {"dynamic_sampling": False}
    with (
        collecting(server.client(timeout_s=60.0), tmp_path, "broken", **options) as collector,
        pytest.raises(UserError, match=r"verifiers:broken failed on 48 of 48 .* prompt '\d+ "),
    ):
        asyncio.run(collector.collect(1, 0))
    with collecting(nowhere(), tmp_path, "length", **options) as collector:
        batch = asyncio.run(collector.collect(1, 0))
    known = read_step(tmp_path, 1)
    assert len(known) == len(batch.generated) == 12
    assert all(sample.failure is None for group in known.values() for sample in group.samples)


def test_a_later_journal_does_not_replace_what_is_held(tmp_path):
    """Step 2's file is of an attempt in which step 1 had taken fewer prompts."""
    options = {"dynamic_sampling": False, "max_policy_lag": 1, "prompts_per_step": 2}
    with running(1) as [small]:
        with collecting(small.client(), tmp_path, **options) as collector:
            for step in (1, 2):
                asyncio.run(collector.collect(step, 0))
        (tmp_path / "step_000001.journal").unlink()
        options["oversampling"] = 2.0
        with collecting(small.client(), tmp_path, **options) as collector:
            first = asyncio.run(collector.collect(1, 0))
            second = asyncio.run(collector.collect(2, 0))  # before the first is trained on
            assert [[g.prompt_index for g in b.groups] for b in (first, second)] == [[0, 1], [2, 3]]
            assert second.num_replayed == 0 and {g.step for g in second.groups} == {1}
            assert len(contents(first)) == len(contents(second)) == 8


def test_a_damaged_record_is_generated_again_unless_it_was_trained_on(tmp_path, caplog):
    options = {"dynamic_sampling": False, "prompts_per_step": 4}
    path = tmp_path / "step_000001.journal"
    with running(1) as [small]:
        with collecting(small.client(), tmp_path, **options) as collector:
            asyncio.run(collector.collect(1, 0))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # of a log-probability of the last record
        path.write_bytes(content)
        damaged = {0, 1, 2, 3} - {group.prompt_index for group in Journal.read(path)}
        caplog.clear()
        with collecting(small.client(), tmp_path, **options) as collector:
            batch = asyncio.run(collector.collect(1, 0))
        assert [group.prompt_index for group in batch.groups] == [0, 1, 2, 3]
        assert batch.num_replayed == 3 and len(small.asked) == 5
        [index] = damaged
        cause = f"prompt {index}'s group is damaged (its arrays are not what was written)"
        assert f"{cause}; it is generated again" in caplog.text

        # It is there now, so the damaged one is missed by nobody.
        with (
            Journal(journal_path(tmp_path, 2)),
            collecting(nowhere(), tmp_path, **options) as collector,
        ):
            assert asyncio.run(collector.collect(1, 0)).num_replayed == 4
        path.write_bytes(content)
        with (
            collecting(nowhere(), tmp_path, **options) as collector,
            pytest.raises(UserError) as refused,
        ):
            asyncio.run(collector.collect(1, 0))
    assert f"{cause}, and step 1 may have been trained on what the file held" in str(refused.value)


def test_the_finite_version_of_a_group_is_taken(tmp_path):
    """Wherever it was judged again: the file that is read last has the older one."""
    samples = [Sample(0, [3], [-0.5], False, reward=math.nan), Sample(1, [4], [-0.5], False)]
    group = Group(1, [3], 0, samples)
    mended = replace(group, samples=[replace(samples[0], reward=1.0), samples[1]])
    path = journal_path(tmp_path, 1)
    for file, version in ((path, mended), (path.with_stem(f"{path.stem}-replica1"), group)):
        with Journal(file) as journal:
            journal.append(version)
    assert read_step(tmp_path, 1) == {1: mended}


def test_requests_that_are_given_up_end_at_the_server(tmp_path):
    with running(1) as [small], BackgroundLoop() as loop:
        small.held = True
        with collecting(small.client(), tmp_path, dynamic_sampling=False) as collector:
            job = loop.submit(collector.collect(1, 0))
            wait_for(lambda: len(small.waiting) == 12)
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                job.result()
            wait_for(lambda: small.num_connections == 0)
            small.held = False
            batch = loop.submit(collector.collect(1, 0)).result()
            assert len(batch.groups) == 12


@pytest.mark.slow
def test_a_run_of_two_replicas(tmp_path):
    """One replica learns the same from their journal."""
    run_dir = tmp_path / "run"
    settings = ("parallel.tp=1", "parallel.dp=2", "training.steps=2", "rollout.max_policy_lag=1")
    done = megafork(*tiny_run(run_dir, *settings, "eval.prompts=8"), mark=run_dir)
    assert done.returncode == 0, done.stderr
    assert len(list(run_dir.glob("rollouts/*"))) == 2
    before = journalled(run_dir)
    (run_dir / "config.toml").write_text(
        (run_dir / "config.toml").read_text().replace("dp = 2", "dp = 1")
    )
    (rows, _), (alone, _) = comparable(run_dir), replayed_in_one_go(run_dir, tmp_path / "alone")
    assert journalled(run_dir) == before
    for ours, theirs in zip(rows, alone, strict=True):
        for name, value in ours.items():
            assert value == theirs[name] or abs(value - theirs[name]) <= TOLERANCE, name
