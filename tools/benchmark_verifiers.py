"""Answers a second through the workers: ordinary maths answers, each one another.

    OMP_NUM_THREADS=1 python tools/benchmark_verifiers.py [--workers 2] [--count 4000]

Prints a table: of each kind of answer the responses a second, and how many were judged right (those
of even number are made to be). "mixed" has 70% integers, as contests do, and a tenth of each other
kind. The golds of a kind differ from response to response, so nothing comes out of a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable

from megafork.config import RewardConfig
from megafork.rewards.verifier import Judge

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
        made.append(KINDS[chosen](index + 2, index % 2))
    return made


async def judged(judge: Judge, made: list[Pair]) -> int:
    verdicts = await asyncio.gather(
        *(judge("", f"{REASONING}\\boxed{{{found}}}", gold) for gold, found in made)
    )
    failed = [verdict.failure for verdict in verdicts if verdict.failure]
    assert not failed, failed[:3]
    return round(sum(verdict.accuracy for verdict in verdicts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=4000)
    arguments = parser.parse_args()
    print(f"{arguments.workers} workers, {len(REASONING)} characters and a box each\n")
    print("| answers | responses | a second | ms of a worker each | right |")
    print("|" + " --- |" * 5)
    config = RewardConfig(verifier="maths", workers=arguments.workers, timeout_s=60.0)
    with Judge(config) as judge:
        asyncio.run(judged(judge, pairs("mixed", 100)))  # the workers have started
        for kind in ("mixed", *KINDS):
            made = pairs(kind, arguments.count)
            started = time.perf_counter()
            right = asyncio.run(judged(judge, made))
            seconds = time.perf_counter() - started
            rate, cost = len(made) / seconds, 1e3 * seconds * arguments.workers / len(made)
            print(f"| {kind} | {len(made):,} | {rate:,.0f} | {cost:.1f} | {right:,} |", flush=True)


if __name__ == "__main__":
    main()
