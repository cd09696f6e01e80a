"""`megafork train --dry-run`: all that can be known of a run before anything is started or written.

The model's folder needs config.json and the tokenizer; weights are checked where they are and
missed where they are not, so that a run can be planned before 65 GB are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tomli_w

from megafork.config import ParallelConfig, TrainConfig
from megafork.data.prompts import lines_of, read_prompts
from megafork.data.tokenizer import load_tokenizer
from megafork.errors import UserError
from megafork.model.shape import ModelShape
from megafork.plan.machine import machine_lines, machine_memory, problem
from megafork.plan.memory import MemoryPlan, plan_memory
from megafork.plan.nodes import GIB, Nodes, NodeType, node_type
from megafork.plan.plan_text import assumption_lines, memory_lines, time_lines
from megafork.plan.step_time import step_time
from megafork.system.heap import available
from megafork.trainer.preflight import check_folders

THIS = "this"
"""As a --node: the machine itself, without a GPU"""


def plan_run(
    config: TrainConfig,
    node_name: str,
    num_serve_nodes: int,
    mean_response_tokens: float | None,
    *,
    tell: Callable[[str], object],
) -> None:
    """Tell config, layout, memory and time of a run that passed `check_train`.

    Raises UserError, last of all where the plan does not fit the node.
    """
    shape = ModelShape.from_folder(config.model.path)
    facts = _Facts.of(config)
    if node_name == THIS:
        planned, problems = _on_this_machine(config, shape)
    else:
        mean = mean_response_tokens, facts.mean_prompt
        planned, problems = _on_nodes(config, shape, node_type(node_name), num_serve_nodes, mean)
    sections = {
        "config": [tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)).rstrip()],
        "found": facts.lines(),
        "first prompt": facts.first_prompt,
    }
    for name, lines in (sections | planned).items():
        tell("\n".join([f"# {name}", *lines, ""]))
    if problems:
        raise UserError("the plan does not fit: " + "; ".join(problems))


def _on_this_machine(
    config: TrainConfig, shape: ModelShape
) -> tuple[dict[str, list[str]], list[str]]:
    """Return sections and problems. Nothing is known of the time that its processors take."""
    parallel, total = config.parallel, available()[0]
    needs = machine_memory(config, shape)
    sections = {
        "layout": list(layout(shape, parallel, parallel.dp or 1, parallel.world_size)),
        "memory": list(machine_lines(needs)),
    }
    return sections, [problem(needs, total, config)] if needs.total > total else []


def _on_nodes(
    config: TrainConfig,
    shape: ModelShape,
    node: NodeType,
    num_serve_nodes: int,
    mean_tokens: tuple[float | None, int],
) -> tuple[dict[str, list[str]], list[str]]:
    """Return sections and problems. mean_tokens: of a response, None if unknown; of a prompt."""
    nodes = _nodes(config, node, num_serve_nodes)
    memory = plan_memory(config, shape, nodes, server_gpus=node.gpus)
    response, prompt = mean_tokens
    time = step_time(config, shape, nodes, mean_response_tokens=response, mean_prompt_tokens=prompt)
    sections = {
        "layout": list(layout(shape, config.parallel, memory.dp, nodes.node.gpus)),
        "memory": list(memory_lines(memory, shape, nodes.node)),
        "time": list(time_lines(time)),
        "assumptions": list(assumption_lines(time)),
    }
    problems = list(memory.problems)
    if config.rollout.placement == "disaggregated" and not num_serve_nodes:
        problems += _problems_beside_ranks(config, node, nodes.node.gpus, memory)
    return sections, problems


def _problems_beside_ranks(
    config: TrainConfig, node: NodeType, ranks: int, memory: MemoryPlan
) -> list[str]:
    """Say what servers lack that a training node starts beside its ranks (rollout/placement.py)."""
    rollout = config.rollout
    if rollout.url is not None:
        return []
    elsewhere = "give --serve-nodes, or set rollout.placement=colocated"
    needed, left = rollout.servers * rollout.tensor_parallel, node.gpus - ranks
    if needed > (left or node.gpus):
        return [
            f"rollout.servers={rollout.servers} * tensor_parallel={rollout.tensor_parallel} GPUs "
            f"do not fit the {left or node.gpus} that a node's {ranks} ranks leave: {elsewhere}"
        ]
    both = memory.phases["trainer"] + memory.phases["server"]
    if left == 0 and both > node.gpu_memory:
        return [
            f"the servers share the GPUs of the {ranks} ranks, at the same time: "
            f"{both / GIB:.1f} GiB of {node.gpu_memory / GIB:.1f}: {elsewhere}"
        ]
    return []


def layout(shape: ModelShape, parallel: ParallelConfig, dp: int, gpus: int) -> Iterator[str]:
    """Yield a line for each node with its ranks, in megatron's order: tp, cp, dp, pp."""
    stages = shape.stage_layers(parallel)
    ranks = range(parallel.model_parallel_size * dp)
    for first in range(0, len(ranks), gpus):
        own = ranks[first : first + gpus]
        coordinates = [place(rank, parallel, dp) for rank in own]
        parts = [f"ranks {_span(own)}"]
        for axis, name in enumerate(("tp", "cp", "dp", "pp")):
            parts.append(f"{name} {_span(sorted({c[axis] for c in coordinates}))}")
        layers = [
            _span(stages[stage])
            for pp in sorted({c[3] for c in coordinates})
            for stage in range(pp, len(stages), parallel.pp)
        ]
        yield f"node {first // gpus}: {', '.join(parts)}, layers {' and '.join(layers)}"


def place(rank: int, parallel: ParallelConfig, dp: int) -> tuple[int, int, int, int]:
    """Return (tp, cp, dp, pp) of a rank."""
    rest, tp = divmod(rank, parallel.tp)
    rest, cp = divmod(rest, parallel.cp)
    pp, of_dp = divmod(rest, dp)
    return tp, cp, of_dp, pp


def _span(values: range | list[int]) -> str:
    return f"{values[0]}-{values[-1]}" if len(values) > 1 else f"{values[0]}"


def _nodes(config: TrainConfig, node: NodeType, num_serve_nodes: int) -> Nodes:
    """Return as many nodes as parallel.dp asks for; a part of one where that is enough."""
    world = config.parallel.world_size
    if world < node.gpus:
        return Nodes(node.model_copy(update={"gpus": world}), 1, num_serve_nodes)
    number, rest = divmod(world, node.gpus)
    if rest:
        raise UserError(
            f"parallel.dp * tp * pp * cp = {world} ranks do not fill nodes of {node.gpus} "
            "GPUs: change parallel.dp or --node"
        )
    return Nodes(node, number, num_serve_nodes)


@dataclass(frozen=True)
class _Facts:
    """Facts that the run's files say."""

    weights: list[str]
    """A line for each model folder"""
    prompts: int
    mean_prompt: int
    longest_prompt: int
    first_prompt: list[str]
    """Lines that show it as the model reads it"""
    heldout: int

    @classmethod
    def of(cls, config: TrainConfig) -> _Facts:
        tokenizer = load_tokenizer(
            config,
            chat_template=config.data.chat_template,
            enable_thinking=config.data.enable_thinking,
        )
        prompts = read_prompts(config.data.train, config.data, tokenizer.encode_prompt)
        lengths = [len(prompt.ids) for prompt in prompts]
        heldout = 0
        if config.data.eval is not None:
            heldout = len(read_prompts(config.data.eval, config.data, tokenizer.encode_prompt))
        return cls(
            weights=check_folders(config, may_lack_weights=True),
            prompts=len(prompts),
            mean_prompt=round(sum(lengths) / len(lengths)),
            longest_prompt=max(lengths),
            first_prompt=lines_of(prompts[0], tokenizer),
            heldout=heldout,
        )

    def lines(self) -> list[str]:
        return [
            *(f"weights   {line}" for line in self.weights),
            f"prompts   {self.prompts}; {self.mean_prompt} tokens on average, "
            f"{self.longest_prompt} at most",
            f"held out  {self.heldout} prompts",
        ]
