"""The charts of a run's metrics; what the run has logged decides which of them are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """Curves over the steps with one unit. Those of which a run has no value are left out."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    """(metric, what it is called)"""
    is_log: bool = False
    is_from_zero: bool = True
    """whether the scale of values that are all positive begins at 0"""
    needs: tuple[str, ...] = ()
    """metrics of which one has to be above 0 somewhere: they are 0 in runs without such a thing"""
    note: str = ""


CHARTS = (
    Chart(
        "Accuracy",
        "share of responses",
        (
            ("reward/accuracy", "training prompts (before dynamic sampling)"),
            ("eval/accuracy", "held-out prompts"),
        ),
        note="Training: of all that was generated, before dynamic sampling drops groups. Bars: the "
        "95% interval of held-out accuracy.",
    ),
    Chart("Reward", "mean reward", (("reward/mean", "reward"),)),
    Chart(
        "Entropy",
        "mean entropy (nats)",
        (
            ("forking/mean_entropy_inside", "forking tokens"),
            ("entropy/mean", "all tokens"),
            ("forking/mean_entropy_outside", "other tokens"),
        ),
    ),
    Chart(
        "Threshold and percentiles of the entropy",
        "entropy (nats)",
        (
            ("entropy/threshold", "threshold"),
            ("entropy/p95", "95th percentile"),
            ("entropy/p80", "80th percentile"),
            ("entropy/p50", "median"),
        ),
    ),
    Chart(
        "Tokens that are kept",
        "share of tokens",
        (
            ("forking/kept_fraction", "kept"),
            ("forking/wanted_fraction", "asked for"),
            ("forking/rho", "rho"),
        ),
    ),
    Chart(
        "Forking tokens that the reference selects too",
        "share of forking tokens",
        (("forking/overlap_initial", "overlap"),),
    ),
    Chart(
        "Length",
        "tokens",
        (
            ("response/length_mean", "mean response"),
            ("sampling/lost_length_mean", "responses not trained on"),
        ),
    ),
    Chart("Cut responses", "share of responses", (("response/truncated_fraction", "truncated"),)),
    Chart("Policy loss", "loss", (("loss/policy", "policy"),)),
    Chart(
        "Other terms of the loss",
        "loss",
        (("loss/kl", "KL"), ("loss/entropy_bonus", "entropy bonus")),
    ),
    Chart("Gradient norm", "norm", (("grad_norm", "policy"), ("critic/grad_norm", "critic"))),
    Chart("Learning rate", "learning rate", (("lr", "policy"), ("critic/lr", "critic"))),
    Chart(
        "Clipped ratios",
        "share of tokens with a gradient",
        (
            ("ratio/clip_low_fraction", "at 1 - clip_low"),
            ("ratio/clip_high_fraction", "at 1 + clip_high"),
            ("ratio/clip_dual_fraction", "at clip_dual"),
        ),
    ),
    Chart(
        "Trainer against engine",
        "nats, log scale",
        (
            ("mismatch/max_difference", "largest difference"),
            ("mismatch/mean_difference", "mean difference"),
            ("mismatch/kl", "KL"),
            ("lag/kl", "KL, tokens of older policies"),
        ),
        is_log=True,
        note="Of log-probabilities; what is not above 0 has no place on the scale.",
    ),
    Chart("KL to the reference policy", "nats", (("kl/reference", "KL"),)),
    Chart(
        "Corrected tokens",
        "tokens",
        (("mismatch/truncated_tokens", "truncated"), ("mismatch/masked_tokens", "masked")),
        needs=("mismatch/truncated_tokens", "mismatch/masked_tokens"),
    ),
    Chart("Critic's loss", "loss", (("loss/value", "value loss"),)),
    Chart(
        "Critic",
        "share",
        (
            ("value/explained_variance", "explained variance"),
            ("value/clip_fraction", "clipped values"),
        ),
    ),
    Chart(
        "Values and advantages",
        "reward",
        (
            ("value/mean", "mean value"),
            ("advantage/mean", "mean advantage"),
            ("advantage/std", "spread of advantages"),
        ),
    ),
    Chart(
        "Groups that were not trained on",
        "groups",
        (
            ("sampling/groups_dropped", "all right or all wrong"),
            ("sampling/groups_stale", "too old"),
            ("sampling/tail_groups", "not waited for"),
        ),
    ),
    Chart(
        "Skipped updates",
        "updates",
        (("update/skipped", "skipped"), ("update/empty", "every response cut")),
    ),
    Chart(
        "Rollout servers",
        "servers",
        (
            ("rollout/servers", "that generate"),
            ("rollout/servers_lost", "lost in the step"),
            ("rollout/servers_replaced", "joined again in the step"),
        ),
        needs=("rollout/servers_lost",),
    ),
    Chart(
        "Throughput",
        "tokens per second",
        (
            ("throughput/tokens_per_second", "trained on"),
            ("throughput/generated_tokens_per_second", "generated"),
        ),
    ),
    Chart(
        "Lag",
        "policy versions",
        (("lag/max", "largest"), ("lag/mean", "mean")),
        needs=("lag/max",),
    ),
    Chart(
        "Generation ahead",
        "seconds",
        (
            ("overlap/generation_seconds", "generation"),
            ("overlap/hidden_seconds", "not waited for"),
        ),
        needs=("overlap/hidden_seconds",),
    ),
)
OVERVIEW = tuple(
    chart
    for chart in CHARTS
    if chart.title in ("Accuracy", "Entropy", "Threshold and percentiles of the entropy", "Length")
)
"""the charts of curves.png and training.png"""
