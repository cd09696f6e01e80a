"""Several replicas' workers, asked over HTTP by one collector: the batch is that of one replica."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from dataclasses import replace

import aiohttp
import pytest

from megafork.config import DataConfig, RewardConfig, RolloutConfig
from megafork.data.prompts import PromptStream, read_prompts
from megafork.data.tokenizer import HfTokenizer
from megafork.errors import UserError
from megafork.rewards.verifier import Judge
from megafork.rollout.background import BackgroundLoop
from megafork.rollout.client import RolloutClient, ServerError
from megafork.rollout.collector import Collector
from megafork.rollout.journal import Journal, journal_path, read_step
from megafork.rollout.remote import RemoteWorker, WorkerLost, serve
from megafork.rollout.sampling import Sampling
from megafork.rollout.worker import RolloutWorker
from megafork.sample import Group, Sample
from megafork.types import known_table
from tests.helpers.commands import QUICKSTART, megafork, tiny_run
from tests.helpers.replays import TOLERANCE, comparable, journalled, replayed_in_one_go
from tests.helpers.rollout_servers import KEY, running, wait_for
from tests.helpers.shared_servers import ON_QUICKSTART, quickstart_server

WORKER_KEY = "workers"


@pytest.fixture
def server(tmp_path_factory):
    with quickstart_server(tmp_path_factory) as started:
        yield started


@contextlib.contextmanager
def collecting(client, api_key, folder, num_replicas, verifier="by_spelling", **rollout):
    """A collector, and the workers behind it: the first in its own process, as in a run."""
    data = DataConfig(train=str(QUICKSTART / "data" / "train.jsonl"))
    tokenizer = HfTokenizer(QUICKSTART / "model")
    settings = {"prompts_per_step": 12, "group_size": 4, "seeded": True, "surplus": "carry"}
    config = RolloutConfig(**settings | {"max_response_tokens": 32} | rollout)
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(
            Judge(RewardConfig(verifier=f"tests.helpers.verifiers:{verifier}", workers=1))
        )
        workers = [
            RolloutWorker(
                config, tokenizer, judge, folder,
                api_key=api_key, replica=replica, num_replicas=num_replicas,
            )
            for replica in range(num_replicas)
        ]  # fmt: skip
        asked = [workers[0]]
        for rank, worker in enumerate(workers[1:], start=1):
            loop = stack.enter_context(BackgroundLoop())
            url = loop.submit(serve(worker, "127.0.0.1", WORKER_KEY)).result()
            asked.append(RemoteWorker(url, WORKER_KEY, rank, config.request_timeout_s, {}))
        collector = Collector(
            client=client,
            workers=asked,
            prompts=PromptStream(read_prompts(data.train, data, tokenizer.encode), seed=0),
            judge=judge,
            rollout=config,
            sampling=Sampling(max_tokens=32, stop_token_ids=(1,)),
        )
        yield collector, workers


def contents(batch, workers):
    """Of each sample that is trained on: what it is, and its tokens, from whichever worker."""
    known = known_table(batch.groups)
    found = {}
    for worker in workers:
        table = worker.take_rows(known)
        ours = [i % len(workers) == worker.replica for i in known.group_B.tolist()]
        assert table.held_B.tolist() == ours  # and of no others
        for b in table.held_B.nonzero()[:, 0].tolist():
            rows = table.rows(b)
            found[int(table.uid_B[b])] = (
                float(table.reward_B[b]),
                table.token_R[rows].tolist(),
                table.rollout_logprob_R[rows].tolist(),
            )
    return found


def nowhere():
    """Whatever needs a server fails."""
    return RolloutClient("http://127.0.0.1:9", "key")


@ON_QUICKSTART
def test_a_batch_does_not_depend_on_the_number_of_replicas(server, tmp_path):
    found = []
    for num_replicas in (1, 3):
        folder = tmp_path / str(num_replicas)
        client = server.client(timeout_s=60.0)
        with collecting(client, server.api_key, folder, num_replicas) as (collector, workers):
            batch = asyncio.run(collector.collect(1, 0))
            found.append(([g.prompt_index for g in batch.groups], contents(batch, workers)))
            assert batch.reward_seconds > 0.0
            # What is not trained on or carried is forgotten.
            carried = {group.prompt_index for group in collector.carried}
            assert {i for worker in workers for i in worker._groups} == carried
    assert found[0] == found[1] and len(found[0][1]) == 48
    files = {path.name: Journal.read(path) for path in (tmp_path / "3").iterdir()}
    names = ["step_000001.journal", "step_000001-replica1.journal", "step_000001-replica2.journal"]
    assert sorted(files) == sorted(names)
    for replica, name in enumerate(names):
        assert {group.prompt_index % 3 for group in files[name]} == {replica}
    # Another number of replicas goes on with the three files, and asks no server.
    for num_replicas in (1, 2):
        with collecting(nowhere(), "key", tmp_path / "3", num_replicas) as (collector, workers):
            again = asyncio.run(collector.collect(1, 0))
            assert again.num_replayed == len(batch.generated)
            assert contents(again, workers) == found[0][1]


@ON_QUICKSTART
def test_carried_groups_are_found_in_the_journal(server, tmp_path):
    """A checkpoint holds no tokens; the batch after it has them, at another number of replicas."""
    settings = {"max_policy_lag": 1, "oversampling": 2.0, "dynamic_sampling": False}
    client = server.client(timeout_s=60.0)
    with collecting(client, server.api_key, tmp_path, 2, **settings) as (collector, workers):
        first = asyncio.run(collector.collect(1, 0))
        assert len(collector.carried) == 12
        second = asyncio.run(collector.collect(2, 0))
        assert [group.step for group in second.groups] == [1] * 12
        expected = contents(second, workers)
    state = json.loads(json.dumps(first.state))
    with collecting(nowhere(), "key", tmp_path, 3, **settings) as (collector, workers):
        collector.restore(state)
        second = asyncio.run(collector.collect(2, 0))
        assert contents(second, workers) == expected
    (tmp_path / "step_000001-replica1.journal").unlink()
    with collecting(nowhere(), "key", tmp_path, 1, **settings) as (collector, workers):
        collector.restore(state)
        with pytest.raises(UserError, match=r"step_000001.journal: prompt \d+'s group, which was"):
            asyncio.run(collector.collect(2, 0))


@ON_QUICKSTART
def test_a_group_that_was_judged_again_is_taken_once(server, tmp_path):
    """Another replica has it now, and writes it to a file of its own."""
    options = {"dynamic_sampling": False}
    client, key = server.client(timeout_s=60.0), server.api_key
    with (
        collecting(client, key, tmp_path, 2, "broken", **options) as (collector, _),
        pytest.raises(UserError, match=r"verifiers:broken failed on 48 of 48 responses"),
    ):
        asyncio.run(collector.collect(1, 0))
    with collecting(nowhere(), "key", tmp_path, 1, "length", **options) as (collector, _):
        batch = asyncio.run(collector.collect(1, 0))
    known = read_step(tmp_path, 1)
    assert len(known) == len(batch.generated) == 12
    assert all(sample.failure is None for group in known.values() for sample in group.samples)


def test_a_later_journal_does_not_replace_what_is_held(tmp_path):
    """Step 2's file is of an attempt in which step 1 had taken fewer prompts."""
    options = {"dynamic_sampling": False, "max_policy_lag": 1, "prompts_per_step": 2}
    with running(1) as [small]:
        with collecting(small.client(), KEY, tmp_path, 2, **options) as (collector, _):
            for step in (1, 2):
                asyncio.run(collector.collect(step, 0))
        (tmp_path / "step_000001.journal").unlink()
        (tmp_path / "step_000001-replica1.journal").unlink()
        options["oversampling"] = 2.0
        with collecting(small.client(), KEY, tmp_path, 2, **options) as (collector, workers):
            first = asyncio.run(collector.collect(1, 0))
            second = asyncio.run(collector.collect(2, 0))  # before the first is trained on
            assert [[g.prompt_index for g in b.groups] for b in (first, second)] == [[0, 1], [2, 3]]
            assert second.num_replayed == 0 and {g.step for g in second.groups} == {1}
            assert len(contents(first, workers)) == len(contents(second, workers)) == 8


def test_a_damaged_record_is_generated_again_unless_it_was_trained_on(tmp_path, caplog):
    options = {"dynamic_sampling": False, "prompts_per_step": 4}
    path = tmp_path / "step_000001.journal"
    with running(1) as [small]:
        with collecting(small.client(), KEY, tmp_path, 1, **options) as (collector, _):
            asyncio.run(collector.collect(1, 0))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # of a log-probability of the last record
        path.write_bytes(content)
        damaged = {0, 1, 2, 3} - {group.prompt_index for group in Journal.read(path)}
        caplog.clear()
        with collecting(small.client(), KEY, tmp_path, 1, **options) as (collector, _):
            batch = asyncio.run(collector.collect(1, 0))
        assert [group.prompt_index for group in batch.groups] == [0, 1, 2, 3]
        assert batch.num_replayed == 3 and len(small.asked) == 5
        [index] = damaged
        cause = f"prompt {index}'s group is damaged (its arrays are not what was written)"
        assert f"{cause}; it is generated again" in caplog.text

        # It is there now, so the damaged one is missed by nobody.
        with (
            Journal(journal_path(tmp_path, 2)),
            collecting(nowhere(), "key", tmp_path, 1, **options) as (collector, _),
        ):
            assert asyncio.run(collector.collect(1, 0)).num_replayed == 4
        path.write_bytes(content)
        with (
            collecting(nowhere(), "key", tmp_path, 1, **options) as (collector, _),
            pytest.raises(UserError) as refused,
        ):
            asyncio.run(collector.collect(1, 0))
    assert f"{cause}, and step 1 may have been trained on what the file held" in str(refused.value)


def test_the_finite_version_of_a_group_is_taken(tmp_path):
    """Wherever it was judged again: the file that is read last has the older one."""
    samples = [Sample(0, [3], [-0.5], False, reward=math.nan), Sample(1, [4], [-0.5], False)]
    group = Group(1, [3], 0, samples)
    mended = replace(group, samples=[replace(samples[0], reward=1.0), samples[1]])
    for replica, version in ((0, mended), (1, group)):
        with Journal(journal_path(tmp_path, 1, replica)) as journal:
            journal.append(version)
    assert read_step(tmp_path, 1) == {1: mended}


@ON_QUICKSTART
def test_what_a_worker_meets_is_told_by_the_collector(server, tmp_path):
    async def one_attempt(worker, url, key=KEY):
        body = {"prompt_ids": [3], "request_id": "a", "sampling_params": {"seed": 0, "n": 1}}
        return await worker.ask(url, body)

    with (
        running(1) as [small],
        collecting(small.client(), KEY, tmp_path, 2) as (collector, workers),
    ):
        remote = collector.workers[1]
        [answer] = asyncio.run(one_attempt(remote, small.url))
        assert len(answer.token_ids) == 0 and answer.versions == [(0, 0)]
        assert workers[1]._answers["a"][0].token_ids.tolist() == [3, 0]
        small.fail_next = "/megafork/generate"
        with pytest.raises(ServerError, match="/megafork/generate failed with HTTP 500: told to"):
            asyncio.run(one_attempt(remote, small.url))
        with pytest.raises(
            aiohttp.ClientConnectionError
        ):  # which the client tries again, and then calls the server lost
            asyncio.run(one_attempt(remote, "http://127.0.0.1:9"))
        stranger = RemoteWorker(remote.url, "wrong", 5, 1.0, {})
        with pytest.raises(WorkerLost, match=r"rank 5, which has its replica's responses"):
            asyncio.run(stranger.forget([1]))
    with pytest.raises(WorkerLost, match="does not answer"):  # its loop has ended
        asyncio.run(remote.forget([1]))
    client = server.client(timeout_s=60.0)
    with collecting(
        client, server.api_key, tmp_path / "slow", 2, request_timeout_s=0.001
    ) as (collector, _):  # fmt: skip
        client.timeout_s = 0.001
        with pytest.raises(UserError, match=r"rollout.request_timeout_s=0.001"):
            asyncio.run(collector.collect(1, 0))
    client.timeout_s = 60.0
    with (
        collecting(client, server.api_key, tmp_path / "broken", 2, "broken") as (collector, _),
        pytest.raises(UserError, match=r"verifiers:broken failed on .* the prompt '\d+ "),
    ):
        asyncio.run(collector.collect(1, 0))


def test_requests_that_are_given_up_end_at_the_server(tmp_path):
    with running(1) as [small], BackgroundLoop() as loop:
        small.held = True
        with collecting(small.client(), KEY, tmp_path, 2, dynamic_sampling=False) as found:
            collector, workers = found
            job = loop.submit(collector.collect(1, 0))
            wait_for(lambda: len(small.waiting) == 12)
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                job.result()
            wait_for(lambda: all(not len(client._sessions) for worker in workers
                                 for client in worker._clients.values()))  # fmt: skip
            small.held = False
            batch = loop.submit(collector.collect(1, 0)).result()
            assert len(batch.groups) == 12


@pytest.mark.slow
def test_a_run_of_two_replicas(tmp_path):
    """Each journals half of the groups; one replica learns the same from them."""
    run_dir = tmp_path / "run"
    settings = ("parallel.tp=1", "parallel.dp=2", "training.steps=2", "rollout.max_policy_lag=1")
    done = megafork(*tiny_run(run_dir, *settings, "eval.prompts=8"), mark=run_dir)
    assert done.returncode == 0, done.stderr
    for step in (1, 2):
        halves = map(Journal.read, run_dir.glob(f"rollouts/step_{step:06d}*.journal"))
        indices = [{group.prompt_index for group in half} for half in halves]
        assert len(indices) == 2 and all(indices) and not indices[0] & indices[1]
    before = journalled(run_dir)
    (run_dir / "config.toml").write_text(
        (run_dir / "config.toml").read_text().replace("dp = 2", "dp = 1")
    )
    (rows, _), (alone, _) = comparable(run_dir), replayed_in_one_go(run_dir, tmp_path / "alone")
    assert journalled(run_dir) == before
    for ours, theirs in zip(rows, alone, strict=True):
        for name, value in ours.items():
            assert value == theirs[name] or abs(value - theirs[name]) <= TOLERANCE, name
