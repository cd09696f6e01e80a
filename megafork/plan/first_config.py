"""`megafork init`: a first config for a model and a data file, after a look at both."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from megafork.answers.places import BOXED, gold_answer
from megafork.config import TrainConfig
from megafork.config.load import load_config, settings_of
from megafork.config.settings import known_settings
from megafork.data.columns import ANSWERS, PROMPTS, Wanted, choose, look_up
from megafork.data.prompts import read_prompts
from megafork.data.row_reader import turns_in
from megafork.data.tables import HUB, files_of, read_table
from megafork.data.tokenizer import load_tokenizer
from megafork.errors import UserError
from megafork.model.hf_config import read_json
from megafork.model.shape import ModelShape
from megafork.trainer.preflight import check_train
from megafork.verifiers.names import load_verifier

NAME = "config.toml"
_LOOKED_AT = 200
"""Rows from whose answers the verifier is guessed"""
_MATHS = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
_RESPONSE_TOKENS, _MICRO_BATCH_TOKENS, _PROMPTS_PER_STEP = 4096, 16384, 64
"""At most, of a first run; without a GPU a micro-batch is one sequence, and"""
_RESPONSE_TOKENS_WITHOUT_GPU = 1024

Found = dict[str, tuple[Any, str]]
"""The settings of a first config: (value, why it was chosen), by key"""


def write_first_config(
    folder: Path,
    model: Path,
    data: str,
    verifier: str | None,
    overrides: Sequence[str],
    *,
    tell: Callable[[str], object],
) -> None:
    """Write `folder`/config.toml, which `megafork train` accepts, and tell what was chosen.

    verifier: None: guessed from the answers. overrides: section.key=value, which win over what is
    chosen and are written too. Raises UserError for what a start of the run would refuse, and for a
    config that is there already.
    """
    path = folder / NAME
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} is there already: choose another folder, or remove it")
    shape = ModelShape.from_folder(model, setting="--model")
    found = _of_files(folder, model, data, overrides)
    found |= _of_rows(data, verifier, found, overrides)
    found |= _sizes(shape, _config(found, overrides))
    config = _config(found, overrides)
    check_train(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(_written(path, config, found, overrides), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    values = dict(settings_of(config))
    for key in ("data.prompt_key", "data.answer_key", "reward.verifier", "data.chat_template"):
        tell(f"{key} = {_toml(values[key])}: {found[key][1] if key in found else 'as given'}")
    tell(f"wrote {path}; look at it, then: {_dry_run(path)}")


def _of_files(folder: Path, model: Path, data: str, overrides: Sequence[str]) -> Found:
    """Return where things are, the weights' dtype, and the columns of the data."""
    is_float32 = _dtype(model) == "float32"
    train = data if data.startswith(HUB) else str(Path(data).absolute())
    row = _rows(data, 1)[0]
    prompt = _column(row, PROMPTS, "data.prompt_key", data, overrides)
    answer = _column(row, ANSWERS, "data.answer_key", data, overrides)
    return {
        "run.dir": (str((folder / "run").absolute()), "checkpoints, metrics and report go here"),
        "model.path": (str(model.absolute()), "config.json, tokenizer and safetensors"),
        "model.dtype": ("float32" if is_float32 else "bfloat16", "by the model's config.json"),
        "data.train": (train, "add data.eval, rows of the same kind, to see held-out accuracy"),
        "data.prompt_key": (prompt, "the column with the prompt"),
        "data.answer_key": (answer, "the column that the verifier compares with"),
        "reward.verifier": ("maths", ""),
        "training.steps": (100, "rollout batches"),
    }


def _dtype(model: Path) -> Any:
    raw = read_json(model / "config.json")
    return raw.get("dtype", raw.get("torch_dtype"))


def _rows(data: str, number: int) -> list[dict[str, Any]]:
    """Return the first rows with all of their columns."""
    try:
        tables = (read_table(path, Wanted((), everything=True)) for path in files_of(data))
        rows = [row for _, row in itertools.islice(itertools.chain.from_iterable(tables), number)]
    except OSError as error:
        raise UserError(f"--data {data} cannot be read: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--data {data} holds no rows with columns: give one object a line")
    return rows


def _column(
    row: dict[str, Any],
    names: Sequence[Sequence[str]],
    key: str,
    data: str,
    overrides: Sequence[str],
) -> str:
    """Return the one of `names` that the row has; what an override says comes before."""
    for override in overrides:
        if override.startswith(f"{key}="):
            return override.partition("=")[2]
    return choose(row, names, key, f"--data {data}")


def _of_rows(data: str, verifier: str | None, found: Found, overrides: Sequence[str]) -> Found:
    """Return verifier, template and chat template, by the rows and the tokenizer."""
    config = _config(found, overrides)
    rows = _rows(data, _LOOKED_AT)
    prompt_key, answer_key = (found[f"data.{name}_key"][0] for name in ("prompt", "answer"))
    prompts = [_value(row, prompt_key) for row in rows]
    answers = [str(_value(row, answer_key)) for row in rows]
    of_rows: Found = {
        "reward.verifier": (verifier, "as given") if verifier else _guess(prompts, answers)
    }
    are_turns = isinstance(prompts[0], list)
    is_base = "base" in Path(config.model.path).name.lower()
    if are_turns:
        of_rows["data.chat_template"] = True, "the prompts are lists of chat turns"
    elif is_base or not _has_chat_template(config):
        of_rows["data.chat_template"] = False, "a base model, or a tokenizer without a template"
    else:
        of_rows["data.chat_template"] = True, "the tokenizer has one; a base model needs none"
    asks = "boxed" in str(prompts[0])
    if of_rows["reward.verifier"][0] == "maths" and not are_turns and not asks:
        of_rows["data.template"] = _MATHS, "the verifier looks for the answer in the box"
    return of_rows


def _value(row: dict[str, Any], key: str) -> Any:
    try:
        value = look_up(row, key)
    except KeyError:  # the check of the rows tells it
        return ""
    return turns_in(value) if isinstance(value, str) else value


def _guess(prompts: Sequence[Any], answers: Sequence[str]) -> tuple[str, str]:
    """Return the verifier that fits, and why."""
    countdown = load_verifier("countdown")
    try:
        for prompt, answer in zip(prompts, answers, strict=True):
            countdown(prompt if isinstance(prompt, str) else "", "", answer)
    except UserError:
        gold = [gold_answer(answer, BOXED) for answer in answers]
        share = sum(any(c.isdigit() or c == "\\" for c in answer) for answer in gold) / len(gold)
        if share < 0.5:
            return "exact", f"{1 - share:.0%} of the answers hold no number: compared as text"
        return "maths", f"{share:.0%} of the answers hold a number or a formula"
    return "countdown", "the prompts are numbers and a target"


def _has_chat_template(config: TrainConfig) -> bool:
    try:
        load_tokenizer(config, chat_template=True)
    except UserError:
        return False
    return True


def _sizes(shape: ModelShape, config: TrainConfig) -> Found:
    """Return lengths and batch sizes that fit the model's positions and the number of rows.

    Raises UserError for a prompt that leaves a response no position.
    """
    options = config.data.chat_template, config.data.enable_thinking
    tokenizer = load_tokenizer(config, chat_template=options[0], enable_thinking=options[1])
    of_any_length = config.data.model_copy(update={"max_prompt_tokens": sys.maxsize})
    prompts = read_prompts(config.data.train, of_any_length, tokenizer.encode_prompt)
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest >= shape.max_positions:
        raise UserError(
            f"--data {config.data.train}: the longest prompt has {longest} tokens, but the model "
            f"has {shape.max_positions} positions: remove such rows, or take another model"
        )
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    most = _RESPONSE_TOKENS if has_gpu else _RESPONSE_TOKENS_WITHOUT_GPU
    response = min(most, shape.max_positions - longest)
    per_step = min(_PROMPTS_PER_STEP, 1 << (len(prompts).bit_length() - 1))
    return {
        "data.max_prompt_tokens": (longest, "the longest prompt of the file"),
        "rollout.placement": ("colocated", "trainer and server in turns; one GPU is enough"),
        "rollout.prompts_per_step": (per_step, f"of the file's {len(prompts)} prompts"),
        "rollout.group_size": (8, "responses for each prompt"),
        "rollout.max_response_tokens": (
            response,
            f"of the model's {shape.max_positions} positions"
            + ("" if has_gpu else "; short, for there is no GPU here"),
        ),
        "training.prompts_per_minibatch": (
            max(1, per_step // 2),
            "two updates for each rollout batch",
        ),
        "training.micro_batch_tokens": (
            max(longest + response, _MICRO_BATCH_TOKENS if has_gpu else 0),
            "on one rank at a time, one whole sequence at least: raise it while memory lasts",
        ),
    }


def _config(found: Found, overrides: Sequence[str]) -> TrainConfig:
    """Return the config so far. Raises UserError for overrides that are wrong."""
    settings = [f"{key}={json.dumps(value)}" for key, (value, _) in found.items()]
    return load_config(TrainConfig, None, [*settings, *overrides])


def _written(path: Path, config: TrainConfig, found: Found, overrides: Sequence[str]) -> str:
    """Return the TOML, section by section, each setting under a comment."""
    values = dict(settings_of(config))
    meanings = {setting.key: setting.meaning for setting in known_settings(TrainConfig)}
    given = {override.partition("=")[0] for override in overrides}
    whys = {key: why for key, (_, why) in found.items()}
    whys |= {key: meanings[key] for key in values if key in given}
    lines = [
        "# A first run, written by `megafork init`. All other settings have their defaults, which",
        "# are DAPO's with the gradient on the 20% of the tokens with the highest entropy:",
        "# `megafork keys` lists them, and each can be set here or behind the command.",
        f"#     {_dry_run(path)}",
    ]
    section = ""
    for key in [key for key in values if key in whys]:
        name, leaf = key.split(".")
        lines += ["", f"[{name}]"] if name != section else []
        lines += [f"# {whys[key]}", f"{leaf} = {_toml(values[key])}"]
        section = name
    return "\n".join(lines) + "\n"


def _dry_run(path: Path) -> str:
    return f"megafork train {shlex.quote(str(path))} --dry-run"


def _toml(value: Any) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip()
