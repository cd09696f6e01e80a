"""Layouts that fit a number of nodes, the quickest by the estimate first.

Times are arithmetic, traces take a tenth of a second each: layouts are sorted by their time, and
traced in that order until as many fit as are wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megafork.config import TrainConfig
from megafork.errors import UserError
from megafork.model.shape import ModelShape
from megafork.plan.memory import MemoryPlan, plan_memory, server_memory, server_problems
from megafork.plan.nodes import DTYPE_BYTES, Nodes, NodeType, num_parameters
from megafork.plan.step_time import StepTime, step_time

Changes = dict[str, Any]
"""section.key -> value"""
_SIZES = (1, 2, 4, 8, 16)
_PACKS = (1, 2, 4)
"""longest sequences in a micro-batch"""


@dataclass(frozen=True)
class Layout:
    changes: Changes
    nodes: Nodes
    memory: MemoryPlan
    time: StepTime


def changed(config: TrainConfig, changes: Changes) -> TrainConfig:
    """Return the config with values replaced, checked. Raises UserError or ValueError."""
    raw = config.model_dump()
    for name, value in changes.items():
        section, key = name.split(".")
        raw[section][key] = value
    # What was unset stays unset: `check` asks for settings that change nothing.
    result = TrainConfig.model_validate(raw)
    result.check()
    return result


def search(
    config: TrainConfig,
    shape: ModelShape,
    node: NodeType,
    num_nodes: int,
    serve_nodes: int | None,
    *,
    mean_response_tokens: float | None = None,
    wanted: int = 10,
) -> list[Layout]:
    """Return the `wanted` quickest layouts that fit, by tokens/s/GPU; fewer where fewer fit.

    They differ in tp, pp, cp, recompute, micro_batch_tokens, rollout.tensor_parallel and, with
    serve_nodes unset, the split of the nodes; everything else is the config's.
    """
    found: list[tuple[TrainConfig, Changes, Nodes, StepTime]] = []
    for nodes in _splits(config, node, num_nodes, serve_nodes):
        server = _quickest_server(config, shape, nodes, mean_response_tokens)
        for changes in [] if server is None else _trainers(config, shape, nodes):
            both = changes | (server or {})
            try:
                new = changed(config, both)
                time = step_time(new, shape, nodes, mean_response_tokens=mean_response_tokens)
            except UserError:
                continue
            found.append((new, both, nodes, time))
    found.sort(key=lambda layout: -layout[-1].tokens_per_second_per_gpu)
    layouts: list[Layout] = []
    for new, changes, nodes, time in found:
        plan = plan_memory(new, shape, nodes, quick=True)
        if plan.fits:
            changes |= {"parallel.dp": plan.dp}  # the config may have another
            layouts.append(Layout(changes, nodes, plan, time))
        if len(layouts) == wanted:
            break
    return layouts


def _splits(
    config: TrainConfig, node: NodeType, num_nodes: int, serve_nodes: int | None
) -> Iterator[Nodes]:
    if config.rollout.placement == "colocated":
        yield Nodes(node, num_nodes, 0)
    else:
        for serve in range(1, num_nodes) if serve_nodes is None else [serve_nodes]:
            yield Nodes(node, num_nodes - serve, serve)


def _quickest_server(
    config: TrainConfig, shape: ModelShape, nodes: Nodes, mean_response_tokens: float | None
) -> Changes | None:
    """Return the rollout settings of the quickest generation, which no trainer's layout changes.

    None where no server fits.
    """
    found: list[tuple[float, int, Changes]] = []
    gpus = nodes.node.gpus
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    for tp in (size for size in _SIZES if gpus % size == 0 and shape.num_heads % size == 0):
        changes: Changes = {"rollout.tensor_parallel": tp}
        if config.rollout.placement == "colocated":
            changes["rollout.servers"] = gpus // tp
        # A trainer that goes onto any node, so that only the server decides.
        alone = _layout(tp=1, pp=1, cp=1) | {"training.micro_batch_tokens": longest}
        server = changed(config, changes | alone)
        memory = server_memory(server, shape, nodes.node)
        if server_problems(server, shape, memory, gpus):
            continue
        time = step_time(server, shape, nodes, mean_response_tokens=mean_response_tokens)
        found.append((time.seconds["generate"], tp, changes))
    return min(found)[-1] if found else None


def _layout(*, tp: int, pp: int, cp: int) -> Changes:
    return {
        "parallel.tp": tp, "parallel.pp": pp, "parallel.cp": cp, "parallel.vpp": 1,
        "parallel.dp": None, "parallel.sequence_parallel": tp > 1,
        "parallel.pipeline_layers": None,
    }  # fmt: skip


def _trainers(config: TrainConfig, shape: ModelShape, nodes: Nodes) -> Iterator[Changes]:
    """Yield the layouts that divide the model and the GPUs, and whose static bytes could fit."""
    gpus = nodes.train_gpus
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    value_bytes = DTYPE_BYTES[config.model.dtype]
    tensor_sizes = [size for size in _SIZES if size <= nodes.node.gpus]
    for tp, pp, cp in itertools.product(tensor_sizes, range(1, gpus + 1), _SIZES):
        if gpus % (tp * pp * cp):
            continue
        layout = _layout(tp=tp, pp=pp, cp=cp)
        # Not yet a valid config: a micro-batch may have to be smaller or larger.
        parallel = config.parallel.model_copy(
            update={name.split(".")[1]: value for name, value in layout.items()}
        )
        try:
            shape.check_layout(parallel)
        except UserError:
            continue
        of_rank = num_parameters(shape) / (tp * pp)
        if of_rank * (value_bytes + 4 + 8 * tp * pp / gpus) > nodes.node.gpu_memory:
            continue
        shortest = parallel.tokens_on_one_rank(longest)
        for recompute, packs in itertools.product(("none", "full"), _PACKS):
            yield layout | {
                "model.recompute": recompute,
                "training.micro_batch_tokens": packs * shortest,
            }


def remedies(
    config: TrainConfig, shape: ModelShape, nodes: Nodes, *, wanted: int = 3
) -> list[Changes]:
    """Return changes with which the plan was found to fit, the smallest first."""
    parallel, fit, smaller = config.parallel, list[Changes](), list[Changes]()
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    recompute: Changes = {"model.recompute": "full"}
    wider: Changes = {"parallel.tp": 2 * parallel.tp, "parallel.sequence_parallel": True}
    deeper: Changes = {"parallel.pp": 2 * parallel.pp}
    others: list[Changes] = [
        {"training.micro_batch_tokens": parallel.tokens_on_one_rank(longest)},
        wider,
        deeper,
        {"parallel.cp": 2 * parallel.cp},
    ]
    trainers: list[Changes] = [{}, recompute, *others, *(recompute | other for other in others)]
    trainers.append(recompute | wider | deeper)
    own = config.rollout.tensor_parallel
    servers: list[Changes] = [{}, *({"rollout.tensor_parallel": own * n} for n in (2, 4))]
    for server, trainer in itertools.product(servers, trainers):
        changes = trainer | server | {"parallel.dp": None}
        if any(known.items() <= changes.items() for known in smaller):
            continue
        try:
            plan = plan_memory(changed(config, changes), shape, nodes, quick=True)
        except (UserError, ValueError):
            continue
        if plan.fits:
            smaller.append(trainer | server)
            fit.append(changes | {"parallel.dp": plan.dp})
        if len(fit) == wanted:
            break
    return fit
