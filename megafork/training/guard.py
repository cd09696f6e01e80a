"""Which updates are not made: one with a NaN would be in every weight, a spike may ruin a run."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from megafork.config import TrainingConfig

_WINDOW = 64
_EXPERIENCE = 16


class UpdateRefused(Exception):
    """The mini-batch was skipped, on all ranks, and the weights are as they were; says why."""


class UpdateGuard:
    """Judges updates by those made before: losses and gradient norms of the last 64.

    A spike is a value more than `training.spike_factor` times the largest of them (as in
    megatron-core's rerun machine), looked for once there are 16.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self.factor = training.spike_factor
        self.num_skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._grad_norms: deque[float] = deque(maxlen=_WINDOW)

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Why an update must not be made; None where it may."""
        for name, value, before in (
            ("loss", abs(loss), self._losses),
            ("gradient norm", grad_norm, self._grad_norms),
        ):
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if self.factor is None or len(before) < _EXPERIENCE:
                continue
            if value > self.factor * max(before):
                return (
                    f"its {name} of {value:.3g} is more than training.spike_factor={self.factor:g} "
                    f"times the largest of the last {len(before)} updates, {max(before):.3g}"
                )
        return None

    def made(self, loss: float, grad_norm: float) -> None:
        self._losses.append(abs(loss))
        self._grad_norms.append(grad_norm)
        self.num_skipped_in_a_row = 0

    def skipped(self) -> None:
        self.num_skipped_in_a_row += 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON can hold it."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._losses.extend(state["losses"])
        self._grad_norms.extend(state["grad_norms"])
        self.num_skipped_in_a_row = state["num_skipped_in_a_row"]
