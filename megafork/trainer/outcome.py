"""The outcome of a step's training; metrics and reports are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megafork.algorithms.forking import Selection
from megafork.data.token_table import TokenTable
from megafork.model.scorer import Scores


@dataclass(frozen=True)
class Skipped:
    """A mini-batch without an update, and why there was none."""

    number: int
    table: TokenTable
    reason: str


@dataclass
class Optimized:
    """The outcome of a rollout batch, mini-batch by mini-batch."""

    tables: list[TokenTable] = field(default_factory=list)
    """the mini-batches that could be scored and selected from"""
    scores: list[Scores] = field(default_factory=list)
    """of these, with the entropies that were selected by"""
    masks: list[Tensor] = field(default_factory=list)
    reference_masks: list[Tensor] = field(default_factory=list)
    """what the reference's entropies would have selected, in steps that compare"""
    selections: list[Selection] = field(default_factory=list)
    """one for each threshold scope; none before the last stage"""
    updates: list[dict[str, float]] = field(default_factory=list)
    critic_updates: list[dict[str, float]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    """what the critic thinks of the rollout batch (see estimate_advantages)"""
    skipped: list[Skipped] = field(default_factory=list)
    num_empty: int = 0
    """mini-batches without a token in the loss, which are in none of the lists"""
