"""Compares `megafork plan`'s memory with that of real training steps, on CPU processes.

    OMP_NUM_THREADS=1 python tools/benchmark_plan.py [--models qwen3,tied] [--layouts tp1,pp2]

Linux only. Measured: resident memory of each rank at the peak of its second step (scoring,
selection, update), less what the process had before the model was built and after a step of a
tiny model, which loads what libraries load late. Blocks of 64 KiB or more are given back to the
system when they are freed, so that resident memory is what lives. Planned: the tensors of the same
micro-batches for the same layout, from the meta device, and what the largest product packs an
operand in, which depends on the CPU and is measured too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from benchmarks.measuring import Job, in_a_fork, memory, on_ranks, peak_from_here

from megafork.config import ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.data.sample import Group, Sample
from megafork.data.token_table import TokenTable, token_table
from megafork.model.shape import ModelShape
from megafork.parallel.mesh import Mesh, initialize
from megafork.plan.memory import training_memory
from megafork.plan.trace import MicroBatch
from megafork.trainer.policy import Policy

MIB = 1 << 20
PROMPT, LENGTH = 17, 257  # one token of each sequence is not fed
SHORT = 25
OF_MICRO_BATCH = 4
ROWS = OF_MICRO_BATCH * (LENGTH - PROMPT)
"""response tokens of a micro-batch on a rank"""
_M_MMAP_THRESHOLD = -3
_COMMON = {"max_position_embeddings": 1024, "eos_token_id": 1, "pad_token_id": 0}


@dataclass(frozen=True)
class Model:
    config: Any
    dtype: str = "float32"
    uneven: str | None = None
    """its layers in four stages"""


MODELS = {
    "qwen3": Model(
        Qwen3Config(
            vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
            **_COMMON,
        )
    ),
    "tied": Model(
        Qwen3Config(
            vocab_size=24_000, hidden_size=384, intermediate_size=1024, num_hidden_layers=12,
            num_attention_heads=6, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
            **_COMMON,
        )
    ),
    "llama-bf16": Model(
        LlamaConfig(
            vocab_size=8192, hidden_size=640, intermediate_size=1792, num_hidden_layers=6,
            num_attention_heads=10, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
            **_COMMON,
        ),
        dtype="bfloat16",
        uneven="[1,2,2,1]",
    ),
}  # fmt: skip
LAYOUTS = {
    "tp1": (),
    "tp2-sp-full": (
        "parallel.tp=2", "parallel.sequence_parallel=true", "model.recompute=full",
    ),
    "pp2": ("parallel.pp=2",),
    "cp2": ("parallel.cp=2",),
    "dp2-full": ("parallel.dp=2", "model.recompute=full"),
    "pp2-vpp2": ("parallel.pp=2", "parallel.vpp=2"),
}  # fmt: skip
TINY = Qwen3Config(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, **_COMMON,
)  # fmt: skip


def save_model(folder: Path, config: Any) -> None:
    logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def settings(folder: Path, model: Model, layout: str) -> TrainConfig:
    stages = LAYOUTS[layout]
    if model.uneven is not None and "parallel.vpp=2" in stages:
        stages += (f"parallel.pipeline_layers={model.uneven}",)
    return load_config(
        TrainConfig,
        None,
        [
            'run.dir="none"', 'data.train="none"', 'reward.verifier="maths"', "training.steps=1",
            f'model.path="{folder}"', f'model.dtype="{model.dtype}"', 'forking.select="all"',
            f"rollout.max_response_tokens={LENGTH - PROMPT}", f"data.max_prompt_tokens={PROMPT}",
            f"training.micro_batch_tokens={OF_MICRO_BATCH * (LENGTH - 1)}", *stages,
        ],
    )  # fmt: skip


def num_micro_batches(config: TrainConfig) -> int:
    """As many as a pipeline needs to be full."""
    return config.parallel.pp * config.parallel.vpp


def measured(folder: Path, tiny: Path, config: TrainConfig) -> list[float]:
    """MiB of every rank, in rank order."""
    world_size = config.parallel.world_size
    return on_ranks(world_size, _job, tiny, config, repeats=1, timeout=240).value


def _job(tiny: Path, config: TrainConfig) -> Job:
    _small_memory()
    mesh = initialize(config.parallel)

    even = config.parallel.model_copy(update={"pipeline_layers": None})

    def warm_up() -> None:
        _steps(config.model_copy(update={"parallel": even}), mesh, tiny)

    def work() -> list[float]:
        return _steps(config, mesh, Path(config.model.path))

    return Job(work, warm_up=warm_up)


def _small_memory() -> None:
    """What is freed goes back to the system; where MKL can, what it packed operands in goes too."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    mkl = ctypes.CDLL(str(library)) if library.exists() else None
    if hasattr(mkl, "mkl_serv_disable_fast_mm"):
        mkl.mkl_serv_free_buffers()
        mkl.mkl_serv_disable_fast_mm()


def _steps(config: TrainConfig, mesh: Mesh, folder: Path) -> list[float]:
    gc.collect()
    before = peak_from_here()
    model = config.model.model_copy(update={"path": str(folder)})
    policy = Policy(config.model_copy(update={"model": model}), mesh)
    full = num_micro_batches(config), LENGTH
    # The first step, of short sequences, makes the optimizer's moments.
    for number, length in ((1, SHORT), full):
        table = _table(config, policy.shape.vocab_size, number, length)
        peak_from_here()
        scores = policy.score(table)
        [mask], _ = policy.select([table], [scores], step=1)
        policy.update(table, scores, mask)
    peaks: list[float] = [0.0] * mesh.world_size
    dist.all_gather_object(peaks, memory("VmHWM") - before)
    return peaks


def _table(config: TrainConfig, vocab_size: int, micro_batches: int, length: int) -> TokenTable:
    """Sequences of that many micro-batches for each data-parallel rank; of LENGTH they are full."""
    generator = torch.Generator().manual_seed(0)
    parallel = config.parallel
    number = micro_batches * OF_MICRO_BATCH * (parallel.dp or 1) * parallel.cp

    def random_ids(count: int) -> list[int]:
        return torch.randint(2, vocab_size, (count,), generator=generator).tolist()

    groups = []
    for index in range(number):
        response = random_ids(length - PROMPT)
        sample = Sample(index, response, [-1.0] * len(response), False)
        groups.append(Group(index, random_ids(PROMPT), 1, [sample]))
    table = token_table(groups)
    return table.with_columns(advantage_R=torch.ones(table.num_rows))


def packed(folder: Path, config: TrainConfig) -> list[float]:
    """MiB of every rank, in rank order, in which its largest product packs an operand."""
    parallel, shape = config.parallel, ModelShape.from_folder(folder)
    head, gate_and_up = shape.vocab_size, 2 * shape.intermediate_size
    widths = [gate_and_up] * (parallel.pp - 1) + [head]
    stages = [in_a_fork(_packed, ROWS, shape.hidden_size, width // parallel.tp) for width in widths]
    return _of_ranks(stages, parallel)


def _packed(rows: int, inner: int, columns: int) -> float:
    """Of a float32 product, MKL's: 5 MiB on one CPU, 3 to 17 on another (bfloat16's there: 8)."""
    _small_memory()
    torch.set_num_threads(1)
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    before = peak_from_here()
    product = a @ b.T
    return max(memory("VmHWM") - before - product.nbytes / MIB, 0.0)


def planned(folder: Path, config: TrainConfig) -> list[float]:
    """MiB of every rank, in rank order."""
    parallel = config.parallel
    sequences = OF_MICRO_BATCH * parallel.cp
    micro_batch = MicroBatch((LENGTH - 1,) * sequences, ROWS)
    torch.set_num_threads(1)
    shape, number = ModelShape.from_folder(folder), num_micro_batches(config)
    stages = training_memory(config, shape, parallel.dp or 1, micro_batch, number, device="cpu")
    return _of_ranks([stage.training / MIB for stage in stages], parallel)


def _of_ranks(stages: list[float], parallel: ParallelConfig) -> list[float]:
    """Each rank's, of what each stage has: megatron counts pipeline ranks last."""
    in_stage = parallel.world_size // parallel.pp
    return [stages[rank // in_stage] for rank in range(parallel.world_size)]


def compare(folder: Path, tiny: Path, model: str, layout: str) -> list[tuple[float, float]]:
    """(planned, measured) MiB of every rank."""
    config = settings(folder, MODELS[model], layout)
    tensors, packs = in_a_fork(planned, folder, config), packed(folder, config)
    plans = map(sum, zip(tensors, packs, strict=True))
    return list(zip(plans, measured(folder, tiny, config), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    arguments = parser.parse_args()
    print("| model | layout | rank | planned, MiB | measured, MiB | planned / measured |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        tiny = Path(temporary) / "tiny"
        save_model(tiny, TINY)
        for model in arguments.models.split(","):
            folder = Path(temporary) / model
            save_model(folder, MODELS[model].config)
            for layout in arguments.layouts.split(","):
                for rank, (plan, real) in enumerate(compare(folder, tiny, model, layout)):
                    print(
                        f"| {model} | {layout} | {rank} | {plan:.1f} | {real:.1f} "
                        f"| {plan / real:.3f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
