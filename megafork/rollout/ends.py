"""The tokens that end a response: those that the model's files and the chat template name.

generation_config.json, config.json, the chat template and the tokenizer may each name another one.
Every end of the two configs and of the template ends a response. What they disagree on is told, and
so is an end that the model cannot produce.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megafork.config import GenerateConfig, TrainConfig
from megafork.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from megafork.errors import UserError
from megafork.model.hf_config import read_json
from megafork.model.shape import ModelShape, ends_of_configs

_TEMPLATE = "the chat template"


def stop_token_ids(shape: ModelShape, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a response: the configs', then those of the chat template in use."""
    template = (i for i in tokenizer.template_ends() if i < shape.vocab_size)
    return tuple(dict.fromkeys((*shape.eos_token_ids, *template)))


def check_ends(
    config: TrainConfig | GenerateConfig,
    shape: ModelShape,
    tokenizer_end: int | None,
    *,
    tell: bool = True,
) -> None:
    """Raise UserError where nothing could end a response; tell on stderr who disagrees.

    tokenizer_end: what the tokenizer's own files call the end of a text; it ends no response, but
    it is told where nobody else names it. With a chat template its tokenizer is loaded, unless
    there is nothing to tell.
    """
    if shape.eos_token_ids and not tell:
        return
    folder = Path(config.model.path)
    named = ends_of_configs(folder, read_json(folder / "config.json"))
    stops = shape.eos_token_ids
    if config.data.chat_template:
        tokenizer = load_tokenizer(config, chat_template=True)
        named[_TEMPLATE] = tokenizer.template_ends()
        stops = stop_token_ids(shape, tokenizer)
    if not stops and any(named.values()):
        raise UserError(
            f"model.path={folder}: {_listed(named)}, but its vocabulary has {shape.vocab_size} "
            "tokens, so no response could end: correct eos_token_id"
        )
    if not stops:
        raise UserError(
            f"model.path={folder}: neither generation_config.json nor config.json names an "
            "eos_token_id, so no response could end: add it"
        )
    if tell:
        for line in _notes(config, shape, named, stops, tokenizer_end):
            print(f"note: {line}", file=sys.stderr)


def _notes(
    config: TrainConfig | GenerateConfig,
    shape: ModelShape,
    named: dict[str, tuple[int, ...]],
    stops: tuple[int, ...],
    tokenizer_end: int | None,
) -> Iterator[str]:
    where = f"model.path={config.model.path}"
    said = {who: ids for who, ids in named.items() if ids}
    if len({frozenset(ids) for ids in said.values()}) > 1:
        yield f"{where}: {_listed(said)}: each of them ends a response"
    for who, ids in said.items():
        for token in ids:
            if token not in stops:
                yield (
                    f"{where}: {who} has the end {token}, which the model cannot produce: its "
                    f"vocabulary has {shape.vocab_size} tokens"
                )
    if tokenizer_end is not None and tokenizer_end not in stops:
        yield (
            f"{find_tokenizer(config).setting} ends a text with id {tokenizer_end}, which is not "
            f"among the eos_token_id of {where}: responses end at {_ids(stops)}"
        )


def _listed(named: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{who} ends at {_ids(ids)}" for who, ids in named.items() if ids)


def _ids(ids: tuple[int, ...]) -> str:
    return " or ".join(map(str, ids))
