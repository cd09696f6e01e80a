"""What a policy and its critic have in common: an optimizer, and a guard that judges updates.

An update has two halves. `judge` ends the first: the gradients are there, reduced, and nothing has
changed. `apply` is the second and cannot be refused, so that of two models that learn from one
mini-batch both make their update or neither does (training/step.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megafork.config import TrainingConfig
from megafork.model.packed import PackedModel
from megafork.training.guard import UpdateGuard, UpdateRefused
from megafork.training.optimizer import (
    build_optimizer,
    learning_rate,
    set_hyperparameters,
    wrap_data_parallel,
)


@dataclass(frozen=True)
class Judged:
    """An update that may be made: its gradients are in the model's buffers."""

    metrics: dict[str, float]
    """empty before the last stage"""
    loss: float
    grad_norm: float
    """global, before clipping"""


class Learner(PackedModel):
    """A PackedModel that learns."""

    def start_learning(self, training: TrainingConfig, *, name: str = "") -> None:
        """Once the weights are loaded. name: of the model in what UpdateRefused says."""
        self.training = training
        self.name = name
        self.num_updates = 0
        self.guard = UpdateGuard(training)
        self.ddp = wrap_data_parallel([stage.gpt for stage in self.stages], self.topology)
        self.modules = list(self.ddp)
        self.optimizer = build_optimizer(self.ddp, training)

    def clear_gradients(self) -> None:
        for ddp in self.ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def judge(self, metrics: dict[str, float], *, loss: Sequence[str] = ("loss",)) -> Judged:
        """Of the accumulated gradients. metrics: on the last stage, over all ranks.

        loss: names of the metrics that add up to it.

        Raises UpdateRefused, on all ranks, for a NaN, an infinity or a spike (see `UpdateGuard`).
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        # One rank judges: another might see the norm with another last bit.
        total = sum(metrics.get(name, math.nan) for name in loss)
        fault, total, norm = self.topology.broadcast_object(
            (self.guard.fault(total, norm), total, norm), src=self.topology.last_stage_rank
        )
        if fault is not None:
            raise UpdateRefused(f"{self.name}: {fault}" if self.name else fault)
        return Judged(metrics, total, norm)

    def apply(self, judged: Judged) -> dict[str, float]:
        """The optimizer's step; the metrics with the global gradient norm before clipping."""
        set_hyperparameters(self.optimizer, self.training, self.num_updates)
        _, grad_norm, _ = self.optimizer.step()
        self.num_updates += 1
        self.guard.made(judged.loss, judged.grad_norm)
        return judged.metrics | {"grad_norm": float(grad_norm)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimizer; JSON can hold it."""
        return {"num_updates": self.num_updates, "guard": self.guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        self.guard.restore(state["guard"])

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return learning_rate(self.training, self.num_updates)
