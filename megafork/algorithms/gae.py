"""Generalised advantage estimation, and the loss of the values that it rests on.

The state of row t is the prompt and the response before token t, its action token t. The one reward
of a response comes with its last token; what follows it is worth 0. This holds for a response that
was cut at max_response_tokens too: nothing is bootstrapped from the critic there, the reward (with
its overlong punishment) is all that it got, and with overlong filtering it is in no loss.

Shapes: B samples, R rows of the token table, N rows that a rank works on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_EPSILON = 1e-8
"""Added to the variance of whitened advantages."""


def gae(
    values_R: Tensor,
    rewards_B: Tensor,
    offsets: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), float32 [R] (arXiv 1506.02438, equation 16).

    A_t = delta_t + gamma lambda A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t; the return that
    values are fitted to is A_t + V_t. In float64. values_R: of the states; rewards_B: of whole
    responses; offsets: int64 [B+1], a response's rows are offsets[b] .. offsets[b+1]-1.
    """
    lengths_B = offsets.diff()
    longest_first = lengths_B.argsort(descending=True, stable=True)
    last = offsets[1:][longest_first] - 1
    # How many responses have more than k tokens, for k = 0, 1, ...
    num_alive = len(lengths_B) - torch.bincount(lengths_B, minlength=1).cumsum(0)
    values_R = values_R.double()
    advantages_R = torch.zeros_like(values_R)
    # Of what follows the last token: the reward, once, in the place of a discounted value.
    next_worth = rewards_B.double()[longest_first]
    next_advantage = torch.zeros_like(next_worth)
    for steps_left, alive in enumerate(num_alive.tolist()):
        rows = last[:alive] - steps_left
        value = values_R[rows]
        next_advantage = next_worth[:alive] - value + gamma * gae_lambda * next_advantage[:alive]
        advantages_R[rows] = next_advantage
        next_worth = gamma * value
    return advantages_R.float(), (advantages_R + values_R).float()


def masked_mean_and_variance(
    values: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[float, float]:
    """Return the masked values' mean and sample variance (n - 1; 0 of fewer than two), in float64.

    group: whose ranks have one part of the values each, on its device.
    """
    kept = values[mask].double()

    def over_all(total: Tensor) -> Tensor:
        if group is not None:
            dist.all_reduce(total, group=group)
        return total

    total, count = over_all(torch.stack([kept.sum(), mask.double().sum()])).tolist()
    mean = total / max(count, 1)
    squares = float(over_all(((kept - mean) ** 2).sum()))
    return mean, squares / (count - 1) if count >= 2 else 0.0


def whitened(advantages_R: Tensor, mean: float, variance: float) -> Tensor:
    """Return the advantages at mean 0 and variance 1 over the loss tokens, float32 [R].

    mean, variance: those of the loss tokens before.
    """
    return ((advantages_R.double() - mean) / (variance + _EPSILON) ** 0.5).float()


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    *,
    clip: float | None,
    denominator: int,
) -> tuple[Tensor, Tensor]:
    """Return (1/denominator times the sum of the rows' losses, where the clip decides, bool [N]).

    A row's loss is 0.5 (V - return)^2, or the same of V clipped to old value +- `clip` where that
    is larger (PPO's value clipping); None: no clipping. `denominator` is the whole optimizer
    mini-batch's, so losses of micro-batches and ranks add up. Differentiable in values_N; without
    rows it is a connected zero.
    """
    squared_N = (values_N - returns_N) ** 2
    clipped_N = torch.zeros_like(values_N, dtype=torch.bool)
    if clip is not None:
        near_N = torch.clamp(values_N, old_values_N - clip, old_values_N + clip)
        squared_near_N = (near_N - returns_N) ** 2
        clipped_N = squared_near_N > squared_N
        squared_N = torch.maximum(squared_N, squared_near_N)
    return 0.5 * squared_N.sum() / denominator, clipped_N


def explained_variance(
    values_R: Tensor,
    returns_R: Tensor,
    loss_mask_R: Tensor,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Return 1 - Var(return - value) / Var(return) over the loss tokens; NaN for equal returns."""
    _, of_returns = masked_mean_and_variance(returns_R, loss_mask_R, group)
    _, of_errors = masked_mean_and_variance(returns_R - values_R, loss_mask_R, group)
    return 1.0 - of_errors / of_returns if of_returns else torch.nan
