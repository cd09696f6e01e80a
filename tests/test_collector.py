"""Dynamic sampling with a real server: who is admitted, what is carried, when it gives up."""

from __future__ import annotations

import asyncio

import pytest

from megafork.config import DataConfig, RewardConfig, RolloutConfig
from megafork.data.prompts import PromptStream, read_prompts
from megafork.data.tokenizer import HfTokenizer
from megafork.errors import UserError
from megafork.rewards.verifier import Judge
from megafork.rollout.collector import Collector
from megafork.rollout.journal import Journal
from megafork.rollout.sampling import Sampling
from megafork.rollout.vllm_server import VllmServer
from tests.commands import QUICKSTART

VERIFIERS = "tests.test_collector"


def by_spelling(prompt: str, response: str, answer: str) -> float:
    """Right for responses of even length: most groups are mixed."""
    return float(len(response) % 2 == 0)


def some_prompts_only(prompt: str, response: str, answer: str) -> float:
    """Every third prompt (by its answer) can be solved; a reward below 1 is no accuracy."""
    return by_spelling(prompt, response, answer) if int(answer) % 3 == 0 else 0.5


def never(prompt: str, response: str, answer: str) -> float:
    return 0.0


def broken(prompt: str, response: str, answer: str) -> float:
    return float(response)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 128}
    with VllmServer(QUICKSTART / "model", log_path=log, **options) as running:
        yield running


def make_collector(server, folder, verifier, reward=None, **rollout):
    data = DataConfig(train=str(QUICKSTART / "data" / "train.jsonl"))
    tokenizer = HfTokenizer(QUICKSTART / "model")
    settings = {"prompts_per_step": 12, "group_size": 4, "max_response_tokens": 32} | rollout
    config = RolloutConfig(**settings)
    return Collector(
        client=server.client(timeout_s=config.request_timeout_s),
        prompts=PromptStream(read_prompts(data.train, data, tokenizer.encode), seed=0),
        tokenizer=tokenizer,
        judge=Judge(RewardConfig(verifier=f"{VERIFIERS}:{verifier}", **(reward or {}))),
        rollout=config,
        sampling=Sampling(max_tokens=32, stop_token_ids=(1,)),
        journal_dir=folder,
    )


def collect(collector, step, policy_version):
    return asyncio.run(collector.collect(step, policy_version))


def indices(groups):
    return [group.prompt_index for group in groups]


def test_groups_are_admitted_in_prompt_order_and_the_surplus_is_carried(server, tmp_path):
    collector = make_collector(server, tmp_path, "some_prompts_only")
    first = collect(collector, step=1, policy_version=5)
    assert len(first.groups) == 12
    assert all(group.has_signal for group in first.groups)
    mixed = [group for group in first.generated if group.has_signal]
    assert indices(mixed) == sorted(indices(mixed))
    assert indices(first.groups) == indices(mixed)[:12]
    assert first.num_dropped == len(first.generated) - len(mixed) > 0
    carried = indices(mixed)[12:]
    assert indices(collector.carried) == carried

    second = collect(collector, step=2, policy_version=6)
    assert indices(second.groups)[: len(carried)] == carried[:12]
    assert min(indices(second.generated), default=10**9) > max(indices(first.generated))
    uids = [s.uid for batch in (first, second) for g in batch.generated for s in g.samples]
    assert len(set(uids)) == len(uids)
    journalled = Journal.read(tmp_path / "step_000001.jsonl")
    assert sorted(indices(journalled)) == indices(first.generated)


def test_a_carried_group_that_is_too_old_is_dropped(server, tmp_path):
    collector = make_collector(server, tmp_path, "some_prompts_only", max_staleness=1)
    first = collect(collector, step=1, policy_version=5)
    collector.carried = first.groups[:2]  # whether any were left over is chance
    batch = collect(collector, step=2, policy_version=7)
    assert {group.policy_version for group in batch.groups} == {7}


def test_the_surplus_can_be_dropped(server, tmp_path):
    collector = make_collector(server, tmp_path, "some_prompts_only", surplus="drop")
    collect(collector, step=1, policy_version=1)
    assert collector.carried == []


def test_without_dynamic_sampling_every_group_is_used(server, tmp_path):
    collector = make_collector(server, tmp_path, "never", dynamic_sampling=False)
    batch = collect(collector, step=1, policy_version=1)
    assert indices(batch.groups) == list(range(12))
    assert batch.num_dropped == 0


def test_long_responses_lose_reward_but_stay_right(server, tmp_path):
    """What was journalled is replayed as it was, whatever the setting is by then."""
    shaping = {"overlong_buffer_tokens": 30, "overlong_penalty": 0.5}
    collector = make_collector(server, tmp_path, "by_spelling", shaping)
    batch = collect(collector, step=1, policy_version=1)
    samples = [sample for group in batch.generated for sample in group.samples]
    for sample in samples:
        verdict = by_spelling("", collector.tokenizer.decode(sample.token_ids), "")
        lost = 0.5 * max(0, len(sample.token_ids) - 2) / 30
        assert sample.accuracy == verdict
        assert sample.reward == pytest.approx(verdict - lost)
    assert len({sample.reward for sample in samples}) > 2
    assert all(group.has_signal for group in batch.groups)
    again = collect(make_collector(server, tmp_path, "by_spelling"), step=1, policy_version=1)
    assert again.num_replayed == len(batch.generated)
    assert again.groups == batch.groups


def test_prompts_without_signal_end_in_a_message(server, tmp_path):
    collector = make_collector(server, tmp_path, "never", max_sampling_rounds=2)
    with pytest.raises(UserError, match=r"only 0 of rollout.prompts_per_step=12 groups had both"):
        collect(collector, step=1, policy_version=1)


def test_a_verifier_that_fails_is_named_with_the_prompt(server, tmp_path):
    collector = make_collector(server, tmp_path, "broken")
    message = r"reward.verifier=tests.test_collector:broken failed on the prompt '\d+ .*ValueError"
    with pytest.raises(UserError, match=message):
        collect(collector, step=1, policy_version=1)


def test_seeded_rollouts_repeat(server, tmp_path):
    batches = [
        collect(make_collector(server, tmp_path / name, "by_spelling", seeded=True), 1, 1)
        for name in ("a", "b")
    ]
    first, second = (
        [sorted(tuple(s.token_ids) for s in g.samples) for g in b.generated] for b in batches
    )
    assert first == second


def test_a_request_that_takes_too_long_names_the_setting(server, tmp_path):
    collector = make_collector(server, tmp_path, "by_spelling", request_timeout_s=0.001)
    with pytest.raises(UserError, match=r"request_timeout_s=0.001"):
        collect(collector, step=1, policy_version=1)
