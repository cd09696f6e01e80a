"""Dynamic sampling with a real server: who is admitted, what is carried, when it gives up."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from megafork.config import DataConfig, RewardConfig, RolloutConfig
from megafork.data.prompts import PromptStream, read_prompts
from megafork.data.token_table import token_table
from megafork.data.tokenizer import HfTokenizer
from megafork.errors import UserError
from megafork.rollout.batch_metrics import rollout_metrics
from megafork.rollout.client import RolloutClient
from megafork.rollout.collector import Collector
from megafork.rollout.journal import Journal, read_step
from megafork.rollout.judging import Judging
from megafork.rollout.sampling import Sampling
from megafork.rollout.step_journals import StepJournals
from megafork.verifiers.verifier import Judge
from tests.helpers.background import BackgroundLoop
from tests.helpers.blocking import Blocking
from tests.helpers.commands import QUICKSTART
from tests.helpers.shared_servers import ON_QUICKSTART, quickstart_server
from tests.helpers.verifiers import by_spelling

pytestmark = ON_QUICKSTART
VERIFIERS = "tests.helpers.verifiers"


JUDGES: list[Judge] = []


@pytest.fixture(autouse=True)
def no_judge_is_left():
    yield
    while JUDGES:
        JUDGES.pop().close()


@pytest.fixture
def server(tmp_path_factory):
    with quickstart_server(tmp_path_factory) as running:
        yield running


def make_collector(server, folder, verifier, reward=None, **rollout):
    data = DataConfig(train=str(QUICKSTART / "data" / "train.jsonl"))
    tokenizer = HfTokenizer(QUICKSTART / "model")
    settings = {"prompts_per_step": 12, "group_size": 4, "max_response_tokens": 32} | rollout
    config = RolloutConfig(**settings)
    reward = {"workers": 1} | (reward or {})
    judged = RewardConfig(verifier=f"{VERIFIERS}:{verifier}", environment=["MENDED"], **reward)
    JUDGES.append(Judge(judged))
    return Collector(
        fleet=server.client(timeout_s=config.request_timeout_s),
        prompts=PromptStream(read_prompts(data.train, data, tokenizer.encode), seed=0),
        judging=Judging(tokenizer, JUDGES[-1], config.max_response_tokens),
        journals=StepJournals(folder),
        rollout=config,
        sampling=Sampling(max_tokens=32, stop_token_ids=(1,)),
    )


def collect(collector, step, trained_by=0):
    """The server has version 0 of the weights, which it loaded itself."""
    return asyncio.run(collector.collect(step, trained_by))


def test_the_weights_that_a_server_loaded_itself_are_version_0(server):
    assert Blocking(server.client()).weight_version() == 0


def indices(groups):
    return [group.prompt_index for group in groups]


def test_groups_are_admitted_in_prompt_order_and_the_surplus_is_carried(server, tmp_path):
    collector = make_collector(server, tmp_path, "some_prompts_only", max_policy_lag=1)
    first = collect(collector, step=1)
    assert len(first.groups) == 12
    assert all(group.has_signal for group in first.groups)
    mixed = [group for group in first.generated if group.has_signal]
    assert indices(mixed) == sorted(indices(mixed))
    assert indices(first.groups) == indices(mixed)[:12]
    assert first.num_dropped == len(first.generated) - len(mixed) > 0
    carried = indices(mixed)[12:]
    assert indices(collector.carried) == carried

    second = collect(collector, step=2, trained_by=1)
    assert indices(second.groups)[: len(carried)] == carried[:12]
    assert min(indices(second.generated), default=10**9) > max(indices(first.generated))
    uids = [s.uid for batch in (first, second) for g in batch.generated for s in g.samples]
    assert len(set(uids)) == len(uids)
    journalled = Journal.read(tmp_path / "step_000001.journal")
    assert sorted(indices(journalled)) == indices(first.generated)


def test_a_carried_group_that_is_too_old_is_dropped(server, tmp_path):
    collector = make_collector(server, tmp_path, "some_prompts_only", max_policy_lag=1)
    first = collect(collector, step=1)
    old, older = (replace(g, policy_version=-i) for i, g in enumerate(first.groups[:2]))
    collector.carried = [old, older]  # whether any were left over is chance
    batch = collect(collector, step=2, trained_by=1)
    assert batch.num_stale == 1
    assert old in batch.groups and older not in batch.groups


def test_strictly_on_policy_nothing_is_carried(server, tmp_path):
    before = make_collector(server, tmp_path / "before", "by_spelling")
    collector = make_collector(server, tmp_path, "by_spelling", max_sampling_rounds=2)
    collector.carried = collect(before, step=1).groups[:2]
    message = r"only 0 of rollout.prompts_per_step=12 .* (\d+) were too old"
    with pytest.raises(UserError, match=message):
        collect(collector, step=2, trained_by=1)  # the server was not updated


# 25 times what the server runs at once, of 48 tokens each: seconds of work are left when the
# first two groups are done.
LONG_TAIL = {
    "prompts_per_step": 2,
    "group_size": 8,
    "oversampling": 100.0,
    "dynamic_sampling": False,
}
ENDLESS = Sampling(max_tokens=48)


def far_away(collector):
    """A client of no server: whatever needs one fails."""
    collector.fleet = RolloutClient("http://127.0.0.1:9", "key")
    return collector


def tokens(batch):
    """Of the batch that is trained on: each sample's ids and log-probabilities."""
    table = token_table(batch.groups)
    return table.token_R.tolist(), table.rollout_logprob_R.tolist()


def test_a_full_batch_can_abort_its_tail(server, tmp_path):
    settings = LONG_TAIL | {"tail": "abort"}
    collector = make_collector(server, tmp_path, "by_spelling", **settings)
    collector.sampling = ENDLESS
    batch = collect(collector, step=1)
    assert len(batch.groups) == 2 and batch.num_tail > 0
    assert batch.num_tail + len(batch.generated) == 200
    assert 1 <= min(batch.lost_lengths) <= max(batch.lost_lengths) <= 48
    assert len(batch.lost_lengths) < 8 * batch.num_tail  # most had not begun
    assert collector.pending == []
    again = make_collector(server, tmp_path, "by_spelling", **settings)
    replayed = collect(far_away(again), step=1)
    assert replayed.groups == batch.groups
    assert tokens(replayed) == tokens(batch)
    assert replayed.generated == batch.generated
    assert replayed.num_tail == batch.num_tail
    assert sorted(replayed.lost_lengths) == sorted(batch.lost_lengths)
    assert again.state() == collector.state() == batch.state


def test_what_the_server_aborts_by_itself_is_no_group(server, tmp_path):
    """As when it is told to end: it answers what it has, as if nothing were wrong."""
    settings = {"prompts_per_step": 60, "group_size": 8, "dynamic_sampling": False}
    collector = make_collector(server, tmp_path, "by_spelling", **settings)
    collector.sampling = ENDLESS
    path = tmp_path / "step_000001.journal"
    with BackgroundLoop() as background:
        collecting = background.submit(collector.collect(1, 0))
        while not (path.exists() and path.stat().st_size):
            time.sleep(0.01)
        Blocking(collector.fleet).pause("abort")
        with pytest.raises(UserError, match="aborted responses that nobody asked it to"):
            collecting.result()
        Blocking(collector.fleet).resume()
    groups = Journal.read(path)
    assert 0 < len(groups) < 60
    assert all(len(sample.token_ids) for group in groups for sample in group.samples)
    again = make_collector(server, tmp_path, "by_spelling", **settings)
    assert len(collect(again, step=1).groups) == 60


def test_a_full_batch_can_carry_its_tail(server, tmp_path):
    """What is left is still generated by the same requests and comes first in the next batch."""
    settings = LONG_TAIL | {"tail": "carry", "max_policy_lag": 1, "surplus": "drop"}
    collector = make_collector(server, tmp_path, "by_spelling", **settings)
    collector.sampling = ENDLESS
    with BackgroundLoop() as background:
        first = background.submit(collector.collect(1, 0)).result()
        left = first.state["pending"]
        assert left and len(left) == first.num_tail
        second = background.submit(collector.collect(2, 0)).result()
    known = set(indices(first.generated)) | set(left)
    assert set(left) <= set(indices(second.generated)) | set(second.state["pending"])
    assert set(indices(second.generated)) & set(left)
    assert not set(indices(second.generated)) & set(indices(first.generated))
    assert min(set(indices(second.generated)) - known, default=200) == 200
    again = make_collector(server, tmp_path, "by_spelling", **settings)
    for step, batch in ((1, first), (2, second)):
        replayed = collect(far_away(again), step=step)
        assert replayed.groups == batch.groups
        assert tokens(replayed) == tokens(batch)
        assert replayed.state == batch.state


def test_a_tail_that_the_server_lost_is_asked_for_again(server, tmp_path):
    settings = LONG_TAIL | {"tail": "carry", "max_policy_lag": 1, "surplus": "drop"}
    collector = make_collector(server, tmp_path, "by_spelling", **settings)
    collector.sampling = ENDLESS
    with BackgroundLoop() as background:
        first = background.submit(collector.collect(1, 0)).result()
        background.submit(collector.cancel_running()).result()
        second = background.submit(collector.collect(2, 0)).result()
    left = set(first.state["pending"])
    assert left <= set(indices(second.generated)) | set(second.state["pending"])


def test_the_surplus_can_be_dropped(server, tmp_path):
    collector = make_collector(server, tmp_path, "some_prompts_only", surplus="drop")
    collect(collector, step=1)
    assert collector.carried == []


def test_without_dynamic_sampling_every_group_is_used(server, tmp_path):
    collector = make_collector(server, tmp_path, "never", dynamic_sampling=False)
    batch = collect(collector, step=1)
    assert indices(batch.groups) == list(range(12))
    assert batch.num_dropped == 0


def test_long_responses_lose_reward_but_stay_right(server, tmp_path):
    """What was journalled is replayed as it was, whatever the setting is by then."""
    shaping = {"overlong_buffer_tokens": 30, "overlong_penalty": 0.5}
    collector = make_collector(server, tmp_path, "by_spelling", shaping)
    batch = collect(collector, step=1)
    samples = [s for g in Journal.read(tmp_path / "step_000001.journal") for s in g.samples]
    assert len(samples) == 4 * len(batch.generated)
    for sample in samples:
        verdict = by_spelling("", HfTokenizer(QUICKSTART / "model").decode(sample.token_ids), "")
        lost = 0.5 * max(0, len(sample.token_ids) - 2) / 30
        assert sample.accuracy == verdict
        assert sample.reward == pytest.approx(verdict - lost)
    assert len({sample.reward for sample in samples}) > 2
    assert all(group.has_signal for group in batch.groups)
    again = collect(make_collector(server, tmp_path, "by_spelling"), step=1)
    assert again.num_replayed == len(batch.generated)
    assert again.groups == batch.groups


def test_prompts_without_signal_end_in_a_message(server, tmp_path):
    collector = make_collector(server, tmp_path, "never", max_sampling_rounds=2)
    with pytest.raises(UserError, match=r"only 0 of rollout.prompts_per_step=12 groups had both"):
        collect(collector, step=1)


def test_a_verifier_that_always_fails_ends_it_and_is_named(server, tmp_path):
    collector = make_collector(server, tmp_path, "broken")
    message = r"verifiers:broken failed on (\d+) of \1 responses .*ValueError.* the prompt '\d+ "
    with pytest.raises(UserError, match=message):
        collect(collector, step=1)


def test_a_verifier_that_fails_sometimes_is_counted_and_replayed(server, tmp_path):
    collector = make_collector(server, tmp_path, "sometimes_broken")
    batch = collect(collector, step=1)
    samples = [s for g in Journal.read(tmp_path / "step_000001.journal") for s in g.samples]
    failed = [sample for sample in samples if sample.failure == "error"]
    texts = [HfTokenizer(QUICKSTART / "model").decode(sample.token_ids) for sample in samples]
    assert [s.failure == "error" for s in samples] == [len(text) % 5 == 0 for text in texts]
    assert failed and all(sample.reward == sample.accuracy == 0.0 for sample in failed)
    assert rollout_metrics(batch, 0)["reward/verifier_errors"] == len(failed)
    assert rollout_metrics(batch, 0)["reward/timeouts"] == 0
    again = collect(far_away(make_collector(server, tmp_path, "by_spelling")), step=1)
    assert again.generated == batch.generated  # a mended verifier changes nothing that was taken


def test_a_mended_verifier_judges_again_what_the_run_ended_for(server, tmp_path, monkeypatch):
    mended = tmp_path / "mended"
    monkeypatch.setenv("MENDED", str(mended))
    with pytest.raises(UserError, match="not mended"):
        collect(make_collector(server, tmp_path, "broken_unless_mended"), step=1)
    mended.touch()
    batches = []
    for _ in range(2):
        collector = make_collector(server, tmp_path, "broken_unless_mended")
        batches.append(collect(collector, step=1))
        assert all(s.failure is None for g in batches[-1].generated for s in g.samples)
        mended.unlink(missing_ok=True)  # the second batch is the journal's
        collector.judging.judge.close()
    assert batches[0].num_replayed > 0 and batches[1].groups == batches[0].groups


def test_seeded_rollouts_repeat(server, tmp_path):
    found = []
    for name in ("a", "b"):
        collect(make_collector(server, tmp_path / name, "by_spelling", seeded=True), 1)
        groups = read_step(tmp_path / name, 1).items()
        found.append({i: sorted(tuple(s.token_ids) for s in g.samples) for i, g in groups})
    assert found[0] == found[1]


def test_a_request_that_takes_too_long_names_the_setting(server, tmp_path):
    collector = make_collector(server, tmp_path, "by_spelling", request_timeout_s=0.001)
    with pytest.raises(UserError, match=r"request_timeout_s=0.001"):
        collect(collector, step=1)
