"""Models by their name on the Hugging Face hub: downloaded once, then taken from its cache."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TypeVar

from megafork.config import Section
from megafork.errors import UserError

C = TypeVar("C", bound=Section)
HUB = "hf:"
_NAME = re.compile(r"([\w][\w.-]*)/([\w][\w.-]*)(?:@([\w./-]+))?")
_SIDE_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
"""Config and tokenizer"""
_OTHER_FORMATS = ["original/*", "metal/*"]
"""The same weights once more, as some publish them"""


def hub_name(path: str) -> str | None:
    """Return owner/name or owner/name@revision where `path` names a model on the hub, else None.

    A path whose folder or first part is here is none: somebody has mistyped the rest.
    """
    name = path.removeprefix(HUB)
    match = _NAME.fullmatch(name)
    if match is None or (name == path and Path(match[1]).exists()):
        return None
    return name


def fetch(name: str, *, setting: str, weights: bool = True) -> str:
    """Return the folder of a model of the hub, with what is not in its cache yet downloaded.

    name: as of `hub_name`. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning. weights:
    False leaves them out. Raises UserError where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[*_SIDE_FILES, *(["*.safetensors"] if weights else [])],
            ignore_patterns=_OTHER_FORMATS,
        )
    except Exception as error:  # the hub, the network and the disk raise what they like
        cause = error.__cause__ or error
        told = str(cause).strip().split("\n")[0]
        raise UserError(
            f"{setting}={name} is no folder here, and the Hugging Face hub does not give it "
            f"({type(cause).__name__}: {told}): check the name, the network, HF_HUB_OFFLINE and, "
            "for a model with conditions, HF_TOKEN; or give a local folder that holds the model"
        ) from None


def with_local_models(config: C, *, weights: bool = True, tell: bool = True) -> C:
    """Return the config with a folder for every model that it names by a name of the hub.

    weights: False fetches only configs and tokenizers. tell: say where they are. Raises UserError
    as `fetch`.
    """
    for section, key in (
        ("model", "path"),
        ("tokenizer", "path"),
        ("kl", "reference"),
        ("critic", "path"),
    ):
        held: Section | None = dict(config).get(section)
        given = None if held is None else dict(held)[key]
        if held is None or given is None or (name := hub_name(given)) is None:
            continue
        setting = f"{section}.{key}"
        folder = fetch(name, setting=setting, weights=weights and section != "tokenizer")
        if tell:
            print(f"note: {setting}={name} is in {folder}", file=sys.stderr, flush=True)
        config = config.model_copy(update={section: held.model_copy(update={key: folder})})
    return config
