"""The Triton version of the head, and when it runs."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Return whether Triton works on this tensor here; MEGAFORK_TRITON=0 keeps everything on torch.

    Triton runs on CUDA and, with TRITON_INTERPRET=1, step by step on the CPU: that is for tests.
    """
    if tensor.is_cuda:
        works = torch.cuda.get_device_capability(tensor.device) >= (8, 0)  # bfloat16 products
    else:
        works = os.environ.get("TRITON_INTERPRET") == "1"
    return works and os.environ.get("MEGAFORK_TRITON") != "0" and _is_installed()


@functools.cache
def _is_installed() -> bool:
    """Return whether there is Triton, and a torch (2.8) whose bfloat16 products can be float32."""
    return (
        importlib.util.find_spec("triton") is not None and "dtype" in torch.ops.aten.mm.overloads()
    )
