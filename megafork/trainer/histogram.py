"""The distribution of a step's entropies: counts in fixed bins, the same at every layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megafork.parallel.mesh import Mesh
from megafork.trainer.outcome import Optimized

_BINS_PER_DECADE = 20
_DECADES = (-5, 1.3)
"""10^1.3 = 20 nats is more than a vocabulary of 10^8 tokens can have."""
EDGES = (
    0.0,
    *(
        float(f"{10 ** (_DECADES[0] + i / _BINS_PER_DECADE):.6g}")
        for i in range(round((_DECADES[1] - _DECADES[0]) * _BINS_PER_DECADE) + 1)
    ),
)
"""In nats: [0, 1e-5) is the bin of what is certain, then 20 bins a decade, each with its lower edge
and without its upper one; the last takes what lies above too."""


def entropy_histogram(done: Optimized, mesh: Mesh) -> dict[str, Any] | None:
    """Return, on every rank, how many of the step's loss tokens on all ranks have an entropy in
    each bin, and how many of these are selected.

    The entropies are those that the tokens were selected by. None where they are unknown
    (old_logprobs = "engine") or every mini-batch was skipped before it was scored. The sums are
    exact; at another layout the rounding of matrix products may move an entropy over an edge.
    """
    if not done.tables or not all(s.has_entropies for s in done.scores):
        return None
    histogram = None
    if mesh.is_last_stage:
        inner = torch.tensor(EDGES[1:-1])
        counts = torch.zeros(2, len(EDGES) - 1, dtype=torch.int64)
        for table, scores, mask_N in zip(done.tables, done.scores, done.masks, strict=True):
            bin_N = torch.bucketize(scores.entropy_N, inner, right=True)
            for row, chosen_N in enumerate((table.loss_mask_R[scores.rows_N], mask_N)):
                counts[row] += torch.bincount(bin_N[chosen_N], minlength=len(EDGES) - 1)
        counts = counts.to(mesh.device)
        dist.all_reduce(counts, group=mesh.groups.dp_cp)
        tokens, selected = counts.tolist()
        histogram = {"edges": list(EDGES), "tokens": tokens, "selected": selected}
    return mesh.broadcast_object(histogram, src=mesh.last_stage_rank)
