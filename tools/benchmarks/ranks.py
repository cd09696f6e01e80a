"""Run a function on N gloo ranks: a fork has its imports already (0.2 s instead of 8 s)."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("fork")


_AFTER_A_FAILURE_S = 10.0
"""How long the other ranks may take to fail too, once one has"""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240
) -> list:
    """`function(*args)` on every rank of a fresh world; the results in rank order.

    A rank's exception fails the test with that rank's traceback; a hang fails it at `timeout`, in
    seconds, with the ranks that hang, and stderr shows where they are.
    """
    torch.set_num_threads(1)
    ranks: dict[Connection, int] = {}
    processes = []
    for rank in range(world_size):
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_rank_main, args=(rank, world_size, theirs, function, args, timeout)
        )
        process.start()
        theirs.close()
        ranks[ours] = rank
        processes.append(process)
    # As under torchrun, the store is not a rank's. Its port is bound here: one that is only known
    # to be free may be another world's by the time that rank 0 binds it. It is made after the
    # forks: they would inherit whatever lock of libc its thread holds while ranks connect to it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for pipe in ranks:
        pipe.send(store.port)
    try:
        return _results(ranks, timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _results(ranks: dict[Connection, int], timeout: float) -> list:
    results, errors = {}, {}
    deadline = time.monotonic() + timeout
    while waiting := [pipe for pipe, rank in ranks.items() if rank not in results | errors]:
        ready = wait(waiting, max(deadline - time.monotonic(), 0))
        if not ready:
            hung = ", ".join(str(ranks[pipe]) for pipe in waiting)
            seconds = f"in {timeout} s" if not errors else "after that"
            raise TimeoutError(
                _told(errors) + f"rank {hung} of {len(ranks)} gave no result {seconds}"
            )
        for pipe in ready:
            rank = ranks[pipe]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, f"rank {rank} died"
            (results if ok else errors)[rank] = value
        if errors:
            deadline = min(deadline, time.monotonic() + _AFTER_A_FAILURE_S)
    assert not errors, _told(errors)
    return [results[rank] for rank in range(len(ranks))]


def _told(errors: dict[int, str]) -> str:
    return "".join(f"{errors[rank]}\n" for rank in sorted(errors))


def _rank_main(rank, world_size, pipe, function, args, timeout) -> None:
    # What earlier tests left: a process group's destructor waits for threads that are not here.
    gc.freeze()
    faulthandler.dump_traceback_later(0.95 * timeout, file=2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(pipe.recv()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, f"--- rank {rank} ---\n{traceback.format_exc()}")
    # As bytes: multiprocessing would share the tensors' memory, which ends with this process.
    pipe.send_bytes(pickle.dumps(outcome))
    if outcome[0] and dist.is_initialized():
        dist.destroy_process_group()
