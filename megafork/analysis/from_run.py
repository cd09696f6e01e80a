"""A run's settings, as overrides of the commands that look at its models."""

from __future__ import annotations

import json

from megafork.config import EvaluateConfig, GenerateConfig, ScoreConfig, Section, TrainConfig


def score_settings(config: TrainConfig) -> list[str]:
    """Overrides for `megafork score`: layout, tokenizer, how many tokens a rank holds at a time,
    and the temperature of the run's entropies."""
    temperature = config.forking.entropy_temperature or config.rollout.temperature
    return [
        *_changed(config, ScoreConfig, "parallel", "tokenizer"),
        f"micro_batch_tokens={config.training.micro_batch_tokens}",
        f"temperature={json.dumps(temperature)}",
    ]


def generate_settings(config: TrainConfig) -> list[str]:
    """Overrides for `megafork generate`: prompts, tokenizer, server and sampling."""
    changed = _changed(config, GenerateConfig, "tokenizer", "data", "rollout")
    # A server that the run was given at rollout.url holds the trainer's weights.
    kept = [setting for setting in changed if not setting.startswith("rollout.url=")]
    return [*kept, 'data.id_key=""']


def eval_settings(config: TrainConfig) -> list[str]:
    """Overrides for `megafork eval`: the above and the verifier, without what shapes rewards."""
    reward = _changed(config, EvaluateConfig, "reward")
    kept = [setting for setting in reward if not setting.startswith("reward.overlong_")]
    return generate_settings(config) + kept


def _changed(config: TrainConfig, command: type[Section], *sections: str) -> list[str]:
    """SECTION.KEY=VALUE for all values that are not the default and that the command knows too."""
    found = []
    for section in sections:
        known = command.model_fields[section].annotation
        assert isinstance(known, type) and issubclass(known, Section)
        for key, value in getattr(config, section).model_dump(exclude_defaults=True).items():
            if value is not None and key in known.model_fields:
                found.append(f"{section}.{key}={json.dumps(value)}")
    return found
