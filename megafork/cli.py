"""The command line: `megafork train | score | generate | eval | analyze | convert | serve | ...`.

Every command is typed here and does its work elsewhere. Configs and files are checked before any
rank is started, so a mistake costs a second and is told once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import megafork
from megafork.analysis.commands import analyze
from megafork.cluster import exits, launch
from megafork.config import (
    EvaluateConfig,
    GenerateConfig,
    ParallelConfig,
    ScoreConfig,
    Section,
    TrainConfig,
)
from megafork.config.load import load_config, settings_of
from megafork.config.rollouts import TemperaturesConfig
from megafork.config.settings import known_settings, named_by
from megafork.errors import UserError
from megafork.model.hub import with_local_models
from megafork.plan.command import plan
from megafork.system.imports import without_collector

app = typer.Typer(
    name="megafork",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, for instance parallel.tp=2")
]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check and plan everything, start and write nothing")
]
Node = Annotated[
    str | None,
    typer.Option(
        help="of --dry-run: a100-80g, h100, h200, h20, b200, a TOML file, or this: a machine "
        "without GPUs. Unset: h100; this where there is no GPU"
    ),
]
ServeNodes = Annotated[
    int | None, typer.Option(help="of --dry-run: nodes full of rollout servers", min=0)
]
MeanResponse = Annotated[
    float | None,
    typer.Option(help="of --dry-run: tokens; unset: a quarter of the longest response"),
]


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"megafork {megafork.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="show the version and exit"
        ),
    ] = False,
) -> None:
    """RLVR training where only the forking tokens carry the policy gradient."""


@app.command()
def train(
    config: Annotated[
        str | None, typer.Argument(help="TOML file; `megafork keys` lists its keys")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(help="folder of a run to go on with, at any layout")
    ] = None,
    dry_run: DryRun = False,
    node: Node = None,
    serve_nodes: ServeNodes = None,
    mean_response_tokens: MeanResponse = None,
) -> None:
    """Train a policy by reinforcement from verifiable rewards."""
    settings = overrides or []
    if resume is not None:
        # The run has its own config: all arguments are overrides of it.
        settings = [f"run.dir={json.dumps(str(resume))}", *([config] if config else []), *settings]
        config = str(resume / "config.toml")
        if not Path(config).is_file():
            raise UserError(f"--resume {resume}: there is no run in this folder (no config.toml)")
    elif config is None:
        raise UserError("give a config file, or --resume with a run's folder")
    named = load_config(TrainConfig, config, settings)
    if not dry_run and (node, serve_nodes, mean_response_tokens) != (None, None, None):
        raise UserError(
            "--node, --serve-nodes and --mean-response-tokens are for --dry-run: add it"
        )
    if resume is not None and launch.starts_on_this_machine() and _is_done(named):
        return
    resolved = with_local_models(named, weights=not dry_run, tell=launch.tells())
    from megafork.trainer.preflight import check_folders, check_train

    check_train(resolved, resume=resume is not None)
    if dry_run:
        from megafork.plan.dry_run import plan_run

        if node is None and serve_nodes is None and not _has_gpu():
            node = "this"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the plan is of other GPUs than this machine's
        plan_run(resolved, node or "h100", serve_nodes or 0, mean_response_tokens, tell=typer.echo)
        return
    if launch.tells():
        check_folders(resolved)
    if launch.starts_on_this_machine() and not _has_gpu():
        from megafork.plan.machine import check_machine

        check_machine(resolved)

    def work() -> None:
        with without_collector():
            from megafork.train import train as train_on_this_rank

        train_on_this_rank(resolved, resume=resume is not None)

    _on_ranks(resolved.parallel, work, resolved.run.dir, _changed(named, resolved))


def _is_done(config: TrainConfig) -> bool:
    """Return whether a run has nothing left to do; if so, tell it and how to train longer."""
    from megafork.system.lock import refuse_held
    from megafork.trainer.run_dir import final_model

    run, steps = config.run.dir, config.training.steps
    refuse_held(Path(run), "run.dir")
    if (final := final_model(config)) is None:
        return False
    typer.echo(
        f"{run} has done all of training.steps={steps}; its model is in {final}. To train longer: "
        f"megafork train --resume {run} training.steps={2 * steps}"
    )
    return True


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="folder for config.toml; made if missing")],
    model: Annotated[Path, typer.Option(help="HF folder: config.json, tokenizer, safetensors")],
    data: Annotated[
        str, typer.Option(help="rows to train on: jsonl, parquet, HF data set folder, hf:NAME")
    ],
    verifier: Annotated[
        str | None,
        typer.Option(
            help="maths, countdown, exact, reasoning-gym:TASK or MODULE:FUNCTION; unset: guessed "
            "from the answers"
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a first config, minimal and commented, after a look at the model and the data."""
    from megafork.plan.first_config import write_first_config

    write_first_config(folder, model, data, verifier, overrides or [], tell=typer.echo)


@app.command()
def score(
    model: Annotated[Path, typer.Option(help="HF folder of the model, or owner/name")],
    input: Annotated[
        Path, typer.Option(help="jsonl of prompt_ids/response_ids or prompt/response")
    ],
    output: Annotated[
        Path, typer.Option(help="jsonl or .parquet to write: adds logprobs and entropies")
    ],
    overrides: Overrides = None,
) -> None:
    """Log-probability and entropy of every response token, the same at every layout."""
    named = load_config(
        ScoreConfig, None, [f"model.path={json.dumps(str(model))}", *(overrides or [])]
    )
    resolved = with_local_models(named, tell=launch.tells())
    from megafork.trainer.preflight import check_score

    check_score(resolved, input, output)

    def work() -> None:
        with without_collector():
            from megafork.evaluation.scoring import score_file

        score_file(resolved, input, output)

    _on_ranks(resolved.parallel, work, settings=_changed(named, resolved))


Served = Annotated[
    Path,
    typer.Option(
        help="HF folder, owner/name on the hub, a run's folder, or its checkpoints/step_000010"
    ),
]
SettingsFile = Annotated[
    Path | None, typer.Option(help="TOML file with settings; `megafork keys` lists them")
]


@app.command()
def generate(
    model: Served,
    data: Annotated[
        list[str],
        typer.Option(
            help="prompts: jsonl, json, csv, parquet, a pattern in quotes, HF data set folder, "
            "hf:NAME; may be repeated"
        ),
    ],
    output: Annotated[Path, typer.Option(help="jsonl to write, which `megafork score` reads")],
    overrides: Overrides = None,
    config: SettingsFile = None,
) -> None:
    """Responses of a model to a file's prompts, sampled by vLLM; goes on where it was cut off."""
    settings = [f"model.path={json.dumps(str(model))}", *(overrides or [])]
    resolved = with_local_models(load_config(GenerateConfig, config, settings))
    with without_collector():
        from megafork.evaluation.generation import generate_file

    generate_file(resolved, data, output)


@app.command("eval")
def evaluate(
    model: Served,
    output: Annotated[Path, typer.Option(help="folder for results.json and samples/")],
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="benchmarks (jsonl, json, csv, parquet, HF data set folder, hf:NAME) and "
            "section.key=value",
            metavar="BENCHMARK... [SECTION.KEY=VALUE]...",
        ),
    ],
    config: SettingsFile = None,
) -> None:
    """avg@k, pass@k and maj@k on benchmarks, with intervals, and every sample kept."""
    overrides = [text for text in arguments if _is_override(text)]
    settings = [f"model.path={json.dumps(str(model))}", *overrides]
    resolved = with_local_models(load_config(EvaluateConfig, config, settings))
    with without_collector():
        from megafork.evaluation.benchmark import evaluate as evaluate_benchmarks

    benchmarks = [text for text in arguments if not _is_override(text)]
    evaluate_benchmarks(resolved, benchmarks, output)


def _is_override(text: str) -> bool:
    """section.key=value; a file of such a name can be given as ./NAME."""
    return re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", text) is not None


HfFolder = Annotated[Path, typer.Option(help="HF folder: config.json and safetensors")]
MegatronFolder = Annotated[
    Path, typer.Option(help="folder of a megatron-core checkpoint (dist_checkpointing, torch_dist)")
]


class HfDtype(StrEnum):
    bfloat16 = "bfloat16"


FileGb = Annotated[float, typer.Option(help="start another file at this size, GB", min=1e-6)]

convert = typer.Typer(
    help="HF folders to megatron-core checkpoints and back, tensor by tensor, bit by bit.",
    no_args_is_help=True,
)
app.add_typer(convert, name="convert")
app.add_typer(analyze, name="analyze")
app.command()(plan)


@convert.command()
def hf_to_megatron(hf: HfFolder, megatron: MegatronFolder, max_file_gb: FileGb = 5.0) -> None:
    """Write --megatron from --hf; config and tokenizer go along in its hf/."""
    with without_collector():
        from megafork.checkpoint import convert as conversion

    conversion.hf_to_megatron(hf, megatron, max_file_bytes=int(max_file_gb * 1e9))


@convert.command()
def megatron_to_hf(
    hf: HfFolder,
    megatron: MegatronFolder,
    like: Annotated[
        Path | None, typer.Option(help="HF folder that lends config and tokenizer; unset: its hf/")
    ] = None,
    max_file_gb: FileGb = 5.0,
    dtype: Annotated[
        HfDtype | None, typer.Option(help="round every weight to it; unset: bit by bit")
    ] = None,
) -> None:
    """Write --hf from --megatron, whatever layout wrote it."""
    with without_collector():
        import torch

        from megafork.checkpoint import convert as conversion

    conversion.megatron_to_hf(
        megatron,
        hf,
        like=like,
        max_file_bytes=int(max_file_gb * 1e9),
        dtype=None if dtype is None else getattr(torch, dtype),
    )


@convert.command()
def verify(
    hf: HfFolder,
    megatron: MegatronFolder,
    overrides: Overrides = None,
    logits: Annotated[
        bool, typer.Option(help="also compare logits: loads both models, one after the other")
    ] = True,
) -> None:
    """Bits of every tensor, then logits (transformers against the layout given); exit 0 or 1."""
    resolved = load_config(
        ScoreConfig, None, [f"model.path={json.dumps(str(hf))}", *(overrides or [])]
    )
    from megafork.model.shape import ModelShape

    ModelShape.from_folder(hf).check(resolved.model, resolved.parallel)

    def work() -> None:
        with without_collector():
            from megafork.checkpoint.verify import verify as verify_on_this_rank

        if not verify_on_this_rank(resolved, megatron, logits=logits):
            raise typer.Exit(1)

    _on_ranks(resolved.parallel, work)


@app.command()
def push(
    model: Annotated[
        Path, typer.Argument(help="a run's folder, one of its checkpoints, or an HF folder")
    ],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME, or NAME for an own repository")],
    private: Annotated[
        bool, typer.Option("--private", help="only for those you let see it")
    ] = False,
) -> None:
    """Upload a model to the Hugging Face Hub, with the token of HF_TOKEN or `hf auth login`."""
    from megafork.checkpoint.upload import check_access, upload
    from megafork.evaluation.source import find_model

    check_access(repo_id)
    source = find_model(model, "push")
    source.check_weights()
    with tempfile.TemporaryDirectory() as scratch, source.as_hf(Path(scratch) / "hf") as folder:
        upload(folder, repo_id, private=private, tell=typer.echo)


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="the training run's TOML file")],
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
    log: Annotated[Path, typer.Option(help="file for vLLM's log")] = Path("vllm.log"),
) -> None:
    """Serve rollouts for training runs with rollout.url; $MEGAFORK_API_KEY is the shared key."""
    resolved = with_local_models(load_config(TrainConfig, config, overrides or []))
    from megafork.parallel.backend import has_cuda
    from megafork.rollout.engine import serve as serve_until_interrupted

    serve_until_interrupted(resolved, "cuda" if has_cuda() else "cpu", log, host, port)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run, whether it goes on or has ended")],
    output: Annotated[
        Path | None, typer.Option(help="file to write; unset: report.html in the folder")
    ] = None,
) -> None:
    """Write a run's report: curves, entropies, and responses token by token, in one HTML file."""
    from megafork.metrics.page import write_report

    typer.echo(write_report(run, output))


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="folders of runs, whether they go on or have ended")
    ],
    output: Annotated[Path, typer.Option(help="file to write")] = Path("comparison.html"),
) -> None:
    """Write several runs into one HTML file: their curves over each other, and the settings that
    differ."""
    from megafork.metrics.side_by_side import write_comparison

    typer.echo(write_comparison(runs, output))


@app.command()
def rollouts(
    path: Annotated[Path, typer.Argument(help="folder of a run, or one of its journals")],
    step: Annotated[int | None, typer.Option(help="of this step alone", min=1)] = None,
) -> None:
    """Print what a run has generated, one group a line: a JSON object with tokens and rewards."""
    from megafork.rollout.journal import json_lines

    for line in json_lines(path, step):
        typer.echo(line)


@app.command()
def doctor(
    python: Annotated[
        str, typer.Option(help="the Python that has vLLM (rollout.python)")
    ] = sys.executable,
) -> None:
    """Say what is installed, which backends are active, what is missing and how to mend it."""
    from megafork.cluster.doctor import report as report_on

    raise typer.Exit(report_on(python))


data_files = typer.Typer(help="Looks at data files.", no_args_is_help=True)
app.add_typer(data_files, name="data")


@data_files.callback()
def _commands_of_data() -> None:
    """Look at data files before a run does."""
    # With one command alone, typer would need no word for it.


@data_files.command()
def check(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="data files, as `megafork train` reads them, and settings of `megafork generate`",
            metavar="FILE... [SECTION.KEY=VALUE]...",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="HF folder or owner/name, for lengths in tokens and the chat template"),
    ] = None,
    verifier: Annotated[
        list[str] | None, typer.Option(help="as reward.verifier: are its columns there?")
    ] = None,
) -> None:
    """Say what a data file holds: columns, lengths, a prompt, and every row that cannot be used."""
    settings = [f"model.path={json.dumps(str(model or ''))}", *filter(_is_override, arguments)]
    resolved = with_local_models(load_config(GenerateConfig, None, settings), weights=False)
    from megafork.evaluation.data_report import check_data

    files = [text for text in arguments if not _is_override(text)]
    check_data(resolved, files, verifier or [], typer.echo)


class Command(StrEnum):
    train = "train"
    score = "score"
    generate = "generate"
    eval = "eval"
    temperatures = "temperatures"


_SETTINGS: dict[Command, type[Section]] = {
    Command.train: TrainConfig,
    Command.score: ScoreConfig,
    Command.generate: GenerateConfig,
    Command.eval: EvaluateConfig,
    Command.temperatures: TemperaturesConfig,
}


@app.command()
def keys(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="whose settings (train, score, generate, eval, temperatures; unset: train), and "
            "words that their keys or else their meanings hold",
            metavar="COMMAND | FILTER",
        ),
    ] = None,
) -> None:
    """List the settings of a command: default, type, choices or bounds, and meaning.

    `megafork keys forking` and `megafork keys eval rollout.temp` show those of that name.
    """
    filters = words or []
    command = Command.train
    if filters and filters[0] in list(Command):
        command, *filters = Command(filters[0]), *filters[1:]
    settings = list(known_settings(_SETTINGS[command]))
    for setting in named_by(filters, settings, command):
        typer.echo(setting.text())


def main() -> None:
    """Entry point; see exits.run for how it ends."""
    # megatron-core warns of every fused package that is absent; `megafork doctor` says it once.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # It also calls collectives by names that torch is about to rename.
    for module in (r"torch\.distributed", r"megatron\."):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    exits.run(lambda: app(prog_name="megafork"))


def _has_gpu() -> bool:
    """Asked in a way that leaves CUDA untouched."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    return torch.cuda.is_available()


def _changed(named: Section, resolved: Section) -> list[str]:
    """Return the settings that differ, so that ranks ask the hub for nothing again."""
    before = dict(settings_of(named))
    return [
        f"{key}={json.dumps(value)}" for key, value in settings_of(resolved) if value != before[key]
    ]


def _on_ranks(
    parallel: ParallelConfig,
    work: Callable[[], None],
    run_dir: str = "",
    settings: Sequence[str] = (),
) -> None:
    """Do `work` on this rank, or start the ranks of the layout, which come here again.

    settings: overrides for those ranks beside the command line's.
    """
    if launch.under_torchrun():
        launch.end_with_launcher()
        launch.join_output()
        launch.check_world(parallel)
        work()
    elif parallel.world_size == 1 and not launch.Machines.from_environment():
        work()
    elif status := launch.launch_ranks(parallel, [*sys.argv[1:], *settings], run_dir):
        raise typer.Exit(status)
