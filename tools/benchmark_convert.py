"""Peak memory and time of `megafork convert` at the shapes of published models.

    OMP_NUM_THREADS=1 python tools/benchmark_convert.py [--shape qwen3-8b] [--folder DIR] [--keep]

Writes an HF folder of random bfloat16 values, cut into files as the published one is, converts it
to megatron and back, each in a process of its own, and compares the weights bit by bit. Needs three
times the model's size in --folder, and deletes all of it in the end. Memory is VmHWM, which counts
the pages of open files too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megafork.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megafork.checkpoint.hf_stream import StreamingSafetensors, TensorInfo
from megafork.checkpoint.layout import whole_model_rules
from megafork.checkpoint.verify import first_difference
from megafork.model.shape import ModelShape

MB = 1e6
# hidden, intermediate, layers, heads, kv heads, tied, GB of a published file
SHAPES = {
    "qwen3-4b": (2560, 9728, 36, 32, 8, True, 4.0),
    "qwen3-8b": (4096, 12288, 36, 32, 8, False, 4.0),
    "qwen3-32b": (5120, 25600, 64, 64, 8, False, 4.0),
    "many-layers": (512, 2048, 64, 4, 2, True, 0.1),  # 0.6 GB, no tensor above 160 MB
}
_POOL = 1 << 24


def write_model(folder: Path, name: str) -> int:
    """A random model of that shape; returns its bytes."""
    hidden, inner, layers, heads, kv_heads, tied, file_gb = SHAPES[name]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    infos = [
        TensorInfo(tensor, shape, torch.bfloat16)
        for rule in whole_model_rules(ModelShape.from_folder(folder))
        for tensor, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    ]
    output = StreamingSafetensors(folder, infos, int(file_gb * 1e9))
    pool = torch.randn(2 * _POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    start = 0
    for info in infos:
        row = info.row_bytes // 2
        step = max(1, _POOL // row)
        for first in range(0, info.shape[0], step):
            rows = min(step, info.shape[0] - first)
            start = (start + 7919) % _POOL  # no two blocks hold the same
            values = pool[start : start + rows * row].view(rows, *info.shape[1:])
            output.write(info.name, first, values)
    return sum(info.num_bytes for info in infos)


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def work(task: str, source: Path, target: Path) -> None:
    """In a process of its own: do it and print what it took."""
    before, started = peak_bytes(), time.perf_counter()
    if task == "HF to megatron":
        hf_to_megatron(source, target, max_file_bytes=int(5e9))
    elif task == "megatron to HF":
        megatron_to_hf(source, target, like=None, max_file_bytes=int(5e9))
    elif (difference := first_difference(source, target)) is not None:
        sys.exit(difference)
    seconds = time.perf_counter() - started
    print(json.dumps({"before": before, "peak": peak_bytes(), "seconds": seconds}))


def measure(task: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", task, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--folder", type=Path, help="for the files; unset: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        task, source, target = arguments.work
        work(task, Path(source), Path(target))
        return
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.folder))
    hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    try:
        size = write_model(hf, arguments.shape)
        shape = ModelShape.from_folder(hf)
        largest = shape.vocab_size * shape.hidden_size * 2
        table = Table(
            "", "seconds", "GB/s", "peak, MB", "of it before the work, MB",
            title=f"{arguments.shape}: {size / 1e9:.1f} GB, largest tensor {largest / MB:.0f} MB",
        )  # fmt: skip
        for task, source, target in (
            ("HF to megatron", hf, megatron),
            ("megatron to HF", megatron, back),
            ("compare", hf, megatron),
            ("compare the way back", back, megatron),
        ):
            found = measure(task, source, target)
            seconds, peak, before = (found[key] for key in ("seconds", "peak", "before"))
            table.add_row(
                task, f"{seconds:.1f}", f"{size / 1e9 / seconds:.2f}",
                f"{peak / MB:.0f}", f"{before / MB:.0f}",
            )  # fmt: skip
        Console(width=100).print(table)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
