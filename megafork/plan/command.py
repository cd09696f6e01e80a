"""`megafork plan`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.hub import with_local_models
from megafork.model.shape import ModelShape
from megafork.plan.nodes import Nodes, NodeType, named_shape, node_type
from megafork.trainer.preflight import check_length

_UNKNOWN = 'run.dir="unset"', 'data.train="unset"', 'reward.verifier="maths"', "training.steps=1"
"""Settings that a config needs and that a plan without one does not know."""


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="a run's TOML file and section.key=value",
            metavar="[CONFIG] [SECTION.KEY=VALUE]...",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="qwen3-8b, -14b, -32b, or an HF folder; unset: model.path"),
    ] = None,
    node: Annotated[
        str, typer.Option(help="a100-80g, h100, h200, h20, b200 or a TOML file")
    ] = "h100",
    nodes: Annotated[int, typer.Option(help="all nodes, trainer's and servers'", min=1)] = 1,
    serve_nodes: Annotated[
        int | None,
        typer.Option(help="of them, full of servers; unset: half, or what --search finds", min=0),
    ] = None,
    mean_response_tokens: Annotated[
        float | None, typer.Option(help="tokens of a response; unset: a quarter of the longest")
    ] = None,
    find: Annotated[
        bool, typer.Option("--search", help="the quickest layouts that fit, instead of this one")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="numbers, in bytes and seconds")] = False,
) -> None:
    """Memory, bytes on the wire and time of a run; exit status 1 if it does not fit."""
    # A plan is of other GPUs than this machine's, if it has any.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config = _config(list(arguments or []), model)
    _check_nodes(nodes, serve_nodes, colocated=config.rollout.placement == "colocated")
    if not model:
        config = with_local_models(config, weights=False)
    shape = named_shape(model or config.model.path, setting="--model" if model else "model.path")
    check_length(config, shape)
    kind = node_type(node)
    if find:
        fits, figures, sections = _search(
            config, shape, kind, nodes, serve_nodes, mean_response_tokens
        )
    else:
        serving = nodes // 2 if serve_nodes is None else serve_nodes
        serving = 0 if config.rollout.placement == "colocated" else serving
        split = Nodes(kind, nodes - serving, serving)
        fits, figures, sections = _plan(config, shape, split, mean_response_tokens)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        typer.echo("\n\n".join("\n".join(lines) for lines in sections) + "\n")
    raise typer.Exit(0 if fits else 1)


_Result = tuple[bool, object, list[Iterator[str]]]
"""whether anything fits, the figures for --json, and the sections of the text"""


def _search(
    config: TrainConfig,
    shape: ModelShape,
    node: NodeType,
    num_nodes: int,
    serve_nodes: int | None,
    mean_response_tokens: float | None,
) -> _Result:
    from megafork.plan import plan_text
    from megafork.plan.search import search

    found = search(
        config, shape, node, num_nodes, serve_nodes, mean_response_tokens=mean_response_tokens
    )
    figures = [plan_text.layout_as_json(layout) for layout in found]
    return bool(found), figures, [plan_text.search_lines(found)]


def _plan(
    config: TrainConfig, shape: ModelShape, nodes: Nodes, mean_response_tokens: float | None
) -> _Result:
    from megafork.plan import plan_text
    from megafork.plan.memory import plan_memory
    from megafork.plan.search import remedies
    from megafork.plan.step_time import step_time

    memory = plan_memory(config, shape, nodes)
    time = step_time(config, shape, nodes, mean_response_tokens=mean_response_tokens)
    fixes = [] if memory.fits else remedies(config, shape, nodes)
    sections = [
        plan_text.memory_lines(memory, shape, nodes.node),
        *([plan_text.time_lines(time)] if memory.fits else []),
        plan_text.assumption_lines(time if memory.fits else None),
        plan_text.problem_lines(memory, fixes),
    ]
    return memory.fits, plan_text.as_json(memory, time, fixes), sections


def _config(arguments: list[str], model: str | None) -> TrainConfig:
    path = arguments.pop(0) if arguments and "=" not in arguments[0] else None
    if path is None and model is None:
        raise UserError("give a run's config, or a model: megafork plan --model qwen3-32b")
    settings = [] if path is not None else list(_UNKNOWN)
    if model is not None:
        settings.append(f"model.path={json.dumps(str(Path(model)))}")
    return load_config(TrainConfig, path, [*settings, *arguments])


def _check_nodes(nodes: int, serve_nodes: int | None, *, colocated: bool) -> None:
    if colocated and serve_nodes:
        raise UserError(
            f"--serve-nodes {serve_nodes} with rollout.placement=colocated, whose servers take the "
            "trainer's GPUs: leave it out, or set rollout.placement=disaggregated"
        )
    serving = 1 if serve_nodes is None else serve_nodes
    if not colocated and not 0 < serving < nodes:
        given = "" if serve_nodes is None else f" --serve-nodes {serve_nodes}"
        raise UserError(
            f"--nodes {nodes}{given} leaves no node to train or none to serve: give two nodes or "
            "more, of which some serve, or set rollout.placement=colocated"
        )
