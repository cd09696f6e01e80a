"""Group-relative advantages (GRPO, DAPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from megafork.errors import UserError

_EPSILON = 1e-6
"""Added to the standard deviation; a group of equal rewards has advantage 0 either way."""


def group_advantages(rewards_B: Tensor, group_B: Tensor, *, normalize: bool = True) -> Tensor:
    """Return the reward minus its group's mean, over the group's deviation if `normalize`.

    rewards_B: float [B]; group_B: int64 [B], any ids. The deviation is the sample one (n - 1), as
    in GRPO's reference implementations. Returns float32 [B]. A group of one response gets 0.
    """
    _, index_B = group_B.unique(return_inverse=True)
    sizes = torch.bincount(index_B).double()
    rewards = rewards_B.double()
    means = torch.bincount(index_B, weights=rewards) / sizes
    centred = rewards - means[index_B]
    if not normalize:
        return centred.float()
    variances = torch.bincount(index_B, weights=centred**2) / (sizes - 1).clamp(min=1)
    return (centred / (variances.sqrt()[index_B] + _EPSILON)).float()


def check_advantages(name: str, advantage_R: Tensor, num_rows: int) -> Tensor:
    """Return what the plug-in `algorithm.advantages=name` gave, float32 [num_rows].

    Raises UserError for another type or shape, and for a number that is not finite.
    """
    if not isinstance(advantage_R, Tensor) or advantage_R.shape != (num_rows,):
        found = (
            list(advantage_R.shape)
            if isinstance(advantage_R, Tensor)
            else type(advantage_R).__name__
        )
        raise UserError(
            f"algorithm.advantages={name!r} returned {found}, where [{num_rows}] was due, one for "
            "each row of the table (of a response's advantage: advantage_B[table.sample_R])"
        )
    if not bool(advantage_R.isfinite().all()):
        raise UserError(f"algorithm.advantages={name!r} returned an advantage that is not finite")
    return advantage_R.float()
