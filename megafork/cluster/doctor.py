"""`megafork doctor`: what works here, which backends are active, what to do about the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
import warnings
from dataclasses import dataclass

from rich.console import Console

_CPU = "bash tools/setup_cpu.sh"
_GPU = "pip install --no-build-isolation -r requirements/gpu.txt"


@dataclass(frozen=True)
class Part:
    """A package, what it is for and the command that gets it."""

    name: str
    module: str
    distributions: tuple[str, ...]
    needed_for: str
    mend: str
    required: bool = False
    gpu_only: bool = False


_PARTS = (
    Part("torch", "torch", ("torch",), "everything", _CPU, required=True),
    Part(
        "megatron-core",
        "megatron.core.models.gpt",
        ("megatron-core",),
        "training and scoring",
        _CPU,
        required=True,
    ),
    Part("transformers", "transformers", ("transformers",), "tokenizers", _CPU, required=True),
    Part("safetensors", "safetensors", ("safetensors",), "weights", _CPU, required=True),
    Part("aiohttp", "aiohttp", ("aiohttp",), "rollouts", _CPU, required=True),
    Part("scipy", "scipy", ("scipy",), "intervals of evaluations", _CPU, required=True),
    Part("tensorboard", "tensorboard", ("tensorboard",), "run.tensorboard=true", _CPU),
    Part("matplotlib", "matplotlib", ("matplotlib",), "curves.png, report.html", _CPU),
    Part("jinja2", "jinja2", ("jinja2",), "report.html", _CPU),
    Part("sentencepiece", "sentencepiece", ("sentencepiece",), ".model tokenizers", _CPU),
    Part(
        "TransformerEngine",
        "transformer_engine.pytorch",
        ("transformer-engine",),
        "fused layers and attention on a GPU",
        _GPU,
        gpu_only=True,
    ),
    Part(
        "flash-attn",
        "flash_attn",
        ("flash-attn", "flash-attn-3"),
        "one of TransformerEngine's attention kernels; cuDNN's serves without it",
        "pip install --no-build-isolation flash-attn",
        gpu_only=True,
    ),
    Part(
        "apex",
        "apex",
        ("apex",),
        "megatron-core's fused optimizer where TransformerEngine is absent",
        "pip install --no-build-isolation git+https://github.com/NVIDIA/apex",
        gpu_only=True,
    ),
)


def report(vllm_python: str = sys.executable) -> int:
    """Print the report. Returns 0 when `megafork train` can run here, 1 when it lacks something.

    Packages are imported, not looked up: a broken one is reported with its error. vllm_python: the
    interpreter of the rollout server (rollout.python).
    """
    warnings.simplefilter("ignore")
    console = Console(highlight=False, soft_wrap=True)
    missing = []
    for part in _PARTS:
        error = _import_error(part.module)
        if error is None:
            console.print(f"[green]ok[/]       {part.name} {_version(part.distributions)}")
        elif part.gpu_only and not _has_cuda():
            console.print(f"[dim]no GPU   {part.name}: {part.needed_for}[/]")
        else:
            missing += [part.name] if part.required else []
            _print_missing(console, part.name, part.needed_for, error, part.mend)
    vllm, error = _vllm(vllm_python)
    if error is None:
        console.print(f"[green]ok[/]       vLLM {vllm} ({vllm_python})")
    else:
        missing.append("vLLM")
        mend = f"{_GPU if _has_cuda() else _CPU}, or use another one's: rollout.python=/path/python"
        _print_missing(console, "vLLM", "the rollouts of `megafork train`", error, mend)
    console.print()
    for name, value in _active(vllm):
        console.print(f"{name:14} {value}", markup=False)
    if missing:
        console.print(f"\nmegafork train cannot run here without {', '.join(missing)}")
    return int(bool(missing))


def _print_missing(console: Console, name: str, needed_for: str, error: str, mend: str) -> None:
    console.print(f"[red]missing[/]  {name}, needed for {needed_for}")
    console.print(f"         found: {error}\n         mend:  {mend}", markup=False)


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything on import
        return f"{type(error).__name__}: {error}"
    return None


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "(version unknown)"


def _vllm(python: str) -> tuple[str | None, str | None]:
    """Return (version, error) of the vLLM that `python` imports, in a process of its own."""
    code = "import vllm; print(vllm.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return done.stdout.strip().splitlines()[-1], None


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    from megafork.parallel.backend import has_cuda

    return has_cuda()


def _active(vllm: str | None) -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    if _import_error("torch") is not None:
        return rows
    from megafork.parallel import backend

    device = "CPU, one thread per rank unless OMP_NUM_THREADS says otherwise"
    if _has_cuda():
        import torch

        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    te = backend.has_transformer_engine()
    fused = te or (_has_cuda() and importlib.util.find_spec("apex") is not None)
    return [
        *rows,
        ("device", device),
        ("communication", backend.communication_backend()),
        ("layers", "TransformerEngine" if te else "megatron-core's local spec"),
        ("attention", "TransformerEngine" if te else "scaled_dot_product_attention on packs"),
        ("optimizer", "fused Adam" if fused else "torch.optim.AdamW under megatron's"),
        ("rollouts", f"vLLM {vllm}" if vllm else "none"),
    ]
