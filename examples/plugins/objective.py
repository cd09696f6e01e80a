"""An objective of one's own: a quadratic penalty on the ratio in place of the clip.

Simple policy optimization (arXiv 2401.16025): r A - |A| / (2 epsilon) (r - 1)^2.

    megafork train config.toml algorithm.objective=objective:penalized
"""

from megafork.algorithms.objectives import LossInputs, LossOutputs


def penalized(inputs: LossInputs) -> LossOutputs:
    """Return each row's loss; the penalty pulls ratios back that have gone too far."""
    ratio_N = (inputs.logprobs_N - inputs.old_logprobs_N).exp()
    pull_N = inputs.advantages_N.abs() / (2 * inputs.clip_high) * (ratio_N - 1).square()
    far_N = (ratio_N - 1).abs() > inputs.clip_high
    return LossOutputs(
        terms_N=pull_N - ratio_N * inputs.advantages_N,
        metrics={"penalized/far_fraction": far_N},
        ratio_N=ratio_N,
    )
