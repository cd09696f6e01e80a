"""Log-probability and entropy of tokens as trainers usually compute them.

Each is written from the description of what others do, as plainly as they do it. TP2 forms take
their group from the default one; upstream gradients are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Outputs = tuple[Tensor, Tensor]
COMPILED_ROWS = 64


def log_softmax(logits_TV: Tensor, targets_T: Tensor) -> Outputs:
    """One shard: log_softmax, its exponential, a sum."""
    log_p = logits_TV.float().log_softmax(-1)
    return log_p.gather(1, targets_T[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def compiled_chunks(rows: int = COMPILED_ROWS) -> Callable[[Tensor, Tensor], Outputs]:
    """One shard: log_softmax of some rows at a time, fused by torch.compile."""
    compiled = torch.compile(log_softmax, dynamic=False)

    def run(logits_TV: Tensor, targets_T: Tensor) -> Outputs:
        pairs = zip(logits_TV.split(rows), targets_T.split(rows), strict=True)
        logprobs, entropies = zip(*(compiled(z, t) for z, t in pairs), strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    return run


class SumOverRanks(torch.autograd.Function):
    """Forward SUM all-reduce; upstream gradients are equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def six_collectives(logits_TV: Tensor, targets_T: Tensor) -> Outputs:
    """Two ops by autograd: MAX, target, sum for the log-probability, then MAX, sum and sum of
    p * x for the entropy."""

    def softmax_parts() -> tuple[Tensor, Tensor, Tensor]:
        max_T1 = maximum(logits_TV)
        e_TV = (logits_TV - max_T1).exp()
        return max_T1, e_TV, SumOverRanks.apply(e_TV.sum(1))

    max_T1, _, s_T = softmax_parts()
    owned_T1, local_T1 = local_targets(logits_TV, targets_T)
    chosen_T = torch.where(owned_T1, logits_TV.gather(1, local_T1), 0.0)[:, 0]
    logprobs_T = SumOverRanks.apply(chosen_T) - max_T1[:, 0] - s_T.log()
    max_T1, e_TV, s_T = softmax_parts()
    mean_T = SumOverRanks.apply((e_TV / s_T[:, None] * logits_TV).sum(1))
    return logprobs_T, max_T1[:, 0] + s_T.log() - mean_T


def two_ops(logits_TV: Tensor, targets_T: Tensor) -> Outputs:
    """Two ops with written backwards; each saves its own softmax."""
    return SavedLogprob.apply(logits_TV, targets_T)[0], SavedEntropy.apply(logits_TV)


def one_op_detached(logits_TV: Tensor, targets_T: Tensor) -> Outputs:
    """One log-sum-exp for both; the entropy has no gradient."""
    logprobs_T, entropy_T = SavedLogprob.apply(logits_TV, targets_T, True)
    return logprobs_T, entropy_T


class SavedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, with_entropy: bool = False) -> Any:
        max_T1 = maximum(logits_TV)
        e_TV = logits_TV - max_T1
        owned_T1, local_T1 = local_targets(logits_TV, targets_T)
        target_T = torch.where(owned_T1, e_TV.gather(1, local_T1), 0.0)[:, 0]
        dist.all_reduce(target_T)
        s_T = e_TV.exp_().sum(1)
        dist.all_reduce(s_T)
        p_TV = e_TV.div_(s_T[:, None])
        entropy_T = torch.zeros_like(s_T)
        if with_entropy:
            entropy_T = (p_TV * logits_TV).sum(1)
            dist.all_reduce(entropy_T)
            entropy_T = max_T1[:, 0] + s_T.log() - entropy_T
        ctx.save_for_backward(p_TV, owned_T1, local_T1)
        ctx.mark_non_differentiable(entropy_T)
        return target_T - s_T.log(), entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> Any:
        p_TV, owned_T1, local_T1 = ctx.saved_tensors
        grad_TV = p_TV * -grad_T[:, None]
        return grad_TV.scatter_add_(1, local_T1, owned_T1 * grad_T[:, None]), None, None


class SavedEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor) -> Tensor:
        max_T1 = maximum(logits_TV)
        e_TV = (logits_TV - max_T1).exp_()
        s_T1 = e_TV.sum(1, keepdim=True)
        dist.all_reduce(s_T1)
        p_TV = e_TV.div_(s_T1)
        mean_T1 = (p_TV * logits_TV).sum(1, keepdim=True)
        dist.all_reduce(mean_T1)
        ctx.save_for_backward(logits_TV, p_TV, mean_T1)
        return (max_T1 + s_T1.log() - mean_T1)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> Tensor:
        logits_TV, p_TV, mean_T1 = ctx.saved_tensors
        return (mean_T1 - logits_TV).mul_(p_TV).mul_(grad_T[:, None])


def maximum(logits_TV: Tensor) -> Tensor:
    max_T1 = logits_TV.detach().amax(1, keepdim=True)
    dist.all_reduce(max_T1, op=dist.ReduceOp.MAX)
    return max_T1


def local_targets(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """([T, 1] whether the target is in this shard, its column here or 0)."""
    width = logits_TV.shape[1]
    local_T = targets_T - width * dist.get_rank()
    owned_T = (local_T >= 0) & (local_T < width)
    return owned_T[:, None], torch.where(owned_T, local_T, 0)[:, None]
