"""Two models on the same responses: which positions fork in both, and whose entropy changed.

arXiv 2506.01939 measures both on its models: about 86.7% of the base model's top-20% positions are
still in the top 20% when training has converged, and the top bins' entropy changes most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy

from megafork.analysis.columns import Block, Columns, check_same_responses
from megafork.analysis.means import ClusteredMeans
from megafork.analysis.order import order_statistics

Scope = Literal["batch", "sequence"]
NUM_BINS = 20


@dataclass(frozen=True)
class Overlap:
    """Positions at or above the threshold of the top rho, of A, of B and of both."""

    num_tokens: int
    num_a: int
    num_b: int
    num_both: int
    threshold_a: float
    """nats; NaN for scope "sequence", where every response has its own"""
    threshold_b: float

    @property
    def overlap(self) -> float:
        """|A and B| / |A|"""
        return self.num_both / self.num_a

    @property
    def by_chance(self) -> float:
        """what B's positions would have in common with A's, were they anywhere: |B| / tokens"""
        return self.num_b / self.num_tokens


def overlap(a: Columns, b: Columns, rho: float, scope: Scope) -> Overlap:
    """The threshold is the k-th largest entropy, k = ceil(rho n), of the file or of each response;
    ties at it are kept (algorithms/forking.py). Raises UserError for other responses."""
    check_same_responses(a, b)
    thresholds = [_batch_threshold(c, rho) if scope == "batch" else float("nan") for c in (a, b)]
    counts = numpy.zeros(3, numpy.int64)
    for block_a, block_b in zip(a.blocks(), b.blocks(), strict=True):
        tops = [
            block.entropy_T >= (_own_thresholds_T(block, rho) if scope == "sequence" else tau)
            for block, tau in zip((block_a, block_b), thresholds, strict=True)
        ]
        counts += [int(mask_T.sum()) for mask_T in (*tops, tops[0] & tops[1])]
    num_a, num_b, num_both = counts.tolist()
    return Overlap(a.num_tokens, num_a, num_b, num_both, *thresholds)


def _batch_threshold(columns: Columns, rho: float) -> float:
    rank = columns.num_tokens - _top_k(columns.num_tokens, rho)
    return float(order_statistics(columns.entropies, [rank])[0])


def _own_thresholds_T(block: Block, rho: float) -> numpy.ndarray:
    """float32: the threshold of the response that a token is of"""
    ends_B = numpy.cumsum(block.length_B.astype(numpy.int64))
    ascending_T = block.entropy_T[numpy.lexsort((block.entropy_T, block.row_T))]
    filled = block.length_B > 0
    k_B = numpy.array([_top_k(n, rho) for n in block.length_B[filled].tolist()], numpy.int64)
    return numpy.repeat(ascending_T[ends_B[filled] - k_B], block.length_B[filled])


@cache
def _top_k(num_tokens: int, rho: float) -> int:
    import torch

    from megafork.ops.top_fraction import top_k

    return int(top_k(torch.tensor([num_tokens]), rho)[0])


@dataclass(frozen=True)
class Change:
    """Entropy of the second model less that of the first, in NUM_BINS bins; nats."""

    edges: list[float]
    """of NUM_BINS + 1: a bin takes the first model's entropies above its lower edge up to and with
    its upper edge; the first takes its lower edge too"""
    before: ClusteredMeans
    change: ClusteredMeans
    overall: ClusteredMeans


def entropy_change(a: Columns, b: Columns) -> Change:
    """Bins by rank of a's entropy: edge i is its ceil(i n / 20)-th smallest.

    Each bin has 5% of the tokens unless entropies are equal, which are never parted: a bin may then
    have more, the next ones fewer or none. Raises UserError for other responses.
    """
    check_same_responses(a, b)
    n = a.num_tokens
    ranks = [max(-(-i * n // NUM_BINS) - 1, 0) for i in range(NUM_BINS + 1)]
    edges = order_statistics(a.entropies, ranks)
    before, change = ClusteredMeans(NUM_BINS), ClusteredMeans(NUM_BINS)
    overall = ClusteredMeans(1)
    for block_a, block_b in zip(a.blocks(), b.blocks(), strict=True):
        bin_T = numpy.searchsorted(edges[1:-1], block_a.entropy_T, side="left")
        row_T = block_a.row_T
        change_T = block_b.entropy_T.astype(numpy.float64) - block_a.entropy_T
        before.add(block_a.entropy_T, bin_T, row_T)
        change.add(change_T, bin_T, row_T)
        overall.add(change_T, numpy.zeros_like(bin_T), row_T)
    return Change(edges.astype(float).tolist(), before, change, overall)
