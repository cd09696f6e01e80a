"""A pickle can call any function of any module. What comes from files and sockets may not.

torch.distributed pickles objects for its collectives, and whoever can reach the sockets of gloo or
NCCL could send one in a rank's place; megatron-core's checkpoints pickle their index. Both hold
records of a few modules and plain values, and nothing else is unpickled here.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import dataclasses
import enum
import io
import os
import pathlib
import pickle
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import filesystem

_PACKAGES = ("megafork.", "megatron.core.dist_checkpointing.", "torch.distributed.checkpoint.")
"""Of whose modules records may come: dataclasses, named tuples, enumerations and exceptions"""
_RECORDS = (enum.Enum, BaseException, tuple)
_ARRAY: Any = np.empty(0).__reduce__()[0]
"""What numpy makes an array by, under a name that differs by its version"""
_PLAIN = {
    ("builtins", name): getattr(builtins, name)
    for name in ("bytearray", "complex", "frozenset", "range", "set", "slice")
} | {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "deque"): collections.deque,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    (_ARRAY.__module__, _ARRAY.__name__): _ARRAY,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("traceback", "FrameSummary"): traceback.FrameSummary,
    ("traceback", "StackSummary"): traceback.StackSummary,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


def _storage(content: bytes) -> Any:
    """Stand in for torch's function of this kind, which unpickles without a limit."""
    return torch.load(io.BytesIO(content), weights_only=True)


class SafeUnpickler(pickle.Unpickler):
    """Raises pickle.UnpicklingError where the pickle names what is neither a record nor plain."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle names, only of a module that is imported already: to import one is
        to run it."""
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage
        found = getattr(sys.modules.get(module), name, None)
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        if module == "builtins" and _is_a(found, BaseException):
            return found
        is_record = dataclasses.is_dataclass(found) or _is_a(found, *_RECORDS)
        if module.startswith(_PACKAGES) and isinstance(found, type) and is_record:
            return found
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which nothing of ours writes: it may be made to run code"
        )


def _is_a(found: Any, *kinds: type) -> bool:
    return isinstance(found, type) and issubclass(found, kinds)


def guard_collectives() -> None:
    """Make torch.distributed's collectives of objects unpickle by SafeUnpickler from here on."""
    distributed_c10d._unpickler = SafeUnpickler  # type: ignore[attr-defined]


class _SafePickle:
    """A stand-in for the module `pickle` that loads by SafeUnpickler."""

    dump = staticmethod(pickle.dump)

    @staticmethod
    def load(file: Any) -> Any:
        return SafeUnpickler(file).load()


@contextlib.contextmanager
def guarded_checkpoint() -> Iterator[None]:
    """Inside it, torch and megatron-core read a checkpoint without running what it holds."""
    before = os.environ.get(_WEIGHTS_ONLY)
    module: Any = filesystem
    module.pickle = _SafePickle
    os.environ[_WEIGHTS_ONLY] = "1"  # of every torch.load, whatever it was called with
    try:
        yield
    finally:
        module.pickle = pickle
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
