"""RLVR training of language models where only the forking tokens carry the policy gradient.

    from megafork import forking_mask, logprob_and_entropy

Importing the package loads nothing else: what is named here is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megafork.algorithms.advantages import group_advantages
    from megafork.algorithms.forking import forking_mask
    from megafork.algorithms.gae import gae
    from megafork.algorithms.surrogates import clipped_policy_loss
    from megafork.config import TrainConfig
    from megafork.ops.top_fraction import top_fraction_threshold
    from megafork.ops.vocab_parallel import linear_logprob_and_entropy, logprob_and_entropy
    from megafork.train import train

__version__ = "0.1.0"
__all__ = [
    "TrainConfig",
    "clipped_policy_loss",
    "forking_mask",
    "gae",
    "group_advantages",
    "linear_logprob_and_entropy",
    "logprob_and_entropy",
    "top_fraction_threshold",
    "train",
]
_MODULES = {
    "TrainConfig": "megafork.config",
    "clipped_policy_loss": "megafork.algorithms.surrogates",
    "forking_mask": "megafork.algorithms.forking",
    "gae": "megafork.algorithms.gae",
    "group_advantages": "megafork.algorithms.advantages",
    "linear_logprob_and_entropy": "megafork.ops.vocab_parallel",
    "logprob_and_entropy": "megafork.ops.vocab_parallel",
    "top_fraction_threshold": "megafork.ops.top_fraction",
    "train": "megafork.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        from megafork.system.extras import missing

        package = missing(error.name)
        if package is None:
            raise
        raise ModuleNotFoundError(f"megafork.{name} needs {package}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
