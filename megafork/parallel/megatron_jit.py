"""Keeps torch.compile's compiler out of processes without a GPU.

megatron-core decorates its fused functions with `megatron.core.jit.jit_fuser`, which is
torch.compile: decorating alone imports the whole compiler (about 1.7 CPU seconds and 70 MiB in
every rank). Without CUDA no fused function is ever called (`gpt.transformer_config`), so there the
decorator returns the function as it is. The packages that import megatron-core import this one
first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NAME = "megatron.core.jit"


class _Jit(ModuleType):
    """`megatron.core.jit`, decided when megatron-core first takes something from it.

    Importing megafork.parallel must not import torch, which alone knows whether there is CUDA.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import torch

        if torch.cuda.is_available():
            spec = importlib.util.find_spec("megatron.core")
            assert spec is not None and spec.submodule_search_locations is not None
            [folder] = spec.submodule_search_locations
            found = importlib.util.spec_from_file_location(_NAME, f"{folder}/jit.py")
            assert found is not None and found.loader is not None
            found.loader.exec_module(self)
        else:
            self.jit_fuser = self.noop_decorator = _as_it_is
            self.enable_jit_fuser = self.disable_jit_fuser = _nothing
        return self.__dict__[name]


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _nothing() -> None: ...


def install() -> None:
    """Stand in for `megatron.core.jit`, unless megatron-core has been imported already."""
    sys.modules.setdefault(_NAME, _Jit(_NAME))
