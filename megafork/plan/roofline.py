"""Seconds of a step and bytes on the wire, from rooflines with stated efficiencies.

Nothing here is measured: rates are data sheets' times efficiency.py's constants. Everything that
is taken for granted is said in StepTime.assumptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megafork.config import TrainConfig
from megafork.errors import UserError
from megafork.model.shape import ModelShape
from megafork.plan.decoding import Iteration, decode
from megafork.plan.efficiency import Efficiency
from megafork.plan.nodes import GIB, NodeType
from megafork.plan.passes import DTYPE_BYTES, FORWARD, PassTime, Trainer, update_kind
from megafork.plan.work import (
    Lengths,
    kv_bytes_per_token,
    layer_parameters,
    num_parameters,
)

_RESPONSE_BYTES = 8
"""of a token on its way from server to trainer: an int32 and a float32"""
_MOST_RESPONSES = 10_000_000


@dataclass(frozen=True)
class StepTime:
    """One step (rollout batch) in the steady state."""

    seconds: dict[str, float]
    """by phase: generate, score, update, optimizer, sync; reference, critic, move where they are.
    What a phase waits for communication is part of it"""
    waiting: dict[str, float]
    """of the phases' seconds: pipeline bubbles and communication that nothing hides, by kind"""
    wire_bytes: dict[str, float]
    """bytes that all GPUs together send in a step, by kind; sync: each weight once"""
    total: float
    """seconds of the step; less than the phases' sum where generation overlaps with training"""
    num_gpus: int
    """trainer's and servers'"""
    num_tokens: float
    """prompts and responses that are trained on"""
    assumptions: list[str]

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.num_tokens / self.total / self.num_gpus


def step_time(
    config: TrainConfig,
    shape: ModelShape,
    node: NodeType,
    num_train_nodes: int,
    num_serve_nodes: int,
    *,
    mean_response_tokens: float,
    mean_prompt_tokens: int = 200,
    kept_share: float = 1.0,
    efficiency: Efficiency | None = None,
) -> StepTime:
    """What one step of `config` takes on these nodes.

    num_serve_nodes: full of servers; 0: each training node has rollout.servers, with
    placement=disaggregated on GPUs beside the node's own. kept_share: of the generated groups, that
    dynamic sampling keeps. Raises UserError where layout and nodes do not go together.
    """
    efficiency = efficiency or Efficiency()
    colocated = config.rollout.placement == "colocated"
    dp = data_parallel_size(config, node, num_train_nodes)
    if colocated and num_serve_nodes:
        raise UserError(
            f"rollout.placement=colocated with {num_serve_nodes} serving nodes: colocated servers "
            "take the trainer's; give none, or rollout.placement=disaggregated"
        )
    longest = config.rollout.max_response_tokens
    lengths = Lengths(mean_prompt_tokens, mean_response_tokens, longest)
    trainer = Trainer(config, shape, node, dp, lengths, efficiency)
    server = _Server(config, shape, node, lengths, efficiency)
    num_servers = (
        node.gpus // server.tp * num_serve_nodes or config.rollout.servers * num_train_nodes
    )
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    generated = responses / kept_share
    passes = _trainer_passes(config, trainer)
    seconds = {"generate": server.seconds(-(-int(generated) // num_servers))}
    seconds |= {name: time.seconds for name, time in passes.items()}
    seconds["sync"] = _sync_seconds(config, trainer, node, server, colocated)
    if colocated:
        models = 2 if config.algorithm.advantages == "gae" else 1
        moved = 2 * models * trainer.state_bytes()
        seconds["move"] = moved / (node.host_link * efficiency.host_link)
    overlaps = config.rollout.max_policy_lag > 0 and not colocated
    wire = _added(time.wire_bytes for time in passes.values())
    wire["rollout"] = generated * mean_response_tokens * _RESPONSE_BYTES
    wire["sync"] = float(server.weights)
    return StepTime(
        seconds=seconds,
        waiting=_added(time.waiting for time in passes.values()),
        wire_bytes={name: count for name, count in wire.items() if count},
        total=_total(seconds, overlaps=overlaps),
        num_gpus=num_train_nodes * node.gpus + (0 if colocated else num_servers * server.tp),
        num_tokens=responses * (mean_prompt_tokens + mean_response_tokens),
        assumptions=_assumptions(config, node, lengths, kept_share, efficiency, trainer, server)
        + [f"{num_servers} servers of {config.rollout.tensor_parallel} GPUs"]
        + ["float32 goes at bfloat16's rate, which is too fast"] * (trainer.value_bytes == 4)
        + ["generation of the next batch hides behind training"] * overlaps,
    )


def _total(seconds: dict[str, float], *, overlaps: bool) -> float:
    generation, sync = seconds["generate"], seconds["sync"]
    training = sum(seconds.values()) - generation - sync
    return sync + (max(generation, training) if overlaps else generation + training)


def data_parallel_size(config: TrainConfig, node: NodeType, num_train_nodes: int) -> int:
    """Of the trainer on these nodes. Raises UserError where the layout does not fit them."""
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    if responses > _MOST_RESPONSES:
        raise UserError(
            f"rollout.prompts_per_step * rollout.group_size = {responses:,} are more responses "
            f"than a plan counts ({_MOST_RESPONSES:,}): lower rollout.prompts_per_step"
        )
    parallel, gpus = config.parallel, num_train_nodes * node.gpus
    dp, rest = divmod(gpus, parallel.model_parallel_size)
    if rest or dp == 0 or parallel.dp not in (None, dp):
        want = f"parallel.dp={parallel.dp} * " if parallel.dp else ""
        raise UserError(
            f"{want}parallel.tp={parallel.tp} * pp={parallel.pp} * cp={parallel.cp} does not fit "
            f"{num_train_nodes} nodes of {node.gpus} GPUs: change the layout or the nodes"
        )
    return dp


class _Server:
    """One vLLM server."""

    def __init__(
        self,
        config: TrainConfig,
        shape: ModelShape,
        node: NodeType,
        lengths: Lengths,
        efficiency: Efficiency,
    ) -> None:
        rollout, self.lengths = config.rollout, lengths
        self.tp, self.group_size = rollout.tensor_parallel, rollout.group_size
        colocated = rollout.placement == "colocated"
        gpus = self.tp * (rollout.servers if colocated else 1)
        if gpus > node.gpus:
            raise UserError(
                f"rollout.servers={rollout.servers} * tensor_parallel={self.tp} GPUs do not fit a "
                f"node of {node.gpus}: lower one of them"
            )
        value_bytes = DTYPE_BYTES[rollout.dtype or config.model.dtype]
        self.weights = num_parameters(shape) * value_bytes
        hbm, flops = node.hbm * efficiency.hbm, node.flops * efficiency.matrices
        vocabulary = shape.vocab_size * shape.hidden_size
        read = shape.num_layers * layer_parameters(shape) + vocabulary
        kv_bytes = kv_bytes_per_token(shape, value_bytes)
        kv_on_gpu = kv_bytes / min(self.tp, shape.num_kv_heads)
        all_reduces = 2 * shape.num_layers if self.tp > 1 else 0
        self.iteration = Iteration(
            fixed=efficiency.engine_iteration_s + all_reduces * efficiency.all_reduce_s,
            weights=read * value_bytes / self.tp / hbm,
            per_response=2 * read / self.tp / flops,
            per_kv_token=kv_on_gpu / hbm,
        )
        room = rollout.gpu_memory_utilization * node.gpu_memory
        room -= self.weights / self.tp + efficiency.engine_reserve_gib * GIB
        self.kv_tokens = max(0, int(room / kv_on_gpu))
        sample = lengths.responses(1000)
        held = lengths.prompt + sum(n * n for n in sample) / (2 * sum(sample))
        self.at_once = max(1, min(rollout.max_num_seqs, int(self.kv_tokens / held)))

    def seconds(self, responses: int) -> float:
        prompts = -(-responses // self.group_size)
        prefill = prompts * self.lengths.prompt * self.iteration.per_response
        spread = self.lengths.responses(responses)
        return prefill + decode(spread, self.lengths.prompt, self.at_once, self.iteration)


def _trainer_passes(config: TrainConfig, trainer: Trainer) -> dict[str, PassTime]:
    """Of a whole step."""
    updates = config.rollout.prompts_per_step // config.training.prompts_per_minibatch
    kind = update_kind(config.model.recompute, sequence_parallel=config.parallel.sequence_parallel)
    forward = trainer.run(FORWARD, 1.0)
    update = trainer.run(kind, head_share(config))
    backward = 2 / kind.matrices * update.seconds / trainer.num_micro_batches
    step = trainer.reduce_and_step(backward)
    passes = {
        "score": _times(forward, _scoring_passes(config, updates)),
        "update": _times(update, updates),
        "optimizer": _times(step, updates),
    }
    reference = float(config.kl.coefficient > 0)
    if not reference and config.forking.compare_every:
        reference = 1 / config.forking.compare_every
    if reference:
        passes["reference"] = _times(forward, reference * updates)
    if config.algorithm.advantages == "gae":
        parts = (trainer.run(FORWARD, 0.0), trainer.run(kind, 0.0), step)
        passes["critic"] = PassTime(
            updates * sum(part.seconds for part in parts),
            _added(_times(part, updates).waiting for part in parts),
            _added(_times(part, updates).wire_bytes for part in parts),
        )
    return passes


def _scoring_passes(config: TrainConfig, updates: int) -> int:
    """Mini-batches that are scored in a step (see trainer/step.py)."""
    needs_entropies = config.forking.select in ("top", "bottom")
    engine = config.algorithm.old_logprobs == "engine"
    if config.forking.entropy_of == "current":
        return updates if engine else 2 * updates - 1
    return 0 if engine and not needs_entropies else updates


def head_share(config: TrainConfig) -> float:
    """Share of the response tokens that the head sees in an update, at most on rho's way."""
    on_all = (config.kl.coefficient and config.kl.tokens == "all") or (
        config.entropy_bonus.coefficient and config.entropy_bonus.tokens == "all"
    )
    if on_all or config.forking.select == "all" or config.algorithm.objective == "gspo":
        return 1.0
    forking = config.forking
    shares = [forking.rho] if forking.rho_end is None else [forking.rho, forking.rho_end]
    return 1 - min(shares) if forking.select == "bottom" else max(shares)


def _sync_seconds(
    config: TrainConfig, trainer: Trainer, node: NodeType, server: _Server, colocated: bool
) -> float:
    """Every GPU of a server is sent the whole model and keeps its part; its own link bounds that.

    The senders are the pipeline's stages, each of its own layers, so pp > 1 does not slow it down.
    """
    efficiency, parallel = trainer.efficiency, config.parallel
    # On several nodes the first replica alone sends, to the servers of all of them.
    if colocated and trainer.dp * parallel.model_parallel_size <= node.gpus:
        return server.weights / (node.nvlink * efficiency.nvlink)
    return server.weights / (node.network * efficiency.network)


def _times(time: PassTime, factor: float) -> PassTime:
    return PassTime(
        time.seconds * factor,
        {name: value * factor for name, value in time.waiting.items()},
        {name: value * factor for name, value in time.wire_bytes.items()},
    )


def _added(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for table in tables:
        for name, value in table.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _assumptions(
    config: TrainConfig,
    node: NodeType,
    lengths: Lengths,
    kept_share: float,
    efficiency: Efficiency,
    trainer: Trainer,
    server: _Server,
) -> list[str]:
    return [
        "not measured: data-sheet rates times efficiencies ("
        + ", ".join(f"{key} {value:g}" for key, value in efficiency)
        + ")",
        f"{node.name}: {node.bf16_tflops:g} TFLOP/s, HBM {node.hbm_gb_per_s:g}, NVLink "
        f"{node.nvlink_gb_per_s:g}, network {node.network_gb_per_s:g} GB/s of each GPU",
        f"prompts of {lengths.prompt} tokens; responses exponential with mean {lengths.mean:g}, "
        f"cut at {lengths.longest}",
        f"dynamic sampling keeps {kept_share:.0%} of the groups",
        f"a server runs {server.at_once} responses at once (max_num_seqs "
        f"{config.rollout.max_num_seqs}; its KV cache holds {server.kv_tokens} tokens); a group's "
        "prompt is computed once; the batch ends with its longest response",
        f"{trainer.num_micro_batches} micro-batches of each rank in an update; bubble "
        "(pp - 1) / (m vpp); tensor- and pipeline-parallel communication waits, context-parallel "
        "hides behind attention, the gradients' reduction behind the last micro-batch's backward",
        "TransformerEngine's attention (causal, over packs) and its ring for cp",
        "weights are bound by the link of the GPU that takes them; gathering them hides behind it",
        "no time for rewards, evaluation, checkpoints, dispatch",
    ]
