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
from megafork.analysis.from_run import eval_settings, generate_settings, score_settings
from megafork.analysis.glyphs import Font
from megafork.analysis.output import make_folder, whole_file, write_json
from megafork.analysis.pairs import Scope, entropy_change, overlap, write_change, write_overlap
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
    """steps whose rollouts are taken, with ROLLOUTS"""
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
    """settings of `megafork score`"""


@dataclass(frozen=True)
class _Run:
    """The parts of the run that are analyzed, checked."""

    config: TrainConfig
    initial: Path
    final: Path
    checkpoints: list[tuple[int, Path]]
    """(step, folder), sharded"""
    steps: list[int]
    """steps whose rollouts are taken"""
    data: list[str]
    """Options that name the prompts to generate responses to: held-out ones where there are any"""
    table: list[dict[str, Any]]
    """rows of training.csv"""
    score_settings: list[str]
    vocab_size: int
    tokenizer: Tokenizer


def analyze_run(asked: RunAnalysis) -> None:
    """Write responses, scores, tables and figures into asked.output.

    Raises UserError for a run that is not whole, before anything is written.
    """
    run = _checked(asked)
    rho = run.config.forking.rho if asked.rho is None else asked.rho
    folder = make_folder(asked.output)
    responses = _responses(asked, run)
    # The tables come last: all that may fail for long is before them.
    base = _scored(run.initial, responses, INITIAL, folder, run)
    overlaps = []
    for step, checkpoint in run.checkpoints:
        label = f"step_{step:06d}"
        with _converted(checkpoint, folder) as model:
            scored = _scored(model, responses, label, folder, run)
        overlaps.append((label, overlap(base, scored, rho, asked.scope)))
    final = _scored(run.final, responses, FINAL, folder, run)
    last = f"step_{run.table[-1]['step']:06d}"
    overlaps.append((last, overlap(base, final, rho, asked.scope)))
    write_overlap(overlaps, INITIAL, rho, asked.scope, folder)
    for label, scored in ((INITIAL, base), (FINAL, final)):
        tables = entropy_tables(scored)
        write_entropy(tables, label, folder, f"entropy_{label}")
        ranked = rank_tokens(
            scored, run.vocab_size, run.tokenizer.name, asked.min_count, asked.min_responses
        )
        name = f"tokens_{label}"
        write_tokens(ranked, label, folder, name, num_words=asked.num_words, font=asked.font)
    write_change(*entropy_change(base, final), INITIAL, FINAL, folder)
    write_training(run.table, asked.run, folder)
    if asked.temperatures:
        _megafork(
            *("analyze", "temperatures", "--model", run.final, *run.data),
            *("--output", folder / "temperatures", f"sweep.threshold={tables.p80:.6g}"),
            *(*eval_settings(run.config), f"rollout.samples={asked.samples}"),
        )
    journals = [p for step in run.steps for p in journals_of(asked.run / "rollouts", step)]
    about = {
        "run": str(asked.run),
        "initial": str(run.initial),
        "responses": [str(path) for path in journals] or [str(responses)],
        "num_responses": len(base.length_B),
        "num_tokens": base.num_tokens,
        "score_settings": run.score_settings,
        "rho": rho,
        "scope": asked.scope,
    }
    write_json(folder / "analysis.json", about)


def _checked(asked: RunAnalysis) -> _Run:
    """Read the run's folder. Raises UserError for whatever is missing or wrong in it."""
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
    table = training_table(asked.run)
    if table[-1]["step"] < config.training.steps:  # a run that was made longer keeps its old model
        raise UserError(
            f"{asked.run} has done {table[-1]['step']} of training.steps={config.training.steps}, "
            f"so {final} is not its last policy: end the run first (megafork train --resume)"
        )
    prompts = config.data.eval or config.data.train
    files = [prompts] if isinstance(prompts, str) else prompts
    return _Run(
        config,
        initial,
        final,
        checkpoints=_checkpoints(asked.run, table[-1]["step"]) if asked.all_checkpoints else [],
        steps=_steps(asked.run, asked.last_steps) if asked.responses == ROLLOUTS else [],
        data=[text for name in files for text in ("--data", name)],
        table=table,
        score_settings=settings,
        vocab_size=shape.vocab_size,
        tokenizer=load_tokenizer(score, chat_template=False),
    )


def _steps(run: Path, last_steps: int) -> list[int]:
    """The last steps that have responses."""
    found = journalled_steps(run / "rollouts")[-last_steps:]
    if not found:
        raise UserError(f"{run / 'rollouts'} holds no responses: name a file of some (--responses)")
    return found


def _checkpoints(run: Path, last_step: int) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint before the last step, whose weights are the final one's."""
    names = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in (run / "checkpoints").iterdir()]
    steps = sorted((int(match[1]), path) for match, path in names if match)
    return [(step, path) for step, path in steps if 0 < step < last_step]


def _responses(asked: RunAnalysis, run: _Run) -> Path:
    """The jsonl to score: the user's, or one written into the output folder."""
    if asked.responses not in (ROLLOUTS, GENERATE):
        return Path(asked.responses)
    path = asked.output / "responses.jsonl"
    if asked.responses == GENERATE:
        _megafork(
            *("generate", "--model", run.final, *run.data),
            *("--output", path, *generate_settings(run.config)),
            f"rollout.samples={asked.samples}",
        )
        return path
    write_rollouts(asked.run / "rollouts", run.steps, path)
    return path


def write_rollouts(folder: Path, steps: Sequence[int], output: Path) -> None:
    """Write the whole groups of those steps of RUN/rollouts, one response a line, as `megafork
    score` reads them.

    A damaged group is left out with a warning. Raises UserError where none has a response.
    """
    count = 0
    with whole_file(output) as partial, partial.open("w", encoding="utf-8") as sink:
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
            numbers = ", ".join(map(str, steps))
            raise UserError(f"{folder}, step {numbers}: no whole group of responses")


def _scored(model: Path, responses: Path, label: str, folder: Path, run: _Run) -> Scored:
    """Score the responses into FOLDER/scored_LABEL.jsonl and read them with their token ids."""
    output = folder / f"scored_{label}.jsonl"
    _megafork(
        *("score", "--model", model, "--input", responses, "--output", output),
        *run.score_settings,
    )
    return read_scored(output, vocab_size=run.vocab_size)


@contextmanager
def _converted(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """Convert a sharded checkpoint to an HF folder, which is gone at the end, after a signal too,
    because a folder of weights is the largest thing here."""
    with ended_by_signals(), TemporaryDirectory(prefix=".converted-", dir=folder) as name:
        model = Path(name) / "hf"
        _megafork("convert", "megatron-to-hf", "--hf", model, "--megatron", checkpoint)
        yield model


def _megafork(*arguments: object) -> None:
    """Run `megafork ARGUMENTS` in a process of its own, which ends with this one's signals.

    Raises UserError when it fails; it has told why.
    """
    command = [sys.executable, "-m", "megafork", *map(str, arguments)]
    # In a session of its own: Ctrl-C is this process's to pass on, and to tell.
    with ended_by_signals(), subprocess.Popen(command, start_new_session=True) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status == USER_ERROR:
        raise PeerError(f"`megafork {arguments[0]}` failed")
    if status:
        raise UserError(f"`{' '.join(command)}` ended with status {status}; see above")
