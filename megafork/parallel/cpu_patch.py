"""Patches that megatron-core needs to run without CUDA; `megatron_jit` has the only other one.

megatron-core takes it for granted that tensors live on a CUDA device. Every patch below redirects
one such assumption to the CPU, changes no arithmetic, and is applied only when CUDA is absent
(`backend.prepare`). Checked with megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros")


class _NoStream:
    """Streams and events order work on a GPU; CPU work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _NoStream:
        return self


def _no_stream_context(stream: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            device = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, device=device, **kwargs)

    return wrapper


def _type_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return wrapper


@functools.cache
def apply() -> None:
    """Redirect megatron-core's CUDA assumptions to the CPU, once for this process."""
    import megatron.core.tensor_parallel.random as rng

    # torch remembers on first use which functions a `with torch.device(...)` is about: it must see
    # the factories before they are wrapped, or models built under one get wrong buffers, silently.
    _device_constructors()
    # Buffers and activations are allocated on torch.cuda.current_device().
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # Flags and counters are made with device="cuda".
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # Optimizer state and embeddings are moved with .cuda().
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    # Pipeline sends and the gradient buckets synchronise streams.
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.stream = _no_stream_context  # type: ignore[assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = _NoStream  # type: ignore[assignment]
    # Dropout and recomputation save and restore the generator of the CUDA device.
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(rng.__name__).setLevel(logging.ERROR)
    # Gradient clipping and the optimizers ask for the type "torch.cuda.FloatTensor".
    torch.Tensor.type = _type_as_on_cuda(torch.Tensor.type)  # type: ignore[method-assign]


@contextlib.contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make megatron-core allocate on `device` inside the block."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = before
