"""Selects the response tokens that carry the policy gradient (arXiv 2506.01939, section 4).

The paper keeps the tokens with entropy at or above tau_rho(B), the threshold of the top fraction
rho of all response tokens of the optimizer batch B. The threshold here is exact over all ranks
(ops/top_fraction.py), whatever the micro-batches and the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.data.token_table import hash64
from megafork.ops.top_fraction import largest_keys, top_fraction_threshold, top_k

if TYPE_CHECKING:
    from megafork.algorithms.rules import Tokens
    from megafork.config import ForkingConfig

_TIES = torch.tensor(1)
"""Sets the hash that breaks ties apart from the one that "random" selects by."""


def forking_mask(
    entropy: Tensor,
    loss_mask: Tensor,
    *,
    rho: float = 0.2,
    groups: Sequence[dist.ProcessGroup] = (),
) -> Tensor:
    """Return the bool mask of the forking tokens: the top rho of the loss tokens by entropy.

    entropy: float32 (bfloat16 and float16 are exact too), of any shape, in nats; loss_mask: of the
    same shape, nonzero at the response tokens that are trained on; each rank passes its own tokens
    of the whole optimizer batch. groups: orthogonal process groups over which the tokens are split
    (for plain data parallelism one, of all ranks); every rank of them has to call. The result is
    exact: of N loss tokens over all ranks, those at or above the ceil(rho N)-th largest entropy,
    and so more than that where entropies are equal at the threshold. Tokens outside the loss mask
    are never in it. Raises ValueError, on every rank, where an entropy in the loss mask is NaN.
    Source: arXiv 2506.01939, section 4.
    """
    loss_mask = loss_mask.bool()
    found = top_fraction_threshold(entropy, loss_mask, rho, groups=groups)
    return loss_mask & (entropy >= found.threshold)


@dataclass(frozen=True)
class Selection:
    """The selected tokens of a scope. Counts are of the loss tokens, or of all response tokens."""

    mask_T: Tensor
    """bool: forking_mask, contained in the loss mask"""
    rho: float
    """the step's"""
    threshold: float
    """tau in nats, the smallest entropy in the top rho; the mean of the sequences' own for scope
    "sequence"; NaN where entropy decides nothing ("random", "all")"""
    num_kept: int
    num_wanted: int
    """what rho asks for; ties = "keep" keeps more when entropies are equal"""
    num_total: int
    num_boundary: int
    """tokens within `boundary_eps` of the threshold: another layout may decide them otherwise"""

    @property
    def kept_fraction(self) -> float:
        return self.num_kept / max(self.num_total, 1)


def select_tokens(
    tokens: Tokens,
    config: ForkingConfig,
    *,
    seed: int,
    step: int,
    boundary_eps: float = 0.0,
    scores_T: Tensor | None = None,
) -> Selection:
    """Select among the response tokens of one threshold scope; call it once for each scope.

    Each rank of tokens.groups passes its own tokens. rho is the step's, a fraction of the loss
    tokens or, with population = "response", of all. "bottom" is the complement of "top" at the same
    rho; "random" takes the top rho of a hash of (seed, step, key), so the same tokens at every
    layout. Tokens whose entropy has the threshold's bits are all in the top, or with ties = "hash"
    as many as are missing, by another hash of (seed, step, key). (Equal on paper, as of a prefix
    that responses share, they may differ in the last bit: num_boundary counts those.)
    scores_T: float32 without NaN, a plug-in's: its top rho is taken in place of the entropies'.
    """
    loss_mask_T, key_T2 = tokens.loss_mask_T, tokens.key_T2
    if config.scope == "sequence":
        scope = _Segments(tokens.sequence_T, tokens.num_sequences, tokens.groups)
    else:
        scope = _Segments(torch.zeros_like(tokens.sequence_T), 1, tokens.groups)
    values_T = tokens.entropy_T if scores_T is None else scores_T
    if config.select == "random":
        values_T = random_scores(key_T2, seed=seed, step=step)
    among_T = torch.ones_like(loss_mask_T) if config.population == "response" else loss_mask_T
    rho = config.rho_at(step)
    threshold_S, num_top_S, k_S, num_total_S = scope.thresholds(values_T, among_T, rho)
    threshold_T = threshold_S[scope.ids_T]
    top_T = among_T & (values_T >= threshold_T)
    if config.ties == "hash" and bool((num_top_S > k_S).any()):
        tied_T = among_T & (values_T == threshold_T)
        missing_S = k_S - (num_top_S - scope.count(tied_T))
        order_T = hash64(*_salted(key_T2, seed=seed, step=step), _TIES.to(key_T2.device))
        top_T = (top_T & ~tied_T) | scope.largest(order_T, tied_T, missing_S)
        num_top_S = k_S
    near_S = scope.count(among_T & ((values_T - threshold_T).abs() <= boundary_eps))
    kept, wanted, num_total = (int(num_S.sum()) for num_S in (num_top_S, k_S, num_total_S))
    by_entropy = config.by_entropy
    return Selection(
        mask_T=loss_mask_T & _selected(config.select, top_T),
        rho=rho,
        threshold=float(threshold_S[num_total_S > 0].mean()) if by_entropy else math.nan,
        num_kept=_num_selected(config.select, kept, num_total),
        num_wanted=_num_selected(config.select, wanted, num_total),
        num_total=num_total,
        # One token is always at the threshold; only company makes it a matter of rounding.
        num_boundary=int(near_S[near_S > 1].sum()) if by_entropy else 0,
    )


def _selected(select: str, top_T: Tensor) -> Tensor:
    """Return what `select` makes of the top tokens, bool [T]."""
    if select == "bottom":
        return ~top_T
    return torch.ones_like(top_T) if select == "all" else top_T


def _num_selected(select: str, num_top: int, num_total: int) -> int:
    """Return how many of num_total tokens `select` takes where num_top are in the top."""
    if select == "bottom":
        return num_total - num_top
    return num_total if select == "all" else num_top


@dataclass(frozen=True)
class _Segments:
    """The token sets that have a threshold each (S of them), over all ranks of `groups`."""

    ids_T: Tensor
    num: int
    groups: Sequence[dist.ProcessGroup]

    def count(self, mask_T: Tensor) -> Tensor:
        """Return each set's number of masked tokens, int64 [S]."""
        counts = torch.bincount(self.ids_T[mask_T], minlength=self.num)
        for group in self.groups:
            dist.all_reduce(counts, group=group)
        return counts

    def thresholds(
        self, values_T: Tensor, mask_T: Tensor, rho: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (threshold, kept, wanted, total), each [S]; one set needs no look at the ids."""
        found = top_fraction_threshold(
            values_T,
            mask_T,
            rho,
            groups=self.groups,
            segments_T=self.ids_T if self.num > 1 else None,
            num_segments=self.num,
        )
        threshold, kept, total = (
            torch.as_tensor(value, device=values_T.device).reshape(-1) for value in found
        )
        return threshold, kept, torch.where(total > 0, top_k(total, rho), 0), total

    def largest(self, keys_T: Tensor, mask_T: Tensor, k_S: Tensor) -> Tensor:
        return largest_keys(keys_T, mask_T, k_S, groups=self.groups, segments_T=self.ids_T)


def warn_of_ties(kept_fraction: float, wanted_fraction: float, rho: float) -> str | None:
    """Return a message when ties move the kept fraction by more than a tenth of rho, else None.

    A collapsed policy has many entropies of 0; when they reach the threshold all are kept.
    """
    if not abs(kept_fraction - wanted_fraction) > 0.1 * rho:  # NaN where nothing was selected
        return None
    return (
        f"forking.rho={rho:g} asks for {wanted_fraction:.1%} of the tokens, but "
        f"{kept_fraction:.1%} were kept: many entropies are equal (forking.ties=hash keeps exactly "
        "what rho asks for)"
    )


def random_scores(key_T2: Tensor, *, seed: int, step: int) -> Tensor:
    """Return scores in [0, 1), float32 [T], a function of (seed, step, key) alone."""
    hashed_T = hash64(*_salted(key_T2, seed=seed, step=step))
    return ((hashed_T >> 40) & 0xFFFFFF).float() / float(1 << 24)


def _salted(key_T2: Tensor, *, seed: int, step: int) -> tuple[Tensor, ...]:
    return (*key_T2.new_tensor([seed, step]), key_T2[:, 0], key_T2[:, 1])
