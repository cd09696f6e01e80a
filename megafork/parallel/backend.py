"""The device, the communication backend and the layer implementation, chosen by capability."""

from __future__ import annotations

import importlib.util
import os

import torch


def has_cuda() -> bool:
    return torch.cuda.is_available()


def has_transformer_engine() -> bool:
    """TransformerEngine's layers need both the package and a CUDA device."""
    return has_cuda() and importlib.util.find_spec("transformer_engine") is not None


def prepare() -> torch.device:
    """Make this process ready for megatron-core and return its device. Call before building."""
    if has_cuda():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    from megafork.ops import bfloat16_products
    from megafork.parallel import cpu_patch

    cpu_patch.apply()
    bfloat16_products.replace_where_slow()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return torch.device("cpu")


def communication_backend() -> str:
    return "nccl" if has_cuda() else "gloo"


def return_free_memory() -> None:
    """Give the device the free memory of torch's own cache, for another process to take."""
    if has_cuda():
        torch.cuda.empty_cache()
