"""`megafork analyze ...`: the analyses of arXiv 2506.01939 over responses that were scored.

Arguments are typed and checked here; libraries are imported by the command that needs them.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megafork.errors import UserError

analyze = typer.Typer(
    help="The paper's analyses of scored responses: tables (CSV, JSON) and figures.",
    no_args_is_help=True,
)


class Scope(StrEnum):
    batch = "batch"
    sequence = "sequence"


Scored = Annotated[Path, typer.Argument(help="file that `megafork score` wrote: parquet or jsonl")]
Output = Annotated[Path, typer.Option(help="folder to write to; made where it is missing")]
Rho = Annotated[float, typer.Option(help="fraction of the tokens that is the top")]
OverlapScope = Annotated[
    Scope, typer.Option(help="what has a threshold of its own: the file or each response")
]
MinCount = Annotated[int, typer.Option(help="tokens that occur less often are left out", min=1)]
MinResponses = Annotated[
    int, typer.Option(help="tokens that occur in fewer responses are left out", min=1)
]
Words = Annotated[int, typer.Option(help="tokens of each word cloud", min=1)]
Responses = Annotated[
    str,
    typer.Option(
        help="'rollouts': the run's own, of its last steps; 'generate': the final model's, to "
        "held-out prompts; or a jsonl of responses"
    ),
]
Sweep = Annotated[
    bool,
    typer.Option(
        help="also sweep two temperatures on held-out prompts; the threshold is the 80th "
        "percentile of the final model's entropies"
    ),
]
FontFile = Annotated[
    Path | None,
    typer.Option(
        "--font", help="font file; unset: DejaVu Sans (no Chinese, Japanese, Korean characters)"
    ),
]


@analyze.command()
def entropy(scored: Scored, output: Output) -> None:
    """Histogram and percentiles of the response tokens' entropy."""
    from megafork.analysis.entropy import entropy_tables, write_entropy
    from megafork.analysis.scored import read_scored

    _prepare([scored], output)
    write_entropy(entropy_tables(read_scored(scored)), scored.stem, output, "entropy")
    _tell(output)


@analyze.command()
def tokens(
    scored: Scored,
    model: Annotated[Path, typer.Option(help="HF folder that it was scored with")],
    output: Output,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="HF folder or SentencePiece .model file; unset: --model's tokenizer"),
    ] = None,
    min_count: MinCount = 50,
    min_responses: MinResponses = 3,
    words: Words = 100,
    font: FontFile = None,
) -> None:
    """Tokens of highest and lowest mean entropy, and their word clouds."""
    from megafork.analysis.glyphs import Font
    from megafork.analysis.scored import read_scored
    from megafork.analysis.tokens import rank_tokens, write_tokens
    from megafork.config import ScoreConfig
    from megafork.config.load import load_config
    from megafork.data.tokenizer import load_tokenizer
    from megafork.model.shape import ModelShape

    paths = {"model.path": model} | ({} if tokenizer is None else {"tokenizer.path": tokenizer})
    config = load_config(
        ScoreConfig, None, [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    )
    vocab_size = ModelShape.from_folder(model, setting="--model").vocab_size
    reader, drawn_with = load_tokenizer(config, chat_template=False), Font(font)
    _prepare([scored], output)
    responses = read_scored(scored, encode=reader.encode, vocab_size=vocab_size)
    ranked = rank_tokens(responses, vocab_size, reader.name, min_count, min_responses)
    write_tokens(ranked, scored.stem, output, "tokens", num_words=words, font=drawn_with)
    _tell(output)


@analyze.command("overlap")
def overlap_command(
    base: Annotated[Path, typer.Argument(help="file scored by the first model: parquet or jsonl")],
    others: Annotated[list[Path], typer.Argument(help="the same responses, scored by others")],
    output: Output,
    rho: Rho = 0.2,
    scope: OverlapScope = Scope.batch,
) -> None:
    """Share of the first model's top positions that are the top of each other model too."""
    from megafork.analysis.pairs import overlap, write_overlap
    from megafork.analysis.scored import read_scored

    _check_rho(rho)
    _prepare([base, *others], output)
    first = read_scored(base)
    found = [(path.stem, overlap(first, read_scored(path), rho, scope.value)) for path in others]
    write_overlap(found, base.stem, rho, scope.value, output)
    _tell(output)


@analyze.command()
def change(
    base: Annotated[Path, typer.Argument(help="file scored by the model before training")],
    trained: Annotated[Path, typer.Argument(help="the same responses, scored after training")],
    output: Output,
) -> None:
    """Mean change of entropy in 20 bins of the first model's entropy, 5% of the tokens each."""
    from megafork.analysis.pairs import entropy_change, write_change
    from megafork.analysis.scored import read_scored

    _prepare([base, trained], output)
    rows, about = entropy_change(read_scored(base), read_scored(trained))
    write_change(rows, about, base.stem, trained.stem, output)
    _tell(output)


@analyze.command()
def training(run: Annotated[Path, typer.Argument(help="folder of a run")], output: Output) -> None:
    """Entropy, threshold, response length and accuracy along a run's training."""
    from megafork.analysis.output import make_folder
    from megafork.analysis.training import training_table, write_training

    table = training_table(run)
    write_training(table, run, make_folder(output))
    _tell(output)


@analyze.command()
def temperatures(
    model: Annotated[Path, typer.Option(help="HF folder, a run, or one of its checkpoints")],
    data: Annotated[
        list[str], typer.Option(help="problems, as `megafork eval` reads them; may be repeated")
    ],
    output: Output,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings of `megafork eval`, and sweep.threshold, .above, .below"),
    ] = None,
) -> None:
    """Accuracy over the temperature of forking tokens, and over that of the others."""
    from megafork.analysis.temperatures import sweep_temperatures
    from megafork.config.load import load_config
    from megafork.config.rollouts import TemperaturesConfig
    from megafork.model.hub import with_local_models

    settings = [f"model.path={json.dumps(str(model))}", *(overrides or [])]
    config = with_local_models(load_config(TemperaturesConfig, None, settings))
    sweep_temperatures(config, data, output)
    _tell(output)


@analyze.command("run")
def run_command(
    run: Annotated[Path, typer.Argument(help="folder of a run that has ended")],
    output: Output,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings of `megafork score`, for instance parallel.tp=2"),
    ] = None,
    responses: Responses = "rollouts",
    samples: Annotated[int, typer.Option(help="for each prompt, where generated", min=1)] = 4,
    temperatures: Sweep = False,
    last_steps: Annotated[int, typer.Option(help="steps whose rollouts are taken", min=1)] = 1,
    initial: Annotated[
        Path | None, typer.Option(help="HF folder of the model before training; unset: the run's")
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option(help="score the kept checkpoints too, for the overlap along training")
    ] = True,
    rho: Annotated[
        float | None, typer.Option(help="fraction that is the top; unset: the run's forking.rho")
    ] = None,
    scope: OverlapScope = Scope.batch,
    min_count: MinCount = 50,
    min_responses: MinResponses = 3,
    words: Words = 100,
    font: FontFile = None,
) -> None:
    """Score a run's responses by the models before and after, and make every analysis."""
    from megafork.analysis.glyphs import Font
    from megafork.analysis.run import RunAnalysis, analyze_run

    if rho is not None:
        _check_rho(rho)
    analyze_run(
        RunAnalysis(
            run=run,
            output=output,
            responses=responses,
            samples=samples,
            temperatures=temperatures,
            last_steps=last_steps,
            initial=initial,
            all_checkpoints=checkpoints,
            rho=rho,
            scope=scope.value,
            min_count=min_count,
            min_responses=min_responses,
            num_words=words,
            font=Font(font),
            overrides=overrides or [],
        )
    )
    _tell(output)


def _check_rho(rho: float) -> None:
    if not 0 < rho <= 1:
        raise UserError(f"--rho={rho:g} is no fraction of the tokens: use one in (0, 1], as 0.2")


def _prepare(inputs: list[Path], output: Path) -> None:
    """Look for all files before the output folder is made and the first one is read."""
    from megafork.analysis.output import make_folder

    for path in inputs:
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a file that `megafork score` wrote")
    make_folder(output)


def _tell(output: Path) -> None:
    typer.echo(f"written to {output}")
