"""Runs a piece of work on fresh ranks and measures time, peak memory and bytes sent."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .ranks import run_ranks

Work = Callable[[], Any]
"""Leaves nothing behind but its value: gradients that it returns are dropped at its end."""


@dataclass
class Job:
    """What a rank does, made on that rank."""

    work: Work
    returned_mib: float = 0.0
    """Gradients that any implementation has to return: no cost of one."""
    warm_up: Work | None = None


@dataclass
class Cost:
    seconds: float
    cpu_seconds: float
    peak_mib: float
    sent: int
    value: Any


def on_ranks(
    world_size: int, make: Callable[..., Job], *args: Any, repeats: int, timeout: float = 3600
) -> Cost:
    """Costs of `make(*args)`: the slowest rank's best time, the largest peak, rank 0's bytes."""
    costs = run_ranks(world_size, _measure, make, args, repeats, timeout=timeout)
    return Cost(
        max(c.seconds for c in costs),
        max(c.cpu_seconds for c in costs),
        max(c.peak_mib for c in costs),
        costs[0].sent,
        costs[0].value,
    )


def best(world_size: int, rows: dict[str, tuple], *, repeats: int, rounds: int) -> dict[str, Cost]:
    """Each row's (make, *args), all of them in turn, `rounds` times: the best time of each."""
    found: dict[str, Cost] = {}
    for _ in range(rounds):
        for name, arguments in rows.items():
            cost = on_ranks(world_size, *arguments, repeats=repeats)
            if name in found:
                cost.seconds = min(cost.seconds, found[name].seconds)
                cost.cpu_seconds = min(cost.cpu_seconds, found[name].cpu_seconds)
                cost.peak_mib = min(cost.peak_mib, found[name].peak_mib)
            found[name] = cost
    return found


def _measure(make: Callable[..., Job], args: tuple[Any, ...], repeats: int) -> Cost:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return _cost(make(*args), repeats)


def _cost(job: Job, repeats: int) -> Cost:
    (job.warm_up or job.work)()
    before = peak_from_here()
    with BytesSent() as sent:
        value, *first = timed(job.work)
    peak = memory("VmHWM") - before - job.returned_mib
    times = [first]
    for _ in range(repeats - 1):
        dist.barrier()
        times.append(timed(job.work)[1:])
    if isinstance(value, tuple):
        value = [v.tolist() for v in value]
    wall, cpu = map(min, zip(*times, strict=True))
    return Cost(wall, cpu, max(peak, 0.0), sent.count, value)


def timed(work: Work) -> tuple[Any, float, float]:
    """Its value, its seconds, and the seconds that this process was computing meanwhile."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, time.perf_counter() - wall, time.process_time() - cpu


class BytesSent:
    """Counts the bytes that this rank hands to all_reduce and all_gather."""

    def __enter__(self) -> BytesSent:
        self.count = 0
        self.originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
        for name, original in self.originals.items():
            setattr(dist, name, self._counted(original, own=1 if name == "all_gather" else 0))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _counted(self, original: Callable[..., Any], own: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += args[own].nbytes
            return original(*args, **kwargs)

        return call


def in_a_fork(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, whose memory ends with it; at most 30 min."""
    (value,) = run_ranks(1, function, *args, timeout=1800)
    return value


def peak_from_here() -> float:
    """VmRSS now; VmHWM starts again from it."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or it would hide a peak
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> float:
    """MiB of this process: VmRSS is resident now, VmHWM was at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def mib(*tensors: torch.Tensor) -> float:
    return sum(t.nbytes for t in tensors) / 2**20


def table(
    title: str,
    costs: dict[str, Cost | str],
    *,
    logits_mib: float | None = None,
    error: Callable[[Any], float] | None = None,
) -> None:
    """Markdown: one row each, and what the rows called "ours" are of the best of the others.

    A row that is a text says why there is no measurement.
    """
    measured = {name: cost for name, cost in costs.items() if isinstance(cost, Cost)}
    others = {name: cost for name, cost in measured.items() if not name.startswith("ours")}
    fastest = min(others, key=lambda name: others[name].seconds)
    least = min(others, key=lambda name: others[name].cpu_seconds)
    unit = " (of the logits)" if logits_mib else ""
    print(f"\n### {title}\n")
    print(
        "| | time | of the fastest other | CPU time | of the least other "
        f"| peak{unit} | bytes sent | largest error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, cost in costs.items():
        if isinstance(cost, str):
            print(f"| {name} | {cost} | | | | | | |")
            continue
        peak = f"{cost.peak_mib:.0f} MiB"
        if logits_mib:
            peak += f" ({cost.peak_mib / logits_mib:.2f})"
        worst = f"{error(cost.value):.1e}" if error is not None else "-"
        ratio = cost.seconds / others[fastest].seconds
        cpu_ratio = cost.cpu_seconds / others[least].cpu_seconds
        print(
            f"| {name} | {cost.seconds * 1e3:.1f} ms | {ratio:.2f} "
            f"| {cost.cpu_seconds * 1e3:.1f} ms | {cpu_ratio:.2f} "
            f"| {peak} | {cost.sent:,} | {worst} |"
        )
    smallest = min(others, key=lambda name: others[name].peak_mib)
    for name in measured:
        if name in others:
            continue
        of_time = measured[name].seconds / others[fastest].seconds
        of_cpu = measured[name].cpu_seconds / others[least].cpu_seconds
        line = (
            f"{name}: {of_time:.2f} of the time of {fastest}, "
            f"{of_cpu:.2f} of the CPU time of {least}"
        )
        if others[smallest].peak_mib >= 1:
            of_peak = measured[name].peak_mib / others[smallest].peak_mib
            line += f", {of_peak:.3f} of the memory of {smallest}"
        print(f"\n{line}", flush=True)
