"""A run's settings, as overrides of the commands that look at its models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from megafork.config import GenerateConfig, ScoreConfig, Section, TrainConfig
from megafork.config.rollouts import RewardConfig

_OF_TRAINING = {"overlong_buffer_tokens", "overlong_penalty"}
_URL = "rollout.url="
"""of a server whose weights are the trainer's"""


def score_settings(config: TrainConfig) -> list[str]:
    """`megafork score`'s: layout, tokenizer, how much a rank holds at a time, and the temperature
    of the run's entropies."""
    temperature = config.forking.entropy_temperature or config.rollout.temperature
    return [
        *_shared(config, ScoreConfig, ("parallel", "tokenizer")),
        f"micro_batch_tokens={config.training.micro_batch_tokens}",
        f"temperature={json.dumps(temperature)}",
    ]


def generate_settings(config: TrainConfig) -> list[str]:
    """`megafork generate`'s: prompts, tokenizer, server and how responses are sampled."""
    shared = _shared(config, GenerateConfig, ("tokenizer", "data", "rollout"))
    return [
        *(setting for setting in shared if not setting.startswith(_URL)),
        *_overrides("data", {"prompt_key": config.data.prompt_key, "id_key": ""}),
    ]


def verifier_settings(config: TrainConfig) -> list[str]:
    """`megafork eval`'s, beyond generate_settings."""
    changed = config.reward.model_dump(exclude_defaults=True)
    return _overrides("reward", changed, RewardConfig.model_fields.keys() - _OF_TRAINING)


def _shared(config: TrainConfig, kind: type[Section], sections: Iterable[str]) -> list[str]:
    """Of each section what is no default and what the other command knows too."""
    found = []
    for name in sections:
        of_command = kind.model_fields[name].annotation
        assert isinstance(of_command, type) and issubclass(of_command, Section)
        changed = getattr(config, name).model_dump(exclude_defaults=True)
        found += _overrides(name, changed, of_command.model_fields.keys())
    return found


def _overrides(
    section: str, values: Mapping[str, Any], known: Iterable[str] | None = None
) -> list[str]:
    return [
        f"{section}.{key}={json.dumps(value)}"
        for key, value in values.items()
        if value is not None and (known is None or key in known)
    ]
