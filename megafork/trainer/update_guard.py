"""Updates that are refused: one with a NaN would be in every weight, a spike may ruin a run."""

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
    """Judges updates by the last 64 that were made and had a gradient.

    A spike is a loss or gradient norm of more than `training.spike_factor` times the largest of
    them (as in megatron-core's rerun machine), looked for once there are 16. Both are compared with
    1 at least. The loss of advantages of order 1 cancels to anything below it, and only ratios that
    explode take it far beyond. A norm may have been small for long without a reward, when a KL or a
    critic's remaining error was all there was to learn; training.grad_clip, where it is less than
    1, stands for the 1.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self.factor, self.max_skipped = training.spike_factor, training.max_skipped
        self.usual_norm = min(1.0, training.grad_clip)
        self.num_skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._grad_norms: deque[float] = deque(maxlen=_WINDOW)

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Return why an update must not be made; None where it may."""
        for name, value, before in (
            ("loss", abs(loss), [1.0, *self._losses]),
            ("gradient norm", grad_norm, [self.usual_norm, *self._grad_norms]),
        ):
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if self.factor is None or len(self._losses) < _EXPERIENCE:
                continue
            if value > self.factor * max(before):
                return (
                    f"its {name} of {value:.3g} is more than training.spike_factor={self.factor:g} "
                    f"times {max(before):.3g}, the largest of the last {len(self._losses)} updates"
                )
        return None

    @property
    def is_exhausted(self) -> bool:
        return self.num_skipped_in_a_row >= self.max_skipped

    def made(self, loss: float, grad_norm: float) -> None:
        self.went_on()
        if grad_norm > 0:  # without an advantage an update says nothing of the scale
            self._losses.append(abs(loss))
            self._grad_norms.append(grad_norm)

    def went_on(self) -> None:
        """Note that a mini-batch was not skipped, whoever has learnt from it."""
        self.num_skipped_in_a_row = 0

    def skipped(self) -> None:
        self.num_skipped_in_a_row += 1

    def state(self) -> dict[str, Any]:
        """Return the guard's state for a checkpoint; JSON can hold it."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._losses.extend(state["losses"])
        self._grad_norms.extend(state["grad_norms"])
        self.num_skipped_in_a_row = state["num_skipped_in_a_row"]
