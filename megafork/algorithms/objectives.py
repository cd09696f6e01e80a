"""The policy's objectives: functions from the rows of a micro-batch to their terms of the loss.

    ppo     -min(r A, clip(r) A), r the token's ratio (GRPO, arXiv 2402.03300; DAPO, 2503.14476)
    gspo    the same with the sequence's, the geometric mean of its tokens' (arXiv 2507.18071)
    cispo   -sg[clip(r)] A log pi, sg: a constant (arXiv 2506.13585)

The forking mask says which tokens carry a gradient; it changes no denominator and no ratio. For
ppo and cispo the other tokens have no term (arXiv 2506.01939, eq. 5). For gspo they have none
either, but the sequence's ratio stays that of the whole response, selected or not: the loss is that
of GSPO-token (section 4.3 there), whose gradient sums s_i A grad log pi over the tokens.

`algorithm.objective = "MODULE:FUNCTION"` names a function of one's own, with the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.mismatch import sums_of_sequences
from megafork.algorithms.surrogates import (
    Ratio,
    clipped_surrogate,
    clipped_weight_surrogate,
    token_ratio,
)
from megafork.config.learning import OBJECTIVES
from megafork.errors import UserError
from megafork.system.plugins import load_plugin

Rows = Literal["gradient", "sequence", "all"]
"""The rows whose log-probability an objective needs: those that carry a gradient; all loss tokens
of a sequence that has such a row; all loss tokens, those without an advantage too"""


@dataclass(frozen=True)
class LossInputs:
    """The N rows that an objective asked for, of one micro-batch on one rank."""

    logprobs_N: Tensor
    """float32, of the policy that is trained; differentiable"""
    old_logprobs_N: Tensor
    """float32, the ratio's denominator (see algorithm.old_logprobs)"""
    rollout_logprobs_N: Tensor
    """float32, of the engine that sampled"""
    ref_logprobs_N: Tensor
    """float32, the reference policy's; old_logprobs_N where kl has no coefficient"""
    advantages_N: Tensor
    """float32"""
    gradient_N: Tensor
    """bool: the rows whose terms count"""
    sequence_N: Tensor
    """int64: which sample of the mini-batch a row is of"""
    num_tokens_N: Tensor
    """int64: loss tokens of that sample, on all ranks"""
    num_sequences: int
    """samples of the mini-batch"""
    clip_low: float
    clip_high: float
    clip_dual: float | None
    cp_group: dist.ProcessGroup | None = None
    """the ranks that share each sequence; None: each is whole on its rank"""

    def sums_of_sequences(self, values_N: Tensor) -> Tensor:
        """Return each sequence's sum, float64 [num_sequences], over the ranks that share it.

        Collective over cp_group. No gradient goes through it.
        """
        return sums_of_sequences(values_N, self.sequence_N, self.num_sequences, self.cp_group)

    @property
    def clip(self) -> dict[str, float]:
        return {"clip_low": self.clip_low, "clip_high": self.clip_high}


@dataclass(frozen=True)
class LossOutputs:
    """The terms and metrics that an objective returns for its N rows."""

    terms_N: Tensor
    """float32, differentiable in logprobs_N: each row's loss, to be minimised. The core takes those
    of gradient_N, multiplies them by the weights of mismatch correction and credit, and divides
    their sum over all ranks by the denominator."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """by the name in metrics.jsonl: [N], number or bool, averaged over the rows of gradient_N of
    the step; the same names at every call"""
    ratio_N: Tensor | None = None
    """what stands for the ratio in ratio/first_update_max_offset; None: the token's own"""


Objective = Callable[[LossInputs], LossOutputs]


def needs_rows(rows: Rows) -> Callable[[Objective], Objective]:
    """Return a decorator that says which rows an objective needs; without it: "gradient"."""

    def mark(objective: Objective) -> Objective:
        objective.needs_rows = rows  # type: ignore[attr-defined]
        return objective

    return mark


def load_objective(name: str) -> tuple[Objective, Rows]:
    """Return the objective that `algorithm.objective=name` names, and the rows that it needs.

    Raises UserError where there is none, or its `needs_rows` is none of Rows.
    """
    objective = load_plugin("algorithm.objective", name, OBJECTIVES)
    rows = getattr(objective, "needs_rows", "gradient")
    if rows not in get_args(Rows):
        raise UserError(
            f"algorithm.objective={name!r} has needs_rows={rows!r}: it is one of "
            f"{', '.join(get_args(Rows))}"
        )
    return objective, cast(Rows, rows)


def ppo(inputs: LossInputs) -> LossOutputs:
    """Return the clipped surrogate of each token's ratio."""
    ratio_N = token_ratio(inputs.logprobs_N, inputs.old_logprobs_N, inputs.gradient_N)
    return _clipped(ratio_N, inputs)


@needs_rows("sequence")
def gspo(inputs: LossInputs) -> LossOutputs:
    """Return the clipped surrogate of each sequence's ratio, at the rows that carry a gradient."""
    return _clipped(sequence_ratio(inputs), inputs)


def cispo(inputs: LossInputs) -> LossOutputs:
    """Return the log-probabilities weighted by the clipped ratio, which is a constant."""
    ratio_N = token_ratio(inputs.logprobs_N, inputs.old_logprobs_N, inputs.gradient_N)
    terms_N = clipped_weight_surrogate(
        ratio_N, inputs.logprobs_N, inputs.advantages_N, **inputs.clip
    )
    any_sign_N = torch.ones_like(inputs.gradient_N)
    return LossOutputs(-terms_N, _clip_metrics(ratio_N, inputs, any_sign_N, any_sign_N), ratio_N)


def _clipped(ratio_N: Tensor, inputs: LossInputs) -> LossOutputs:
    terms_N = clipped_surrogate(
        ratio_N, inputs.advantages_N, **inputs.clip, clip_dual=inputs.clip_dual
    )
    negative_N, positive_N = inputs.advantages_N < 0, inputs.advantages_N > 0
    return LossOutputs(-terms_N, _clip_metrics(ratio_N, inputs, negative_N, positive_N), ratio_N)


def _clip_metrics(
    ratio_N: Tensor, inputs: LossInputs, low_N: Tensor, high_N: Tensor
) -> dict[str, Tensor]:
    """Return which rows the clip decides, bool [N] each.

    Below 1 - clip_low it does at the rows of low_N, above 1 + clip_high at those of high_N, above
    clip_dual where the advantage is negative.
    """
    dual = torch.inf if inputs.clip_dual is None else inputs.clip_dual
    return {
        "ratio/clip_low_fraction": low_N & (ratio_N < 1.0 - inputs.clip_low),
        "ratio/clip_high_fraction": high_N & (ratio_N > 1.0 + inputs.clip_high),
        "ratio/clip_dual_fraction": (inputs.advantages_N < 0) & (ratio_N > dual),
    }


def sequence_ratio(inputs: LossInputs) -> Tensor:
    """Return GSPO-token's ratio: in value the sequence's exp(1/|y_i| sum of the log-ratios), [N].

    That value is a constant times pi_theta / sg[pi_theta] of the token (arXiv 2507.18071, section
    4.3), so the gradient stays with the selected tokens and none goes through the sum.
    """
    sums_B = inputs.sums_of_sequences(inputs.logprobs_N - inputs.old_logprobs_N)
    of_sequence_N = (sums_B[inputs.sequence_N] / inputs.num_tokens_N).exp().float()
    return Ratio.apply(inputs.logprobs_N, of_sequence_N, inputs.gradient_N)
