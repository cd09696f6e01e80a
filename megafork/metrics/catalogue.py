"""The metrics that a run logs, and their charts; what a run has logged decides which are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that a run logs; plug-ins may add others. The metrics reference is made of it."""

    name: str
    """as in metrics.jsonl or eval.jsonl; N stands for a number"""
    unit: str
    meaning: str


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


METRICS = (
    Metric("step", "count", "the rollout batch, from 1; 0 in eval.jsonl is before training"),
    Metric("tokens", "tokens", "response tokens of the batch that is trained on"),
    Metric(
        "policy_version",
        "version",
        "the version of the policy after the step; the first push is 1",
    ),
    Metric("lr", "rate", "learning rate of the step's first update"),
    Metric(
        "grad_norm",
        "norm",
        "global norm of the gradient before it is clipped, mean over the updates",
    ),
    Metric("loss/policy", "loss", "policy's term of the loss, mean over the updates"),
    Metric("loss/kl", "loss", "the KL's term with its coefficient, where there is one"),
    Metric(
        "loss/entropy_bonus",
        "loss",
        "the entropy bonus' term with its coefficient, where there is one",
    ),
    Metric("loss/value", "loss", "the critic's loss, mean over its updates"),
    Metric(
        "reward/mean",
        "reward",
        "mean reward of all that was generated, before dynamic sampling drops groups",
    ),
    Metric("reward/accuracy", "share", "right responses among all that was generated"),
    Metric(
        "reward/nonfinite",
        "responses",
        "rewards that are no finite number; they are not in reward/mean",
    ),
    Metric(
        "reward/timeouts",
        "responses",
        "no verdict: the verifier took more than reward.timeout_s",
    ),
    Metric(
        "reward/out_of_memory",
        "responses",
        "no verdict: the verifier wanted more than reward.memory_mib",
    ),
    Metric("reward/worker_deaths", "responses", "no verdict: the verifier's process ended"),
    Metric(
        "reward/verifier_errors",
        "responses",
        "no verdict: the verifier raised, or gave no number",
    ),
    Metric(
        "response/length_mean",
        "tokens",
        "mean length of all that was generated, the end token included",
    ),
    Metric(
        "response/truncated_fraction",
        "share",
        "responses that were cut at rollout.max_response_tokens",
    ),
    Metric(
        "entropy/mean",
        "nats",
        "mean entropy over the loss tokens, of the policy that they are selected by",
    ),
    Metric("entropy/p50", "nats", "median of the entropies, exact"),
    Metric("entropy/p80", "nats", "80th percentile, exact"),
    Metric("entropy/p95", "nats", "95th percentile, exact"),
    Metric(
        "entropy/threshold",
        "nats",
        "threshold of the selection, mean over the thresholds of the step",
    ),
    Metric("forking/rho", "share", "the fraction that was asked for at this step"),
    Metric(
        "forking/wanted_fraction",
        "share",
        "the fraction that whole tokens allow: ceil(rho N) / N",
    ),
    Metric("forking/kept_fraction", "share", "the fraction that was kept, ties included"),
    Metric(
        "forking/boundary_fraction",
        "share",
        "tokens that rounding at another layout could move over the threshold",
    ),
    Metric("forking/mean_entropy_inside", "nats", "mean entropy of the selected tokens"),
    Metric("forking/mean_entropy_outside", "nats", "mean entropy of the other loss tokens"),
    Metric(
        "forking/overlap_initial",
        "share",
        "selected tokens that the reference's entropies select too",
    ),
    Metric(
        "ratio/clip_low_fraction",
        "share",
        "tokens with a gradient whose ratio the lower clip decides",
    ),
    Metric(
        "ratio/clip_high_fraction",
        "share",
        "tokens with a gradient whose ratio the upper clip decides",
    ),
    Metric(
        "ratio/clip_dual_fraction",
        "share",
        "tokens with a gradient whose ratio algorithm.clip_dual bounds",
    ),
    Metric(
        "ratio/first_update_max_offset",
        "ratio",
        "largest distance of a ratio from 1 before the first update; 0.0 where the trainer scores",
    ),
    Metric(
        "mismatch/kl",
        "nats",
        "KL(engine, trainer) by the k3 estimate, over tokens that the current weights sampled",
    ),
    Metric("mismatch/k1", "nats", "the same by the k1 estimate: the mean difference with its sign"),
    Metric(
        "mismatch/mean_difference",
        "nats",
        "mean size of the difference between the engine's and the trainer's log-probabilities",
    ),
    Metric("mismatch/max_difference", "nats", "the largest such difference"),
    Metric(
        "mismatch/large_fraction",
        "share",
        "tokens that differ by more than mismatch.large_difference",
    ),
    Metric(
        "mismatch/truncated_tokens",
        "tokens",
        "selected tokens with an advantage whose weight a correction cut",
    ),
    Metric(
        "mismatch/masked_tokens",
        "tokens",
        "selected tokens with an advantage that a correction took out",
    ),
    Metric("kl/reference", "nats", "KL(policy, reference) by the k3 estimate, over kl.tokens"),
    Metric("update/skipped", "updates", "mini-batches without an update: NaN, infinity or a spike"),
    Metric(
        "update/empty",
        "updates",
        "mini-batches without an update because every response was cut",
    ),
    Metric("update/head_rows", "tokens", "rows that the head ran on in the updates"),
    Metric(
        "lag/mean",
        "versions",
        "policy versions by which a token is behind the one that trains on it, mean",
    ),
    Metric("lag/max", "versions", "the largest such lag"),
    Metric(
        "lag/in_flight_fraction",
        "share",
        "responses whose weights changed while they were sampled",
    ),
    Metric("lag/kl", "nats", "as mismatch/kl, over tokens that older versions sampled"),
    Metric("sampling/groups_dropped", "groups", "groups that were all right or all wrong"),
    Metric("sampling/groups_stale", "groups", "groups that were too old, dropped"),
    Metric(
        "sampling/stale_fraction",
        "share",
        "groups of the batch that an older version began to sample",
    ),
    Metric("sampling/tail_groups", "groups", "groups that a full batch did not wait for"),
    Metric(
        "sampling/lost_length_mean",
        "tokens",
        "mean length of responses that were begun and not trained on",
    ),
    Metric(
        "sampling/length_bias",
        "tokens",
        "by how much the mean trained response is longer than with the lost ones; below 0, shorter",
    ),
    Metric("rollout/servers", "servers", "servers that generate"),
    Metric("rollout/servers_lost", "servers", "servers lost in the step"),
    Metric("rollout/servers_replaced", "servers", "servers that joined again in the step"),
    Metric("throughput/tokens_per_second", "tokens/s", "tokens trained on over the step's seconds"),
    Metric(
        "throughput/generated_tokens_per_second",
        "tokens/s",
        "tokens generated over the step's seconds",
    ),
    Metric("overlap/generation_seconds", "s", "seconds of the batch's generation"),
    Metric("overlap/hidden_seconds", "s", "of these, what the step did not wait for"),
    Metric(
        "overlap/gain",
        "ratio",
        "the step's time, had it waited, over its time; an upper bound",
    ),
    Metric("time/generate", "s", "waiting for the batch"),
    Metric(
        "time/reward",
        "s",
        "seconds of verifiers, added up over the responses; they run beside the generation",
    ),
    Metric("time/exchange", "s", "rows on their way to the ranks"),
    Metric("time/reference", "s", "scoring by the reference policy"),
    Metric("time/value", "s", "the critic's values"),
    Metric("time/score", "s", "scoring by the policy"),
    Metric("time/update", "s", "forward, backward and optimizer"),
    Metric("time/sync", "s", "weights on their way to the servers"),
    Metric("time/offload", "s", "from the device to the host, colocated"),
    Metric("time/onload", "s", "from the host to the device, colocated"),
    Metric("time/eval", "s", "the evaluation on held-out prompts; not in time/total"),
    Metric("time/total", "s", "the step, from its batch to its push"),
    Metric("value/mean", "reward", "mean of the critic's values"),
    Metric("value/explained_variance", "share", "variance of the returns that the values explain"),
    Metric(
        "value/clip_fraction",
        "share",
        "values that critic.clip_value clips, among those that are learnt",
    ),
    Metric("advantage/mean", "reward", "mean advantage before whitening"),
    Metric("advantage/std", "reward", "standard deviation of the advantages before whitening"),
    Metric(
        "critic/grad_norm",
        "norm",
        "global norm of the critic's gradient, mean over its updates",
    ),
    Metric("critic/lr", "rate", "learning rate of the critic's first update in the step"),
    Metric("eval/accuracy", "share", "held-out accuracy: avg@k with k = eval.samples"),
    Metric("eval/accuracy_low", "share", "lower end of its 95% interval over problems"),
    Metric("eval/accuracy_high", "share", "upper end of its 95% interval over problems"),
    Metric("eval/pass@N", "share", "pass@N for N = 2, 4, ... up to eval.samples"),
    Metric("eval/problems", "count", "held-out problems"),
    Metric("eval/samples", "count", "held-out responses"),
    Metric("eval/length_mean", "tokens", "mean length of the held-out responses"),
    Metric("eval/truncated_fraction", "share", "held-out responses that were cut"),
)
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
