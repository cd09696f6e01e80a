"""Settings of `megafork eval` and `generate` on the quickstart's model."""

from __future__ import annotations

from megafork.config.load import load_config
from tests.helpers.commands import QUICKSTART

MODEL = QUICKSTART / "model"


SETTINGS = [
    "data.prompt_key=prompt",
    "data.max_prompt_tokens=24",
    "rollout.max_response_tokens=24",
    "rollout.samples=4",
]


def config(kind, *settings, model=MODEL):
    return load_config(kind, None, [f"model.path={model}", *SETTINGS, *settings])
