"""Faster imports of what stays until the process ends."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Turn the garbage collector off for the imports in this block, and keep it off what they made.

    torch, transformers and megatron-core make hundreds of thousands of objects and drop few of
    them; looking through all of them again and again took a fifth of a rank's imports.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
