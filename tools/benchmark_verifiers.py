"""Answers a second through the workers: ordinary maths answers, each one another.

    OMP_NUM_THREADS=1 python tools/benchmark_verifiers.py [--workers 2] [--count 4000]

Prints a table: of each kind of answer the responses a second, and how many were judged right. Every
eight responses have a new gold answer, as groups do; half of them are right. "mixed" has 70%
integers, as contests do, and a tenth of each other kind. Where other work shares the cores, read
the processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable

import psutil

from megafork.config import RewardConfig
from megafork.verifiers.verifier import Judge

GROUP = 8
Pair = tuple[str, str]
REASONING = "We add what is known and simplify, so that $x = \\frac{a}{b}$ follows. " * 60
"""About as long as a short chain of thought: 4,000 characters"""


def integer(number: int, off: int) -> Pair:
    return str(number), f"{number + off}"


def fraction(number: int, off: int) -> Pair:
    return f"\\frac{{{number}}}{{{2 * number + 1}}}", f"{3 * number + off}/{6 * number + 3}"


def root(number: int, off: int) -> Pair:
    return f"{2 * number}\\sqrt{{7}}", f"\\sqrt{{{28 * number * number + off}}}"


def interval(number: int, off: int) -> Pair:
    return f"[{number}, {2 * number + 1})", f"\\left[{number + off},\\,{2 * number + 1}.0\\right)"


KINDS: dict[str, Callable[[int, int], Pair]] = {
    "integers": integer,
    "fractions": fraction,
    "roots": root,
    "intervals": interval,
}


def pairs(kind: str, count: int) -> list[Pair]:
    draw = random.Random(0)
    made = []
    for index in range(count):
        chosen = kind
        if kind == "mixed":
            chosen = draw.choices(list(KINDS), weights=(7, 1, 1, 1))[0]
        group, member = divmod(index, GROUP)
        made.append(KINDS[chosen](group + 2, max(0, member + 1 - GROUP // 2)))
    return made


async def judged(judge: Judge, made: list[Pair]) -> int:
    verdicts = await asyncio.gather(
        *(judge("", f"{REASONING}\\boxed{{{found}}}", gold) for gold, found in made)
    )
    failed = [verdict.failure for verdict in verdicts if verdict.failure]
    assert not failed, failed[:3]
    return round(sum(verdict.accuracy for verdict in verdicts))


def cpu_seconds() -> float:
    """Of all workers that run."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(t.user + t.system for t in times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=4000)
    arguments = parser.parse_args()
    print(f"{arguments.workers} workers, {len(REASONING)} characters and a box each\n")
    print("| answers | responses | a second | CPU ms of a worker each | right |")
    print("|" + " --- |" * 5)
    config = RewardConfig(verifier="maths", workers=arguments.workers, timeout_s=60.0)
    with Judge(config) as judge:
        asyncio.run(judged(judge, pairs("mixed", 600)))  # started, and the parser has seen LaTeX
        for kind in ("mixed", *KINDS):
            made = pairs(kind, arguments.count)
            started, cpu = time.perf_counter(), cpu_seconds()
            right = asyncio.run(judged(judge, made))
            seconds = time.perf_counter() - started
            rate, cost = len(made) / seconds, 1e3 * (cpu_seconds() - cpu) / len(made)
            print(f"| {kind} | {len(made):,} | {rate:,.0f} | {cost:.1f} | {right:,} |", flush=True)


if __name__ == "__main__":
    main()
