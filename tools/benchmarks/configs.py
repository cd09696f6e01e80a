"""Settings of a policy or a critic alone, without data or a verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megafork.config import TrainConfig


def learner_config(folder: Path, /, **sections: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run of one step on the model in `folder`, in float32.

    sections: of the settings, as of a TOML file; they come before these.
    """
    given: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "data": {"train": "unused.jsonl"},
        "reward": {"verifier": "exact"},
        "model": {"path": str(folder), "dtype": "float32"},
        "training": {"steps": 1},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return TrainConfig.model_validate(given)
