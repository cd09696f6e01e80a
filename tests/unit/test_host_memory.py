"""What a process gives back of the memory that it has freed."""

from __future__ import annotations

import multiprocessing

import numpy as np
import psutil
import pytest

from megafork.system.heap import return_free_heap

MIB = 1 << 20


def kept_of_freed_blocks(result, give_back) -> None:
    """MiB that 60 freed blocks of 8 MiB still take, each with a small block behind it that lives.

    A freed block of 30 MiB raises the size from which glibc maps blocks by themselves.
    """
    for _ in range(3):
        np.ones(30 * MIB // 8)
    before = psutil.Process().memory_info().rss
    large, small = [], []
    for _ in range(60):
        large.append(np.ones(MIB))
        small.append(np.ones(4096))
    large.clear()
    give_back()
    result.put((psutil.Process().memory_info().rss - before) / MIB)


@pytest.mark.parametrize(("give_back", "all_of_it"), [(return_free_heap, True), (int, False)])
def test_freed_blocks_go_back_to_the_system(give_back, all_of_it):
    context = multiprocessing.get_context("spawn")  # with a heap of its own
    result = context.SimpleQueue()
    process = context.Process(target=kept_of_freed_blocks, args=(result, give_back))
    process.start()
    kept = result.get()
    process.join(10)
    assert kept < 20 if all_of_it else kept > 400
