"""Run a function on N gloo ranks: imported once, forked for each test (0.2 s instead of 8 s)."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

# Imported before the fork, so that no rank pays for it again.
import torch

import megafork.training.policy  # noqa: F401
from megafork.parallel.ports import free_port
from megafork.parallel.topology import shutdown

_CONTEXT = multiprocessing.get_context("fork")


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240
) -> list:
    """`function(*args)` on every rank of a fresh world; the results in rank order.

    A rank's exception fails the test with that rank's traceback; a hang fails it at `timeout`, in
    seconds, and stderr shows where the ranks are.
    """
    torch.set_num_threads(1)
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_rank_main, args=(rank, world_size, port, sender, function, args, timeout)
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        outcomes = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} of {world_size} gave no result in {timeout} s")
            try:
                outcomes.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                outcomes.append((False, f"rank {rank} died"))
        errors = [text for ok, text in outcomes if not ok]
        assert not errors, "\n".join(errors)
        return [value for _, value in outcomes]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _rank_main(rank, world_size, port, pipe, function, args, timeout) -> None:
    # What earlier tests left: a process group's destructor waits for threads that are not here.
    gc.freeze()
    faulthandler.dump_traceback_later(0.95 * timeout, file=2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, f"--- rank {rank} ---\n{traceback.format_exc()}")
    # As bytes: multiprocessing would share the tensors' memory, which ends with this process.
    pipe.send_bytes(pickle.dumps(outcome))
    if outcome[0]:
        shutdown()
