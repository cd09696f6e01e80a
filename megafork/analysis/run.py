"""`megafork analyze run`: every analysis of a run, from its folder to tables and figures.

The responses are scored by the model before training, by the kept checkpoints and by the final one,
each in a process of its own, as a user would by hand.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megafork.analysis.entropy import entropy_tables, write_entropy
from megafork.analysis.from_run import generate_settings, score_settings, verifier_settings
from megafork.analysis.glyphs import Font
from megafork.analysis.output import make_folder, write_json
from megafork.analysis.pairs import (
    Scope,
    entropy_change,
    overlap,
    write_change,
    write_overlap,
)
from megafork.analysis.scored import Scored, read_scored
from megafork.analysis.tokens import rank_tokens, write_tokens
from megafork.analysis.training import training_table, write_training
from megafork.cluster import launch
from megafork.config import ScoreConfig, TrainConfig
from megafork.config.load import load_config
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.errors import USER_ERROR, PeerError, UserError
from megafork.model.hf_model import check_folder
from megafork.rollout.journal import journalled_steps, journals_of, read_step
from megafork.system.disk import naming
from megafork.system.signals import ended_by_signals

ROLLOUTS, GENERATE = "rollouts", "generate"
INITIAL, FINAL = "initial", "final"


@dataclass(frozen=True)
class RunAnalysis:
    """The options of `megafork analyze run`."""

    run: Path
    output: Path
    responses: str
    """ROLLOUTS, GENERATE, or the path of a jsonl that `megafork score` reads"""
    samples: int
    """for each prompt, where responses are generated"""
    temperatures: bool
    """also the sweep of two temperatures"""
    last_steps: int
    """with ROLLOUTS: of this many steps"""
    initial: Path | None
    """HF folder; None: the run's model.path"""
    all_checkpoints: bool
    rho: float | None
    """None: the run's forking.rho"""
    scope: Scope
    min_count: int
    min_responses: int
    num_words: int
    font: Font
    overrides: Sequence[str]
    """`megafork score`'s"""


@dataclass(frozen=True)
class _Plan:
    """The parts of the run that are analyzed, checked."""

    initial: Path
    final: Path
    checkpoints: list[tuple[int, Path]]
    """(step, folder), sharded"""
    steps: list[int]
    table: list[dict[str, Any]]
    """of training_table"""
    prompts: str
    """data to generate from: data.eval, or data.train"""
    generate_settings: list[str]
    score_settings: list[str]
    eval_settings: list[str]
    vocab_size: int
    tokenizer: Tokenizer
    rho: float

    @property
    def last_step(self) -> int:
        return self.table[-1]["step"]


def analyze_run(asked: RunAnalysis) -> None:
    """Write responses, scores, tables and figures into asked.output.

    Raises UserError for a run that is not whole, before anything is written.
    """
    plan = _plan(asked)
    folder = make_folder(asked.output)
    responses = _responses(asked, plan)
    # The tables come last: all that may fail for long is before them.
    base = _read(_score(plan.initial, responses, INITIAL, folder, plan), plan)
    overlaps = []
    for step, checkpoint in plan.checkpoints:
        label = f"step_{step:06d}"
        with _converted(checkpoint, folder) as model:
            scored = read_scored(_score(model, responses, label, folder, plan))
        overlaps.append((label, overlap(base, scored, plan.rho, asked.scope)))
    final = _read(_score(plan.final, responses, FINAL, folder, plan), plan)
    last = f"step_{plan.last_step:06d}"
    overlaps.append((last, overlap(base, final, plan.rho, asked.scope)))
    write_overlap(overlaps, INITIAL, plan.rho, asked.scope, folder)
    for label, scored in ((INITIAL, base), (FINAL, final)):
        tables = entropy_tables(scored)
        write_entropy(tables, label, folder, f"entropy_{label}")
        ranked = rank_tokens(
            scored, plan.vocab_size, plan.tokenizer.name, asked.min_count, asked.min_responses
        )
        name = f"tokens_{label}"
        write_tokens(ranked, label, folder, name, num_words=asked.num_words, font=asked.font)
    write_change(*entropy_change(base, final), INITIAL, FINAL, folder)
    write_training(plan.table, asked.run.resolve().name, folder)
    if asked.temperatures:
        _sweep(plan, tables.p80, folder / "temperatures")
    about = {
        "run": str(asked.run),
        "initial": str(plan.initial),
        "responses": _sources(asked.run, plan) or [str(responses)],
        "num_responses": len(base.length_B),
        "num_tokens": base.num_tokens,
        "score_settings": plan.score_settings,
        "rho": plan.rho,
        "scope": asked.scope,
    }
    write_json(folder / "analysis.json", about)


def _plan(asked: RunAnalysis) -> _Plan:
    if launch.under_torchrun():
        raise UserError("start `megafork analyze run` plainly: it starts the ranks of each scoring")
    path = asked.run / "config.toml"
    if not path.is_file():
        raise UserError(f"{asked.run}: there is no run in this folder (no config.toml)")
    config = load_config(TrainConfig, path, [])
    if asked.initial is not None and not asked.initial.is_dir():
        raise UserError(f"--initial {asked.initial} is no folder: give the model before training")
    initial = asked.initial or Path(config.model.path)
    if not initial.is_dir():
        raise UserError(
            f"model.path={initial} of {path} is not there: start in the folder that the run was "
            "started in, or name the model with --initial"
        )
    final = asked.run / "checkpoints" / FINAL
    if not final.is_dir():
        raise UserError(f"{final} does not exist: end the run first (megafork train --resume)")
    if asked.responses not in (ROLLOUTS, GENERATE) and not Path(asked.responses).is_file():
        raise UserError(
            f"--responses={asked.responses} is no file: give {ROLLOUTS!r}, {GENERATE!r} or a jsonl "
            "that `megafork score` reads"
        )
    own = config.forking.entropy_temperature or config.rollout.temperature
    if asked.temperatures and (own, config.rollout.temperature) != (1.0, 1.0):
        raise UserError(
            "--temperatures takes its threshold and its baseline at temperature 1, but the run has "
            f"rollout.temperature={config.rollout.temperature:g} and entropies at {own:g}: use "
            "`megafork analyze temperatures` by itself"
        )
    settings = [*score_settings(config), *asked.overrides]
    score = load_config(ScoreConfig, None, [f"model.path={json.dumps(str(initial))}", *settings])
    shape = check_folder(initial).shape
    shape.check(score.model, score.parallel)
    samples = [f"rollout.samples={asked.samples}"]
    generated = [*generate_settings(config), *samples]
    table = training_table(asked.run)
    if table[-1]["step"] < config.training.steps:  # a run that was made longer keeps its old model
        raise UserError(
            f"{asked.run} has done {table[-1]['step']} of training.steps={config.training.steps}, "
            f"so {final} is not its last policy: end the run first (megafork train --resume)"
        )
    return _Plan(
        initial=initial,
        final=final,
        checkpoints=_checkpoints(asked.run, table[-1]["step"]) if asked.all_checkpoints else [],
        steps=_steps(asked.run, asked.last_steps) if asked.responses == ROLLOUTS else [],
        table=table,
        prompts=config.data.eval or config.data.train,
        generate_settings=generated,
        score_settings=settings,
        eval_settings=[*generated, *verifier_settings(config)],
        vocab_size=shape.vocab_size,
        tokenizer=load_tokenizer(score, chat_template=False),
        rho=config.forking.rho if asked.rho is None else asked.rho,
    )


def _steps(run: Path, last_steps: int) -> list[int]:
    """The last steps that have responses."""
    found = journalled_steps(run / "rollouts")[-last_steps:]
    if not found:
        raise UserError(f"{run / 'rollouts'} holds no responses: name a file of some (--responses)")
    return found


def _sources(run: Path, plan: _Plan) -> list[str]:
    return [str(path) for step in plan.steps for path in journals_of(run / "rollouts", step)]


def _checkpoints(run: Path, last_step: int) -> list[tuple[int, Path]]:
    """(step, folder) of each kept before the last step, whose weights are the final folder's."""
    names = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in (run / "checkpoints").iterdir()]
    steps = sorted((int(match[1]), path) for match, path in names if match)
    return [(step, path) for step, path in steps if 0 < step < last_step]


def _responses(asked: RunAnalysis, plan: _Plan) -> Path:
    """The jsonl to score: the user's, or one written into the output folder."""
    if asked.responses not in (ROLLOUTS, GENERATE):
        return Path(asked.responses)
    path = asked.output / "responses.jsonl"
    if asked.responses == GENERATE:
        _megafork(
            *("generate", "--model", plan.final, "--data", plan.prompts, "--output", path),
            *plan.generate_settings,
        )
        return path
    write_rollouts(asked.run / "rollouts", plan.steps, path)
    return path


def write_rollouts(folder: Path, steps: Sequence[int], output: Path) -> None:
    """The whole groups of those steps of RUN/rollouts, one response a line, as `megafork score`
    reads them.

    A damaged group is left out with a warning. Raises UserError where none has a response.
    """
    count = 0
    partial = output.with_name(output.name + ".partial")
    with naming(partial), partial.open("w", encoding="utf-8") as sink:
        for step in steps:
            for group in read_step(folder, step).values():
                for sample in group.samples if group.is_whole else []:
                    row = {
                        "id": sample.uid,
                        "prompt_ids": group.prompt_ids,
                        "response_ids": sample.token_ids.tolist(),
                        "rollout_logprobs": sample.logprobs.tolist(),
                        "finish_reason": "length" if sample.truncated else "stop",
                        "accuracy": sample.accuracy,
                        "step": step,
                    }
                    sink.write(json.dumps(row) + "\n")
                    count += 1
    if not count:
        partial.unlink()
        raise UserError(f"{folder}, step {', '.join(map(str, steps))}: no whole group of responses")
    partial.replace(output)


def _score(model: Path, responses: Path, label: str, folder: Path, plan: _Plan) -> Path:
    """The file of scores, written."""
    output = folder / f"scored_{label}.jsonl"
    _megafork(
        *("score", "--model", model, "--input", responses, "--output", output),
        *plan.score_settings,
    )
    return output


def _read(path: Path, plan: _Plan) -> Scored:
    """With ids, for the analysis of tokens."""
    return read_scored(path, vocab_size=plan.vocab_size)


@contextmanager
def _converted(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """A sharded checkpoint as an HF folder, which is gone at the end, by a signal too: a folder of
    weights is the largest thing here."""
    with ended_by_signals(), TemporaryDirectory(prefix=".converted-", dir=folder) as name:
        model = Path(name) / "hf"
        _megafork("convert", "megatron-to-hf", "--hf", model, "--megatron", checkpoint)
        yield model


def _sweep(plan: _Plan, threshold: float, output: Path) -> None:
    _megafork(
        *("analyze", "temperatures", "--model", plan.final, "--data", plan.prompts),
        *("--output", output, f"sweep.threshold={threshold:.6g}"),
        *plan.eval_settings,
    )


def _megafork(*arguments: object) -> None:
    """`megafork ARGUMENTS` in a process of its own, which ends with this one's signals.

    Raises UserError when it fails; it has told why.
    """
    command = [sys.executable, "-m", "megafork", *map(str, arguments)]
    with ended_by_signals(), subprocess.Popen(command) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status == USER_ERROR:
        raise PeerError(f"`megafork {arguments[0]}` failed")
    if status:
        raise UserError(f"`{' '.join(command)}` ended with status {status}; see above")
