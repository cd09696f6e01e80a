"""A plan in words and tables, or as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from megafork.model.shape import ModelShape
from megafork.plan.memory import MemoryPlan, StageMemory
from megafork.plan.nodes import GIB, NodeType, num_parameters
from megafork.plan.search import Changes, Layout
from megafork.plan.step_time import CLAIM, StepTime

_PARTS = ("parameters", "gradients", "optimizer", "critic", "activations", "passing", "reserve")


def table(rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table, the header first: the first column left, all others right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *rest = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()


def memory_lines(plan: MemoryPlan, shape: ModelShape, node: NodeType) -> Iterator[str]:
    lengths = plan.micro_batch.lengths
    yield (
        f"{num_parameters(shape) / 1e9:.1f}G parameters, dp {plan.dp}; a micro-batch of "
        f"{sum(lengths)} tokens ({len(lengths)} sequences), {plan.num_micro_batches} of each rank "
        "in an update, all responses at full length"
    )
    yield ""
    yield f"GiB on a GPU of the trainer ({gib(node.gpu_memory)} there)"
    header = ("pipeline rank", "layers", *_PARTS, "total", "head alone", "weight transfer")
    yield from table([header, *(_stage_row(stage) for stage in plan.stages)])
    yield ""
    server = plan.server
    yield f"GiB on a GPU of a server: {gib(server.total)} (rollout.gpu_memory_utilization)"
    yield from table(
        [
            ("weights", "engine", "KV cache"),
            (gib(server.weights), gib(server.engine), gib(server.kv_cache)),
        ]
    )
    yield (
        f"the cache takes {server.kv_bytes_per_token} bytes a token and holds {server.kv_tokens} "
        f"tokens: {server.whole_responses} responses of {server.response_tokens} at once, of "
        f"rollout.max_num_seqs={server.max_num_seqs}"
    )
    yield ""
    host = plan.host
    yield f"GiB of a training node's host: {gib(host.total)} of {gib(node.host_memory)}"
    names = [field.name for field in dataclasses.fields(host)]
    yield from table(
        [[name.replace("_", " ") for name in names], [gib(getattr(host, name)) for name in names]]
    )
    if "handover" in plan.phases:
        parts = [f"{name} {gib(count)}" for name, count in plan.phases.items()]
        yield ""
        yield f"GiB of a GPU in each phase: {', '.join(parts)}"


def _stage_row(stage: StageMemory) -> list[object]:
    parts = [gib(getattr(stage, name)) for name in _PARTS]
    more = [gib(stage.total), gib(stage.head), gib(stage.transfer)]
    return [stage.pp_rank, stage.num_layers, *parts, *more]


def time_lines(time: StepTime) -> Iterator[str]:
    phases = list(time.seconds)
    yield f"seconds of a step: {CLAIM}"
    yield from table(
        [
            (*phases, "total", "tokens/s/GPU"),
            (
                *(f"{time.seconds[name]:.1f}" for name in phases),
                f"{time.total:.1f}",
                f"{time.tokens_per_second_per_gpu:.0f}",
            ),
        ]
    )
    waits = [f"{name} {seconds:.1f}" for name, seconds in time.waiting.items() if seconds >= 0.05]
    if waits:
        yield f"of it waiting: {', '.join(waits)}"
    yield ""
    yield "GB on the wire in a step (sync: one weight transfer)"
    yield from table(
        [list(time.wire_bytes), [f"{count / 1e9:,.1f}" for count in time.wire_bytes.values()]]
    )


def assumption_lines(time: StepTime | None) -> Iterator[str]:
    yield "assumed"
    for text in (
        "memory: tensors counted on the meta device with the shapes and lifetimes of a GPU's fused "
        "kernels; every token of a micro-batch goes through the head",
        "memory: reserve, engine and sleeping servers are allowances (CUDA context, NCCL, "
        "workspaces, fragmentation), not measured",
        *(time.assumptions if time is not None else []),
    ):
        yield f"- {text}"


def problem_lines(plan: MemoryPlan, fixes: Sequence[Changes]) -> Iterator[str]:
    if plan.fits:
        yield "it fits"
        return
    yield "it does not fit:"
    for text in plan.problems:
        yield f"- {text}"
    for fix in fixes:
        yield f"fits with: {overrides(fix)}"


def search_lines(layouts: Sequence[Layout]) -> Iterator[str]:
    if not layouts:
        yield "no layout fits these nodes: give more of them, or lower rollout.max_response_tokens"
        return
    header = (
        "tokens/s/GPU", "step, s", "train + serve", "tp", "pp", "cp", "dp", "recompute",
        "micro_batch_tokens", "server tp", "GiB",
    )  # fmt: skip
    rows: list[Sequence[object]] = [header]
    for layout in layouts:
        changes, time = layout.changes, layout.time
        rows.append(
            (
                f"{time.tokens_per_second_per_gpu:.0f}",
                f"{time.total:.0f}",
                f"{layout.nodes.train} + {layout.nodes.serve}",
                *(changes[f"parallel.{name}"] for name in ("tp", "pp", "cp")),
                layout.memory.dp,
                changes["model.recompute"],
                changes["training.micro_batch_tokens"],
                changes["rollout.tensor_parallel"],
                gib(max(layout.memory.phases.values())),
            )
        )
    yield from table(rows)
    yield f"times: {CLAIM}"
    yield ""
    yield f"the first: {overrides(layouts[0].changes)}"


def overrides(changes: Changes) -> str:
    """Return changes as the command line takes them; what is unset is left out."""
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in changes.items()
        if value is not None
    )


def as_json(plan: MemoryPlan, time: StepTime, fixes: Sequence[Changes]) -> dict[str, Any]:
    """Return all numbers, in bytes and seconds."""
    stages = [
        dataclasses.asdict(stage) | {"total": stage.total, "static": stage.static}
        for stage in plan.stages
    ]
    server = dataclasses.asdict(plan.server)
    server |= {"kv_tokens": plan.server.kv_tokens, "responses": plan.server.whole_responses}
    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "fits_with": [overrides(fix) for fix in fixes],
        "dp": plan.dp,
        "micro_batch": dataclasses.asdict(plan.micro_batch),
        "micro_batches": plan.num_micro_batches,
        "stages": stages,
        "server": server,
        "host": dataclasses.asdict(plan.host) | {"total": plan.host.total},
        "phases": plan.phases,
        "turns": plan.phases,  # the older name of "phases"
        "time": dataclasses.asdict(time)
        | {"tokens_per_second_per_gpu": time.tokens_per_second_per_gpu},
    }


def layout_as_json(layout: Layout) -> dict[str, Any]:
    return {
        "changes": layout.changes,
        "train_nodes": layout.nodes.train,
        "serve_nodes": layout.nodes.serve,
    } | as_json(layout.memory, layout.time, [])


def gib(count: float) -> str:
    return f"{count / GIB:.1f}"
