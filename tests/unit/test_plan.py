"""`megafork plan`: bytes against hand-computed values and megatron's schedule, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from megatron.core.pipeline_parallel import schedules
from typer.testing import CliRunner

from megafork.cli import app
from megafork.config import ModelConfig, ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.hf_mapping import rules
from megafork.plan.memory import (
    GIB,
    peak_in_flight,
    plan_memory,
    server_memory,
    training_memory,
    worst_micro_batch,
)
from megafork.plan.nodes import NODES, SHAPES, Nodes
from megafork.plan.plan_text import overrides
from megafork.plan.search import changed, search
from megafork.plan.step_time import CLAIM
from megafork.plan.trace import ChunkMemory, MicroBatch, trace_model
from tests.helpers.commands import QUICKSTART, megafork

SMALL = replace(
    SHAPES["qwen3-8b"],
    num_layers=8,
    hidden_size=256,
    intermediate_size=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=1000,
)
HEAD = 1024 * 256
"""padded to 128 * tp, tp 1, 2 and 4"""
LAYER = 256 * (4 + 2 + 2) * 64 + 256 * 256 + 3 * 256 * 512 + 2 * 256 + 2 * 64
NAMES = 'run.dir="x"', 'data.train="x"', 'reward.verifier="maths"', 'model.path="x"'


def settings(*overrides, responses=1000):
    return load_config(
        TrainConfig,
        None,
        [*NAMES, "training.steps=1", f"rollout.max_response_tokens={responses}", *overrides],
    )


def trainer(*overrides, shape=SMALL, dp=1, device="cuda"):
    config = settings(*overrides)
    return training_memory(config, shape, dp, *worst_micro_batch(config, dp), device=device)


@pytest.mark.parametrize(
    "name, billions", [("qwen3-8b", 8.2), ("qwen3-14b", 14.8), ("qwen3-32b", 32.8)]
)
def test_shapes_have_the_published_number_of_parameters(name, billions):
    shape = SHAPES[name]
    whole = rules(
        shape,
        layers=range(shape.num_layers),
        first_stage=True,
        last_stage=True,
        padded_vocab_size=shape.vocab_size,
        transformer_engine=False,
    )
    sizes = [dims for rule in whole for dims in rule.hf_shapes]
    total = sum(d[0] * (d[1] if len(d) > 1 else 1) for d in sizes)
    assert round(total / 1e9, 1) == billions


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout, layers",
    [
        (["parallel.tp=2"], [8]),
        (["parallel.pp=4"], [2, 2, 2, 2]),
        (["parallel.pp=2", "parallel.vpp=2"], [4, 4]),
        (["parallel.pp=2", "parallel.pipeline_layers=[3,5]"], [3, 5]),
        (["parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true"], [8]),
    ],
)
def test_static_bytes_are_those_of_the_parameters(layout, layers, tied):
    shape = replace(SMALL, tied_embeddings=tied)
    stages = trainer(*layout, shape=shape, dp=4)
    config = settings(*layout)
    tp, shared = config.parallel.tp, 4 * config.parallel.cp
    for stage, count in zip(stages, layers, strict=True):
        is_first, is_last = stage is stages[0], stage is stages[-1]
        heads = is_first + is_last - (is_first and is_last and tied)
        matrices = count * (LAYER - 2 * 256 - 2 * 64) + heads * HEAD
        norms = count * (2 * 256 + 2 * 64) + is_last * 256
        expected = matrices // tp + norms
        assert stage.num_parameters == expected
        assert stage.num_layers == count
        assert stage.parameters == 2 * expected
        assert stage.gradients == 4 * expected
        assert stage.optimizer == 12 * expected // shared


def test_float32_weights_are_their_own_main_copy():
    [stage] = trainer("model.dtype=float32", dp=2)
    assert stage.parameters == 4 * stage.num_parameters
    assert stage.optimizer == 4 * stage.num_parameters


def test_a_critic_has_a_head_for_a_value():
    off, on = (trainer(f"algorithm.advantages={kind}") for kind in ("group", "gae"))
    assert off[0].critic == 0
    number = on[0].num_parameters - HEAD + 256 + 1
    assert on[0].critic == (2 + 4 + 12) * number


@pytest.mark.parametrize("rank, micro_batches, held", [(0, 9, 4), (1, 9, 3), (3, 9, 1), (0, 2, 2)])
def test_one_forward_one_backward_holds_what_has_no_backward_yet(rank, micro_batches, held):
    chunk = ChunkMemory(num_parameters=1, held=10, layers=3, head=2, embedding=12)
    found = peak_in_flight((chunk,), ParallelConfig(pp=4), rank, micro_batches)
    assert found == (10 * held, 3)


@pytest.mark.parametrize("pp, vpp, micro_batches", [(2, 2, 4), (4, 2, 8), (2, 3, 2), (4, 3, 16)])
def test_the_interleaved_schedule_holds_what_megatrons_tables_say(pp, vpp, micro_batches):
    """Chunks differ by powers of ten, so that the sum says how many of each were in flight."""
    chunks = tuple(ChunkMemory(1, held=100**c, layers=0, head=0, embedding=0) for c in range(vpp))
    table = [c for _, c in schedules.get_schedule_table(micro_batches, vpp, pp)]
    for rank in range(pp):
        ahead = min(2 * (pp - rank - 1) + (vpp - 1) * pp, len(table))
        alive, most = 0, 0
        events = [(chunk, +1) for chunk in table[:ahead]]
        for index, chunk in enumerate(table[ahead:]):
            events += [(chunk, +1), (vpp - 1 - table[index], -1)]
        for chunk, sign in events:
            alive += sign * 100**chunk
            most = max(most, alive)
        parallel = ParallelConfig(pp=pp, vpp=vpp)
        assert peak_in_flight(chunks, parallel, rank, micro_batches)[0] == most


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2, "pipeline_layers": (3, 5)},
        {"pp": 2, "vpp": 2, "cp": 2},
    ],
)
def test_two_and_three_layers_say_what_all_of_them_do(layout, recompute):
    parallel = ParallelConfig(**layout)
    given = SMALL, ModelConfig(path="x", recompute=recompute), parallel, MicroBatch((256, 128), 300)
    for rank in range(parallel.pp):
        whole = trace_model(*given, pp_rank=rank, device="cuda")
        assert trace_model(*given, pp_rank=rank, device="cuda", quick=True) == whole
        assert all(chunk.held > 0 and chunk.layers > 0 for chunk in whole.chunks)
        has = [(chunk.embedding > 0, chunk.head > 0) for chunk in whole.chunks]
        chunks = range(rank, parallel.num_stages, parallel.pp)
        assert has == [(c == 0, c == parallel.num_stages - 1) for c in chunks]


def test_the_head_never_holds_all_logits():
    shape = replace(SMALL, vocab_size=200_000)
    [stage] = trainer(shape=shape)
    tokens = 32768
    logits = tokens * shape.vocab_size * 4
    assert 2**26 * 2 < stage.head < logits / 20


def test_a_server_has_what_its_weights_leave():
    config = settings("rollout.tensor_parallel=4", "rollout.max_num_seqs=8", responses=15360)
    server = server_memory(config, SHAPES["qwen3-32b"], NODES["h100"])
    assert server.kv_bytes_per_token == 2 * 64 * 8 * 128 * 2 // 4
    assert server.total == int(0.6 * 79.11 * GIB)
    assert abs(server.weights - 32.76e9 * 2 / 4) < 0.01e9
    whole = (server.total - server.weights - 4 * GIB) // 65536 // (1024 + 15360)
    assert server.whole_responses == whole > 0


def test_colocated_phases_share_a_gpu():
    both = "parallel.tp=4", "rollout.tensor_parallel=4", "rollout.gpu_memory_utilization=0.85"
    apart = settings(*both, "model.recompute=full")
    together = changed(apart, {"rollout.placement": "colocated", "rollout.servers": 2})
    plan = plan_memory(together, SHAPES["qwen3-14b"], Nodes(NODES["h100"], 2))
    assert sum(plan.phases.values()) > NODES["h100"].gpu_memory
    assert plan.fits, plan.problems
    assert plan.host.offload == 8 * (plan.stages[0].parameters + plan.stages[0].optimizer)
    greedy = changed(together, {"rollout.gpu_memory_utilization": 0.97})
    [problem] = plan_memory(greedy, SHAPES["qwen3-14b"], Nodes(NODES["h100"], 2)).problems
    assert "lower rollout.gpu_memory_utilization=0.97 to 0.94" in problem


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_what_does_not_fit_is_named_and_the_advice_fits():
    layout = "parallel.dp=8", "rollout.gpu_memory_utilization=0.35"
    bad = "--model", "qwen3-14b", "--nodes", "2", *layout
    result = run(*bad)
    assert result.exit_code == 1
    assert "parameters, gradients and optimizer alone take" in result.output
    assert "raise rollout.tensor_parallel=1" in result.output
    fits = [x.removeprefix("fits with: ") for x in result.output.splitlines() if "fits with" in x]
    assert fits and all("parallel.dp=4" in advice for advice in fits)
    for advice in fits:
        good = run(*bad, *advice.split())
        assert good.exit_code == 0, good.output
    for word in (
        "it fits",
        "KV cache",
        "tokens/s/GPU",
        "data_parallel",
        "assumed",
        "optimizer",
        CLAIM,
    ):
        assert word in good.output


def test_json_holds_the_same_numbers():
    layout = "parallel.tp=4", "parallel.sequence_parallel=true", "model.recompute=full"
    result = run("--model", "qwen3-8b", "--nodes", "2", "--json", *layout)
    said = json.loads(result.output)
    plan = plan_memory(
        load_config(TrainConfig, None, [*NAMES, "training.steps=1", *layout]),
        SHAPES["qwen3-8b"], Nodes(NODES["h100"], 1, 1),
    )  # fmt: skip
    assert said["fits"] == plan.fits
    assert [s["total"] for s in said["stages"]] == [s.total for s in plan.stages]
    assert said["time"]["tokens_per_second_per_gpu"] > 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give a run's config, or a model"),
        (["--model", "qwen9", "--nodes", "2"], "--model=qwen9 is neither one of"),
        (["--model", "qwen3-8b"], "--nodes 1 leaves no node"),
        (["--model", "qwen3-8b", "--nodes", "2", "parallel.tp=3"], "parallel.tp=3 must divide"),
        (["--model", "qwen3-8b", "--nodes", "2", "parallel.pp=5"], "parallel.pp=5 must divide"),
        (["--model", "qwen3-8b", "--nodes", "2", "--node", "v100"], "--node v100 is neither"),
    ],
)
def test_mistakes_are_named(arguments, words):
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    assert words in str(error)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_hidden_layers": "x"}, "num_hidden_layers='x': it has to be a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: it has to be a whole number"),
        ({"vocab_size": None}, "vocab_size=None: it has to be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': it has to be a number above 0"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, change, words):
    config = json.loads((QUICKSTART / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    done = megafork("plan", "--model", tmp_path, "--nodes", "2", mark=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/config.json has ") and words in line


def test_a_search_gives_layouts_that_fit_the_quickest_first():
    config = settings("parallel.dp=8", responses=8192)
    shape, node = SHAPES["qwen3-8b"], NODES["h100"]
    found = search(config, shape, node, 2, 1, wanted=4)
    speeds = [layout.time.tokens_per_second_per_gpu for layout in found]
    assert len(found) == 4 and speeds == sorted(speeds, reverse=True)
    for layout in found:
        said = settings("parallel.dp=8", *overrides(layout.changes).split(), responses=8192)
        exact = plan_memory(said, shape, Nodes(node, 1, 1))
        assert exact.fits and exact.stages == layout.memory.stages
