"""The numbers of one step that its rollout batch tells, before anything is scored or trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from megafork.data.sample import Group, version_runs
from megafork.rollout.collector import RolloutBatch

_FAILURES = {
    "timeout": "reward/timeouts",
    "memory": "reward/out_of_memory",
    "death": "reward/worker_deaths",
    "error": "reward/verifier_errors",
}


def rollout_metrics(batch: RolloutBatch, policy_version: int) -> dict[str, float]:
    """Return the metrics of everything generated for the step, dropped groups included.

    sampling/stale_fraction: groups of the batch that an older policy version began to sample.
    sampling/tail_groups: groups that a full batch did not wait for. sampling/lost_length_mean: of
    responses that were begun but are not trained on, because their group was aborted (with what it
    had then) or is too old. sampling/length_bias: by how many tokens the mean response that is
    trained on is longer (below 0: shorter) than the mean with those; as aborted ones would have
    grown, the truth lies at or below it.
    reward/nonfinite: rewards that are no finite number and take no part in reward/mean. The counts
    of responses without a verdict: reward/timeouts, reward/out_of_memory, reward/worker_deaths,
    reward/verifier_errors; they are wrong and score 0.
    """
    # Groups carried over from the last step can fill a batch alone.
    samples = [s for group in batch.generated or batch.groups for s in group.samples]
    n = len(samples)
    failures = Counter(s.failure for s in samples)
    rewards = [s.reward for s in samples if math.isfinite(s.reward)]
    stale = sum(group.policy_version != policy_version for group in batch.groups)
    lost = batch.lost_lengths
    trained = [s.num_tokens for group in batch.groups for s in group.samples]
    trained_mean = sum(trained) / len(trained)
    return {
        "sampling/groups_dropped": batch.num_dropped,
        "sampling/groups_stale": batch.num_stale,
        "sampling/stale_fraction": stale / len(batch.groups),
        "sampling/tail_groups": batch.num_tail,
        "sampling/lost_length_mean": sum(lost) / (len(lost) or math.nan),
        "sampling/length_bias": trained_mean - sum(trained + lost) / len(trained + lost),
        "reward/mean": sum(rewards) / (len(rewards) or math.nan),
        "reward/nonfinite": n - len(rewards),
        **{name: failures[kind] for kind, name in _FAILURES.items()},
        "reward/accuracy": sum(s.accuracy for s in samples) / n,
        "response/length_mean": sum(s.num_tokens for s in samples) / n,
        "response/truncated_fraction": sum(s.truncated for s in samples) / n,
    }


def lag_metrics(groups: Sequence[Group], policy_version: int) -> dict[str, float]:
    """Return how many policy versions the tokens are behind the one that trains on them.

    lag/in_flight_fraction: responses whose weights changed while they were sampled.
    """
    tokens, behind, largest, in_flight, responses = 0, 0, 0, 0, 0
    for group in groups:
        for sample in group.samples:
            runs = version_runs(sample.versions, group.policy_version, sample.num_tokens)
            lags = [(policy_version - version, count) for version, count in runs if count]
            tokens += sample.num_tokens
            behind += sum(lag * count for lag, count in lags)
            largest = max([largest, *(lag for lag, _ in lags)])
            in_flight += len(lags) > 1
            responses += 1
    return {
        "lag/mean": behind / tokens,
        "lag/max": largest,
        "lag/in_flight_fraction": in_flight / responses,
    }


def overlap_metrics(batch: RolloutBatch, seconds: dict[str, float]) -> dict[str, float]:
    """Return how much of the batch's generation the step did not wait for.

    time/generate is what it waited; generation may have begun before. overlap/gain: the step's
    time, had it waited for all of the generation, over its time. Generation and training slow each
    other down where they share processors, so it is an upper bound.
    """
    hidden = max(0.0, batch.seconds - seconds["generate"])
    return {
        "overlap/generation_seconds": batch.seconds,
        "overlap/hidden_seconds": hidden,
        "overlap/gain": (seconds["total"] + hidden) / seconds["total"],
    }
