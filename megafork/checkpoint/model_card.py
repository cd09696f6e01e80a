"""The model card of a run's final folder: its README.md, for people and for the hub."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCardData

import megafork
from megafork.config import TrainConfig
from megafork.system.printable import printable

CARD = "README.md"
_PAPER = "[arXiv 2506.01939](https://arxiv.org/abs/2506.01939)"
_SETTINGS = {
    "model": ("dtype",),
    "data": ("template", "chat_template", "enable_thinking", "seed"),
    "rollout": (
        *("prompts_per_step", "group_size", "max_response_tokens", "temperature"),
        *("dynamic_sampling", "max_policy_lag"),
    ),
    "algorithm": ("objective", "advantages", "clip_low", "clip_high", "denominator", "credit"),
    "forking": ("select", "rho", "rho_end", "scope", "entropy_of", "ties", "population"),
    "kl": ("coefficient",),
    "entropy_bonus": ("coefficient",),
    "training": (
        "prompts_per_minibatch",
        "lr",
        "warmup_steps",
        "weight_decay",
        "grad_clip",
        "seed",
    ),
    "parallel": ("tp", "pp", "cp", "vpp"),
    "checkpoint": ("final_dtype",),
}
"""The settings that a card tells, by section"""
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_DATA = re.compile(r"hf:([\w.-]+/[\w.-]+)")
_SIGNATURE = "<!-- Written by megafork, and again with the model unless it was changed: {} -->\n"
_SIGNED = _SIGNATURE.partition("{")[0]


def model_card(config: TrainConfig, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return the card of a run that has ended: what was trained, on what, how, and what it gave.

    evaluations: the rows of the run's eval.jsonl, first before training; none: no results.
    Of files on this machine it tells the name and not the folder, for cards are published.
    """
    base = _hub_model(config.model.path)
    of_hub = [_HUB_DATA.match(name) for name in _listed(config.data.train)]
    described = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        datasets=[name[1] for name in of_hub if name] or None,
        tags=["megafork", "reinforcement-learning", "rlvr"],
    )
    parts = [
        f"---\n{described.to_yaml()}\n---",
        f"# {_plain(Path(config.run.dir).resolve().name)}",
        _introduction(config, base),
        _results(config, evaluations),
        f"## Settings\n\n```toml\n{tomli_w.dumps(_told_settings(config)).rstrip()}\n```",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    return text + _SIGNATURE.format(_digest(text))


def is_unchanged(card: str) -> bool:
    """Return whether a card is as `model_card` wrote it, so that none of a user's words is lost."""
    text, found, signature = card.rpartition(_SIGNED)
    return bool(found) and found + signature == _SIGNATURE.format(_digest(text))


def commit() -> str | None:
    """Return the commit of the checkout that megafork runs from, or None for an installed one.

    It ends in -dirty where tracked files have changes that are not committed.
    """
    folder = Path(megafork.__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "__init__.py"],
            check=True,
            capture_output=True,
            timeout=30,
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _introduction(config: TrainConfig, base: str | None) -> str:
    """Return the sentence that says what it is, and a table of what it was made from."""
    known = commit()
    version = f"megafork {megafork.__version__}" + (f" (commit {known})" if known else "")
    held_out = [("held-out data", _names(config.data.eval))] if config.data.eval else []
    rows = [
        (
            "base model",
            f"[{base}](https://huggingface.co/{base})" if base else _code(_name(config.model.path)),
        ),
        ("training data", _names(config.data.train)),
        *held_out,
        ("verifier", ", ".join(map(_code, config.reward.verifiers))),
        (
            "steps",
            f"{config.training.steps} rollout batches of {config.rollout.prompts_per_step} "
            f"prompts, {config.rollout.group_size} responses each",
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"A policy trained by reinforcement learning from verifiable rewards with {version}. "
        f"{_selection(config)}.\n\n| | |\n|---|---|\n{table}"
    )


def _selection(config: TrainConfig) -> str:
    """Say which tokens carried the policy gradient."""
    forking = config.forking
    if forking.select == "all":
        return "All response tokens carried the policy gradient"
    share = f"{100 * forking.rho:g}%"
    if forking.rho_end is not None:
        share += f" to {100 * forking.rho_end:g}%"
    if forking.select == "top":
        return (
            f"The forking tokens, the {share} of the response tokens with the highest entropy, "
            f"carried the policy gradient ({_PAPER})"
        )
    return (
        f"{share} of the response tokens, selected by {_code(forking.select)}, carried the policy "
        f"gradient (compare {_PAPER})"
    )


def _results(config: TrainConfig, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The held-out accuracy before and after training with its interval; empty if there is none."""
    if not evaluations:
        return ""
    lines = []
    for row in (evaluations[0], evaluations[-1])[: len(evaluations)]:
        when = "before training" if row["step"] == 0 else f"after step {row['step']}"
        value, low, high = (row[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
        lines.append(f"| {when} | {value:.1%} | {low:.1%} to {high:.1%} |")
    last = evaluations[-1]
    return (
        f"## Results\n\nHeld-out accuracy: the mean over {last['eval/problems']} problems and "
        f"{last['eval/samples']} responses at temperature {config.eval.temperature:g}.\n\n"
        "| | accuracy | 95% interval over problems |\n|---|---|---|\n" + "\n".join(lines)
    )


def _told_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of `_SETTINGS` that are set, as TOML has them."""
    everything = config.model_dump(mode="json", exclude_none=True)
    told = {
        section: {key: everything[section][key] for key in keys if key in everything[section]}
        for section, keys in _SETTINGS.items()
    }
    return {section: values for section, values in told.items() if values}


def _hub_model(path: str) -> str | None:
    """The model's id on the hub, where `path` is one or lies in the hub's cache; else None."""
    if cached := _HUB_CACHE.search(str(Path(path).absolute()) + "/"):
        return f"{cached[1]}/{cached[2]}"
    return path if _HUB_ID.fullmatch(path) and not Path(path).exists() else None


def _listed(data: str | list[str]) -> list[str]:
    return [data] if isinstance(data, str) else data


def _names(data: str | list[str]) -> str:
    return ", ".join(_code(_name(path)) for path in _listed(data))


def _name(path: str) -> str:
    return path if path.startswith("hf:") else Path(path).name


def _plain(text: str) -> str:
    return printable(text).replace("\n", " ")


def _code(text: str) -> str:
    """A code span that fits a table's cell."""
    return f"`{_plain(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
