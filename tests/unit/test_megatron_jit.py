"""Without a GPU the compiler behind torch.compile is never loaded; with one megatron compiles."""

from __future__ import annotations

import subprocess
import sys

import torch

from megafork.parallel import megatron_jit
from tests.helpers.commands import ROOT

MODULES = ("trainer.policy", "model.layers", "checkpoint.sharded", "plan.trace")


def test_without_cuda_no_compiler_is_imported():
    program = (
        "import importlib, sys, torch\n"
        "torch.cuda.is_available = lambda: False\n"
        f"for name in {MODULES}: importlib.import_module('megafork.' + name)\n"
        "from megatron.core.fusions import fused_bias_swiglu\n"
        "print(fused_bias_swiglu.swiglu.__code__.co_filename)\n"
        "compiler = ('torch._dynamo', 'torch._inductor')\n"
        "print([name for name in sys.modules if name.startswith(compiler)])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    [source, compiler] = done.stdout.splitlines()
    assert source.endswith("fused_bias_swiglu.py"), done.stderr
    assert compiler == "[]"


def test_with_cuda_the_decorator_is_megatrons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    jit = megatron_jit._Jit("megatron.core.jit")
    assert jit.jit_fuser is torch.compile
    jit.disable_jit_fuser()
    assert jit.jit_fuser is jit.noop_decorator
