"""The base of a policy and its critic: an optimizer, and a guard that judges updates.

An update has two halves. `judge` ends the first: the gradients are there, reduced, and nothing has
changed. `apply` is the second and cannot be refused, so that of two models that learn from one
mini-batch both make their update or neither does (update.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megafork.config import TrainingConfig
from megafork.model.packed import PackedModel
from megafork.parallel import backend
from megafork.parallel.host_memory import HostMemory, storages
from megafork.trainer.optimizer import (
    build_optimizer,
    gradient_buffers,
    learning_rate,
    optimizer_tensors,
    set_hyperparameters,
    wrap_data_parallel,
)
from megafork.trainer.update_guard import UpdateGuard, UpdateRefused


@dataclass(frozen=True)
class Judged:
    """An update that may be made: its gradients are in the model's buffers."""

    metrics: dict[str, float]
    """empty before the last stage"""
    loss: float
    grad_norm: float
    """global, before clipping"""
    num_tokens: int
    """of the mini-batch's loss mask; 0: every response was cut, and there is nothing to learn"""


class Learner(PackedModel):
    """A PackedModel that learns."""

    def start_learning(self, training: TrainingConfig, *, name: str = "") -> None:
        """Make guard, gradients and optimizer, once the weights are loaded.

        name: the model's name in what UpdateRefused says.
        """
        self.training = training
        self.name = name
        self.num_updates = 0
        self.guard = UpdateGuard(training)
        self.ddp = wrap_data_parallel([stage.gpt for stage in self.stages], self.mesh)
        self.modules = list(self.ddp)
        self._optimizer = build_optimizer(self.ddp, training)
        self._weights_home = HostMemory(self.mesh.device)
        self._optimizer_home = HostMemory(self.mesh.device)
        self._released: list[tuple[torch.UntypedStorage, int]] = []
        self.has_weights = self.has_optimizer = True
        """Whether they are on the device"""

    @property
    def optimizer(self) -> MegatronOptimizer:
        assert self.has_optimizer, "the optimizer is put away: onload() comes first"
        return self._optimizer

    def offload(self, *, weights: bool = True) -> None:
        """Put everything away in host memory, or all but the weights; what is away stays away.

        Gradients are dropped: an update begins by clearing them. Until `onload` no verb may be
        used; with the weights left in place they may be scored with and exported.
        """
        device = self.mesh.device
        of_weights = storages((tensor for s in self.stages for tensor in _tensors(s.gpt)), device)
        if self.has_optimizer:
            self._optimizer.zero_grad()
            of_gradients = storages(gradient_buffers(self.ddp), device)
            of_optimizer = storages(optimizer_tensors(self._optimizer), device)
            # In float32 the main parameters are views of the weights.
            own = of_optimizer.keys() - of_weights.keys() - of_gradients.keys()
            self._optimizer_home.put_away(of_optimizer[address] for address in own)
            self._released = [(storage, storage.nbytes()) for storage in of_gradients.values()]
            for storage in of_gradients.values():
                storage.resize_(0)
            self.has_optimizer = False
        if weights and self.has_weights:
            self._weights_home.put_away(of_weights.values())
            self.has_weights = False
        backend.return_free_memory()

    def onload(self, *, optimizer: bool = True) -> None:
        """Bring everything back, or the weights alone, bit for bit; gradients are zero."""
        if not self.has_weights:
            self._weights_home.bring_back()
            self.has_weights = True
        if optimizer and not self.has_optimizer:
            self._optimizer_home.bring_back()
            for storage, size in self._released:
                storage.resize_(size)
            self._released = []
            for gradients in gradient_buffers(self.ddp):
                gradients.zero_()
            self.has_optimizer = True

    def run_hidden(self, *arguments: Any, **options: Any) -> list[dict]:
        """Run the packs as `PackedModel` does; not while the weights are put away."""
        assert self.has_weights, "the weights are put away: onload() comes first"
        return super().run_hidden(*arguments, **options)

    def clear_gradients(self) -> None:
        assert self.has_optimizer, "the gradients are put away: onload() comes first"
        for ddp in self.ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def judge(
        self, metrics: dict[str, float], *, num_tokens: int, loss: Sequence[str] = ("loss",)
    ) -> Judged:
        """Judge the update that the accumulated gradients would make.

        metrics: of the last stage, over all ranks. num_tokens: of the mini-batch's loss mask. loss:
        names of the metrics that add up to it.

        Raises UpdateRefused, on all ranks, for a NaN, an infinity or a spike (see `UpdateGuard`).
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        # One rank judges: another might see the norm with another last bit.
        total = sum(metrics.get(name, math.nan) for name in loss)
        fault, total, norm = self.mesh.broadcast_object(
            (self.guard.fault(total, norm), total, norm), src=self.mesh.last_stage_rank
        )
        if fault is not None:
            raise UpdateRefused(f"{self.name}: {fault}" if self.name else fault)
        return Judged(metrics, total, norm, num_tokens)

    def apply(self, judged: Judged) -> dict[str, float]:
        """Make the optimizer's step; return the metrics with the global gradient norm before
        clipping.

        No step is made for a mini-batch without a token in the loss: Adam's momentum and the weight
        decay would still move the weights.
        """
        if not judged.num_tokens:
            return judged.metrics | {"grad_norm": judged.grad_norm}
        set_hyperparameters(self.optimizer, self.training, self.num_updates)
        _, grad_norm, _ = self.optimizer.step()
        self.num_updates += 1
        self.guard.made(judged.loss, judged.grad_norm)
        return judged.metrics | {"grad_norm": float(grad_norm)}

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps beside weights and optimizer; JSON can hold
        it."""
        return {"num_updates": self.num_updates, "guard": self.guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        self.guard.restore(state["guard"])

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(self.training, self.num_updates)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
