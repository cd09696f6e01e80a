"""The tokens that rules of selection and credit see, and exact quantities over all of them.

A rule is a function of a `Tokens`: `forking.select = "MODULE:FUNCTION"` gives a score for each
token, `algorithm.credit = ["MODULE:FUNCTION"]` a weight or a mask. Every rank passes its own tokens
and gets numbers for them; what it needs to know of all tokens comes from the methods here, never
from the tokens at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.mismatch import sums_of_sequences
from megafork.errors import UserError
from megafork.ops.top_fraction import TopFraction, top_fraction_threshold
from megafork.system.plugins import load_plugin

NEEDS = ("entropy", "logprobs", "ref_logprobs")


@dataclass(frozen=True)
class Tokens:
    """The response tokens of an optimizer mini-batch or a rollout batch that this rank has, [T]."""

    entropy_T: Tensor
    """float32 nats, by forking.entropy_of; 0 unless it is needed"""
    logprobs_T: Tensor
    """float32, the ratio's denominator"""
    rollout_logprobs_T: Tensor
    """float32, the engine's"""
    ref_logprobs_T: Tensor | None
    """float32, the reference policy's; None where nothing asks for them"""
    token_T: Tensor
    """int64, token ids"""
    advantages_T: Tensor
    """float32"""
    loss_mask_T: Tensor
    """bool: the tokens of the loss; all tokens of the response but for overlong filtering"""
    key_T2: Tensor
    """int64 [T, 2]: (sample uid, position in the response), the same at every layout"""
    length_T: Tensor
    """int64: tokens of the response"""
    reward_T: Tensor
    """float32, the response's"""
    sequence_T: Tensor
    """int64: which of num_sequences responses a token is of"""
    num_sequences: int
    groups: Sequence[dist.ProcessGroup]
    """the process groups over which the tokens are split"""

    @property
    def position_T(self) -> Tensor:
        """Position in the response, int64."""
        return self.key_T2[:, 1]

    def sum(self, values_T: Tensor) -> Tensor:
        """Return the sum over the loss tokens of all ranks, float64 scalar. Collective."""
        total = torch.where(self.loss_mask_T, values_T.double(), 0.0).sum()
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total

    def mean(self, values_T: Tensor) -> Tensor:
        """Return the mean over the loss tokens of all ranks, float64 scalar. Collective."""
        return self.sum(values_T) / self.sum(torch.ones_like(values_T)).clamp(min=1.0)

    def sequence_sums(self, values_T: Tensor) -> Tensor:
        """Return each response's sum over its loss tokens, float64 [num_sequences]. Collective."""
        kept_T = torch.where(self.loss_mask_T, values_T, 0)
        sums_B = sums_of_sequences(kept_T, self.sequence_T, self.num_sequences, None)
        for group in self.groups:
            dist.all_reduce(sums_B, group=group)
        return sums_B

    def top_fraction(self, values_T: Tensor, fraction: float) -> TopFraction:
        """Return the exact threshold of the top fraction of all loss tokens. Collective."""
        return top_fraction_threshold(values_T, self.loss_mask_T, fraction, groups=self.groups)


Rule = Callable[..., Tensor]


def needs(*quantities: str) -> Callable[[Rule], Rule]:
    """Return a decorator that says what a rule needs, of NEEDS; without it: "entropy".

    Without "entropy" and "logprobs" no forward pass is made for the rule's sake.
    """

    def mark(rule: Rule) -> Rule:
        rule.needs = quantities  # type: ignore[attr-defined]
        return rule

    return mark


@dataclass(frozen=True)
class LoadedRule:
    """A plug-in of `forking.select` or `algorithm.credit`, and what it needs."""

    setting: str
    name: str
    function: Rule
    needs: frozenset[str]

    def __call__(self, tokens: Tokens, *arguments: Any, step: int) -> Tensor:
        """Return the rule's numbers for the tokens, [T], checked.

        Raises UserError that names rule, step and rank for another type or shape, and for NaN.
        """
        values_T = self.function(tokens, *arguments)
        num_tokens = len(tokens.token_T)
        if not isinstance(values_T, Tensor) or values_T.shape != (num_tokens,):
            is_tensor = isinstance(values_T, Tensor)
            found = list(values_T.shape) if is_tensor else type(values_T).__name__
            self.refuse(f"returned {found}, where [{num_tokens}] was due, one a token", step)
        if values_T.isnan().any():
            self.refuse(f"returned NaN for {int(values_T.isnan().sum())} tokens", step)
        return values_T.detach()

    def refuse(self, what: str, step: int) -> NoReturn:
        """Raise UserError for what the rule did."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise UserError(f"{self.setting}={self.name!r} {what} (step {step}, rank {rank})")


def load_rule(setting: str, name: str) -> LoadedRule:
    """Return the plug-in that `setting=name` names. Raises UserError for what is none."""
    function = load_plugin(setting, name, {})
    found = frozenset(getattr(function, "needs", ("entropy",)))
    if unknown := found - set(NEEDS):
        raise UserError(
            f"{setting}={name!r} needs {', '.join(sorted(unknown))}: what a rule can need is "
            f"{', '.join(NEEDS)}"
        )
    return LoadedRule(setting, name, function, found)


def credit_weights(rules: Sequence[LoadedRule], tokens: Tokens, *, step: int) -> Tensor:
    """Return the product of the rules' weights, float32 [T], a mask counting as 0 or 1.

    Raises UserError for a weight that is negative or infinite, and as `LoadedRule`.
    """
    weight_T = torch.ones_like(tokens.entropy_T)
    for rule in rules:
        values_T = rule(tokens, step, step=step).float()
        if not bool(((values_T >= 0) & values_T.isfinite()).all()):
            rule.refuse("returned a weight that is negative or infinite", step)
        weight_T = weight_T * values_T
    return weight_T
