"""Seconds of a step: an estimate, within a factor of 2 of published points (docs/plan.md).

Nothing of it is measured. A node's rates are its data sheet's, what is reached of them is
EFFICIENCY, and what is taken for granted is said in StepTime.assumptions.

A product of [m, k] and [k, n] is 2 m k n FLOPs. Norms, rotary embedding, SwiGLU's elementwise part
and softmax are left out, as everywhere: they are bound by memory, and part of the efficiencies.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass

from megafork.algorithms.objectives import load_objective
from megafork.config import TrainConfig
from megafork.errors import UserError
from megafork.model.shape import ModelShape
from megafork.plan.memory import data_parallel_size, server_memory
from megafork.plan.nodes import DTYPE_BYTES, Nodes, layer_parameters, num_parameters

CLAIM = "estimate, within a factor of 2 of published points of 800 tokens a response or more"
MEAN_SHARE = 0.25
"""of the longest response, that the mean one has where nobody says how long it is"""
_SAMPLE = 1000
_RESPONSE_BYTES = 8
"""of a token on its way from server to trainer: an int32 and a float32"""
_GRADIENT_BYTES = 4
_OPTIMIZER_TRAFFIC = 28
"""bytes read and written for a parameter: gradient, main copy and two moments in float32, read; the
last three written. The weight itself comes on top."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a node's rates that are reached: round numbers that well-kept stacks report.

    None is fitted to the published points that tests/unit/test_step_time.py compares with.
    """

    matrices: float = 0.5
    """of bf16 peak: a layer's matrices with all that is elementwise around them"""
    attention: float = 0.4
    """of bf16 peak: causal attention over packs"""
    head: float = 0.25
    """of bf16 peak: log-probabilities and entropies"""
    hbm: float = 0.8
    nvlink: float = 0.75
    network: float = 0.75
    host_link: float = 0.7
    exposed: float = 0.5
    """of a collective's time in training: the rest hides behind products"""
    engine_iteration_s: float = 0.004
    """seconds of a decoding step beside memory and products"""
    all_reduce_s: float = 1e-5
    """seconds of latency of an all-reduce in decoding (two in each layer)"""


EFFICIENCY = Efficiency()


@dataclass(frozen=True)
class Lengths:
    """Response lengths: exponential, cut at the longest, with this mean after the cut.

    One parameter, a long tail, and a mass at the cut: what reasoning models' responses look like
    when nothing but their mean is known.
    """

    prompt: int
    mean: float
    longest: int

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise UserError(
                f"rollout.max_response_tokens={self.longest} leaves no length to plan with: raise "
                "it to 2 or more"
            )
        if not 1 <= self.mean < self.longest:
            raise UserError(
                f"a mean response of {self.mean:g} tokens does not fit responses of 1 to "
                f"rollout.max_response_tokens={self.longest}: give one between them"
            )

    def responses(self, count: int) -> list[int]:
        """Return `count` lengths at evenly spaced quantiles, ascending; their mean is `mean`."""
        # The scale s of the exponential: mean(min(x, longest)) = s (1 - exp(-longest / s)) = mean.
        low, high = self.mean, self.longest * 1e4
        for _ in range(100):
            scale = (low + high) / 2
            if -scale * math.expm1(-self.longest / scale) < self.mean:
                low = scale
            else:
                high = scale
        spread = (-low * math.log1p(-(i + 0.5) / count) for i in range(count))
        return [min(self.longest, max(1, round(length))) for length in spread]


def attention_flops(shape: ModelShape, sum_of_squares: float) -> float:
    """Return those of one layer's causal attention, forward: scores, and their product with values.

    sum_of_squares: of the lengths of the sequences. A causal kernel does half of the square.
    """
    return 2.0 * shape.num_heads * shape.head_dim * sum_of_squares


@dataclass(frozen=True)
class Pass:
    """Counts of the parts of a pass over a mini-batch; one forward pass has 1 of each."""

    matrices: float = 1
    attention: float = 1
    head: float = 1
    messages: float = 1
    """between tensor- and context-parallel ranks"""
    crossings: float = 1
    """of a pipeline boundary"""


def update_pass(recompute: str) -> Pass:
    """Return forward and backward.

    Backward has two products for one of forward's; a causal attention kernel five for two; the head
    computes its logits once more and has no third for free.
    """
    full = recompute == "full"
    return Pass(3 + full, 3.5 + (recompute != "none"), head=4, messages=2 + full, crossings=2)


@dataclass(frozen=True)
class StepTime:
    """Seconds, bytes and tokens of a step (one rollout batch) in the steady state."""

    seconds: dict[str, float]
    """by phase: generate, score, update, optimizer, sync; reference, critic, move where they are.
    What a phase waits is part of it"""
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
    nodes: Nodes,
    *,
    mean_response_tokens: float | None = None,
    mean_prompt_tokens: int = 200,
) -> StepTime:
    """Estimate what one step of `config` takes on these nodes.

    mean_response_tokens: MEAN_SHARE of the longest unless given. Without serving nodes each
    training node has rollout.servers, with placement=disaggregated on GPUs beside its own.

    Raises UserError where layout and nodes do not go together.
    """
    rollout, colocated = config.rollout, config.rollout.placement == "colocated"
    if colocated and nodes.serve:
        raise UserError(
            f"rollout.placement=colocated with {nodes.serve} serving nodes: colocated servers "
            "take the trainer's; give none, or rollout.placement=disaggregated"
        )
    if mean_response_tokens is None:
        mean_response_tokens = MEAN_SHARE * rollout.max_response_tokens
    lengths = Lengths(mean_prompt_tokens, mean_response_tokens, rollout.max_response_tokens)
    step = Step(config, shape, nodes, lengths)
    generate, sync = step.generate(), step.sync()
    seconds = {"generate": generate} | step.train() | {"sync": sync}
    if colocated:
        seconds["move"] = step.move()
    training = sum(seconds.values()) - generate - sync
    overlaps = rollout.max_policy_lag > 0 and not colocated
    wire = step.wire_bytes | {
        "rollout": step.num_responses * lengths.mean * _RESPONSE_BYTES,
        "sync": step.model_bytes,
    }
    servers = 0 if colocated else step.num_servers * rollout.tensor_parallel
    return StepTime(
        seconds=seconds,
        waiting=dict(step.waiting),
        wire_bytes={name: count for name, count in wire.items() if count},
        total=sync + (max(generate, training) if overlaps else generate + training),
        num_gpus=nodes.train_gpus + servers,
        num_tokens=step.num_responses * (lengths.prompt + lengths.mean),
        assumptions=step.assumptions()
        + ["generation of the next batch hides behind training"] * overlaps,
    )


class Step:
    """Costs of one step on its nodes: a method for each phase, which returns its seconds.

    Mini-batches and sequences are average ones. Ranks lie as megatron lays them: tp, then cp, then
    dp, then pp. `train` counts what its phases wait (`waiting`) and send (`wire_bytes`), by kind.
    """

    def __init__(
        self, config: TrainConfig, shape: ModelShape, nodes: Nodes, lengths: Lengths
    ) -> None:
        self.config, self.shape, self.nodes, self.lengths = config, shape, nodes, lengths
        parallel, rollout, training = config.parallel, config.rollout, config.training
        self.node, self.dp = nodes.node, data_parallel_size(config, nodes)
        self.peak, self.hbm = self.node.bf16_tflops * 1e12, self.node.hbm_gb_per_s * 1e9
        self.value_bytes = DTYPE_BYTES[config.model.dtype]
        self.served_bytes = DTYPE_BYTES[rollout.dtype or config.model.dtype]
        self.num_parameters = num_parameters(shape)
        self.model_bytes = self.num_parameters * self.served_bytes
        self.of_rank = self.num_parameters / (parallel.tp * parallel.pp)
        self.num_responses = rollout.prompts_per_step * rollout.group_size

        of_node = self.node.gpus // rollout.tensor_parallel
        self.num_servers = of_node * nodes.serve or rollout.servers * nodes.train
        self.server = server_memory(config, shape, self.node)
        sample = lengths.responses(_SAMPLE)
        held = lengths.prompt + sum(n * n for n in sample) / (2 * sum(sample))
        in_cache = int(self.server.kv_tokens / held)
        self.responses_at_once = max(1, min(rollout.max_num_seqs, in_cache))

        of_update = training.prompts_per_minibatch * rollout.group_size
        self.rows = of_update * lengths.mean
        self.tokens = of_update * (lengths.prompt + lengths.mean - 1)
        self.squares = of_update * sum((lengths.prompt + n - 1) ** 2 for n in sample) / _SAMPLE
        micro_batches = self.tokens / self.dp / parallel.cp / training.micro_batch_tokens
        multiple = parallel.pp if parallel.vpp > 1 else 1
        self.num_micro_batches = multiple * math.ceil(micro_batches / multiple)
        self.waiting = defaultdict[str, float](float)
        self.wire_bytes = defaultdict[str, float](float)

    def generate(self) -> float:
        """Return the seconds until the last response of a batch is done, prompts included.

        A server runs b responses at once as long as there are others to start, then those that are
        left: n mean / b + longest - mean decoding steps. Each takes a fixed time and the time to
        read the weights, or that of the products if it is longer; every token's keys and values are
        read at each later token of its response.
        """
        shape, rollout, lengths = self.shape, self.config.rollout, self.lengths
        tp, hbm = rollout.tensor_parallel, self.hbm * EFFICIENCY.hbm
        read = shape.num_layers * layer_parameters(shape) + shape.vocab_size * shape.hidden_size
        weights = read * self.served_bytes / tp / hbm
        product = 2 * read / tp / (self.peak * EFFICIENCY.matrices)
        all_reduces = 2 * shape.num_layers if tp > 1 else 0
        fixed = EFFICIENCY.engine_iteration_s + all_reduces * EFFICIENCY.all_reduce_s
        number = -(-self.num_responses // self.num_servers)
        spread, at_once = lengths.responses(number), min(number, self.responses_at_once)
        iterations = sum(spread) / at_once + spread[-1] - sum(spread) / number
        running = sum(spread) / iterations
        cached = sum(n * (lengths.prompt + n / 2) for n in spread)
        prefill = -(-number // rollout.group_size) * lengths.prompt * product
        cache = cached * self.server.kv_bytes_per_token / hbm
        return prefill + iterations * (fixed + max(weights, running * product)) + cache

    def train(self) -> dict[str, float]:
        """Return the seconds of score, update and optimizer; reference and critic if there are."""
        config, forward = self.config, Pass()
        updates = config.rollout.prompts_per_step // config.training.prompts_per_minibatch
        update = update_pass(config.model.recompute)
        seconds = {
            "score": self._pass(forward, 1.0, _scoring_passes(config, updates)),
            "update": self._pass(update, head_share(config), updates),
            "optimizer": self._optimizer(updates),
        }
        if config.kl.coefficient:
            seconds["reference"] = self._pass(forward, 1.0, updates)
        elif every := config.forking.compare_every:
            seconds["reference"] = self._pass(forward, 1.0, updates / every)
        if config.algorithm.uses_critic:
            passes = self._pass(forward, 0.0, updates) + self._pass(update, 0.0, updates)
            seconds["critic"] = passes + self._optimizer(updates)
        return seconds

    def sync(self) -> float:
        """Return the seconds of a weight transfer to a server, at its link's rate.

        On several nodes the first replica alone sends, to the servers of all of them.
        """
        inside = self.config.rollout.placement == "colocated" and self.nodes.train == 1
        return self.model_bytes / self._link_rate(1 if inside else math.inf)

    def move(self) -> float:
        """Return the seconds of offloading a rank's weights and optimizer and of loading them.

        In float32 the weights are their own main copy.
        """
        of_share = (12 if self.value_bytes == 2 else 8) / (self.config.parallel.cp * self.dp)
        models = 1 + self.config.algorithm.uses_critic
        moved = 2 * models * self.of_rank * (self.value_bytes + of_share)
        return moved / (self.node.host_link_gb_per_s * 1e9 * EFFICIENCY.host_link)

    def _pass(self, kind: Pass, head_share: float, times: float) -> float:
        """Return the seconds of `times` passes over a mini-batch, the slowest stage's.

        head_share: of the response tokens, that the head sees.
        """
        shape, parallel = self.shape, self.config.parallel
        matrices = kind.matrices * 2 * layer_parameters(shape) * self.tokens / EFFICIENCY.matrices
        attention = kind.attention * attention_flops(shape, self.squares) / EFFICIENCY.attention
        head = kind.head * 2 * shape.vocab_size * shape.hidden_size * self.rows * head_share
        head /= EFFICIENCY.head
        layers = parallel.vpp * max(map(len, shape.stage_layers(parallel)))
        seconds = (layers * (matrices + attention) + head) / self.peak
        seconds /= parallel.tp * parallel.cp * self.dp
        activations = self.tokens * shape.hidden_size * self.value_bytes
        values = 2 * shape.num_kv_heads * shape.head_dim * self.value_bytes * self.tokens
        copies = 1 if parallel.sequence_parallel else parallel.tp
        gathers = 4 * (parallel.tp - 1) * activations
        sent = {
            "tensor_parallel": kind.messages * gathers * shape.num_layers,
            "context_parallel": kind.messages * (parallel.cp - 1) * values * shape.num_layers,
            "pipeline": kind.crossings * (parallel.num_stages - 1) * copies * activations,
        }
        seconds += sum(self._send(count, name, times) for name, count in sent.items() if count)
        bubble = seconds / self.num_micro_batches * (parallel.pp - 1) / parallel.vpp
        self.waiting["bubble"] += times * bubble
        return times * (seconds + bubble)

    def _optimizer(self, updates: int) -> float:
        """Return the seconds of AdamW's step on each rank's share, gradients and weights sent."""
        sharers = self.config.parallel.cp * self.dp
        traffic = self.of_rank / sharers * (_OPTIMIZER_TRAFFIC + self.value_bytes)
        sent = self.num_parameters * (sharers - 1) * (_GRADIENT_BYTES + self.value_bytes)
        seconds = traffic / (self.hbm * EFFICIENCY.hbm)
        return updates * (seconds + self._send(sent, "data_parallel", updates))

    def _send(self, count: float, kind: str, times: float) -> float:
        """Return the seconds that `count` bytes, sent by all ranks together, are waited for."""
        parallel, num_gpus = self.config.parallel, self.nodes.train_gpus
        extent = {
            "tensor_parallel": parallel.tp,
            "context_parallel": parallel.tp * parallel.cp,
            "data_parallel": parallel.tp * parallel.cp * self.dp,
            "pipeline": num_gpus,
        }[kind]
        seconds = EFFICIENCY.exposed * count / num_gpus / self._link_rate(extent)
        self.wire_bytes[kind] += times * count
        self.waiting[kind] += times * seconds
        return seconds

    def _link_rate(self, extent: float) -> float:
        """Return bytes/s of a group whose ranks lie within `extent` neighbours."""
        if extent <= self.node.gpus:
            return self.node.nvlink_gb_per_s * 1e9 * EFFICIENCY.nvlink
        return self.node.network_gb_per_s * 1e9 * EFFICIENCY.network

    def assumptions(self) -> list[str]:
        """Return what the seconds take for granted, a line each."""
        node, rollout, lengths = self.node, self.config.rollout, self.lengths
        efficiencies = ", ".join(f"{name} {value:g}" for name, value in asdict(EFFICIENCY).items())
        return [
            f"not measured: data-sheet rates times efficiencies ({efficiencies})",
            f"{node.name}: {node.bf16_tflops:g} TFLOP/s, HBM {node.hbm_gb_per_s:g}, NVLink "
            f"{node.nvlink_gb_per_s:g}, network {node.network_gb_per_s:g} GB/s of each GPU",
            f"prompts of {lengths.prompt} tokens; responses exponential with mean "
            f"{lengths.mean:g}, cut at {lengths.longest}; dynamic sampling keeps every group",
            f"a server runs {self.responses_at_once} responses at once (max_num_seqs "
            f"{rollout.max_num_seqs}, and what its KV cache holds); a group's prompt is computed "
            "once; the batch ends with its longest response",
            f"{self.num_micro_batches} micro-batches of each rank in an update, ranks alike; "
            "bubble (pp - 1) / (m vpp)",
            f"{EFFICIENCY.exposed:g} of a collective's time in training waits, the rest hides",
            "TransformerEngine's attention (causal, over packs) and its ring for cp",
            "weights are bound by the link of the GPU that takes them; gathering them hides behind "
            "it",
            "no time for rewards, evaluation, checkpoints, dispatch",
            f"{self.num_servers} servers of {rollout.tensor_parallel} GPUs",
            *["float32 goes at bfloat16's rate, which is too fast"] * (self.value_bytes == 4),
        ]


def _scoring_passes(config: TrainConfig, updates: int) -> int:
    """Return the mini-batches that are scored in a step (see trainer/step.py)."""
    needs_entropies = config.forking.by_entropy or config.forking.by_plugin
    engine = config.algorithm.old_logprobs == "engine"
    if config.forking.entropy_of == "current":
        return updates if engine else 2 * updates - 1
    return 0 if engine and not needs_entropies else updates


def head_share(config: TrainConfig) -> float:
    """Return the share of response tokens that the head sees in an update, at most on rho's way."""
    on_all = (config.kl.coefficient and config.kl.tokens == "all") or (
        config.entropy_bonus.coefficient and config.entropy_bonus.tokens == "all"
    )
    _, rows = load_objective(config.algorithm.objective)
    forking = config.forking
    if on_all or forking.select == "all" or rows != "gradient":
        return 1.0
    shares = [forking.rho] if forking.rho_end is None else [forking.rho, forking.rho_end]
    return 1 - min(shares) if forking.select == "bottom" else max(shares)
