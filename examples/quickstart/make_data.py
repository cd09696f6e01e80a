"""Writes the quickstart's puzzles: Countdown with three numbers.

    python examples/quickstart/make_data.py

Every puzzle can be solved without leaving 0..99. A puzzle is its numbers, in any order, and its
target: no puzzle stands in both train.jsonl and heldout.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import combinations_with_replacement, permutations
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
NUMBERS = range(1, 16)
TARGETS = range(10, 100)
RESULTS = range(100)
NUM_HELDOUT = 512
NUM_TRAIN = 4096


class Puzzle(NamedTuple):
    """`numbers` are sorted, so that equal puzzles compare equal."""

    numbers: tuple[int, ...]
    target: int


class Move(NamedTuple):
    """One step, as it is written, and the numbers that it leaves."""

    text: str
    numbers: tuple[int, ...]


def moves(numbers: tuple[int, ...]) -> Iterator[Move]:
    """All ways to replace two of the numbers by their sum, difference or product."""
    for left, right in permutations(range(len(numbers)), 2):
        a, b = numbers[left], numbers[right]
        rest = tuple(n for i, n in enumerate(numbers) if i not in (left, right))
        for operator, result in (("+", a + b), ("-", a - b), ("*", a * b)):
            if result in RESULTS:
                yield Move(f"{a}{operator}{b}={result}", (result, *rest))


def solutions(numbers: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    """Every way to use up the numbers, as (last result, response text)."""
    if len(numbers) == 1:
        yield numbers[0], "."
        return
    for move in moves(numbers):
        for target, text in solutions(move.numbers):
            yield target, move.text + (";" if len(move.numbers) > 1 else "") + text


def all_puzzles() -> list[Puzzle]:
    """Every solvable puzzle once, in a fixed order."""
    return [
        Puzzle(numbers, target)
        for numbers in combinations_with_replacement(NUMBERS, 3)
        for target in sorted({target for target, _ in solutions(numbers)})
        if target in TARGETS
    ]


def split_puzzles(seed: int) -> tuple[list[Puzzle], list[Puzzle]]:
    """(held-out puzzles, all the others), each in random order."""
    puzzles = all_puzzles()
    random.Random(seed).shuffle(puzzles)
    return puzzles[:NUM_HELDOUT], puzzles[NUM_HELDOUT:]


def prompt_of(puzzle: Puzzle, rng: random.Random) -> str:
    numbers = rng.sample(puzzle.numbers, len(puzzle.numbers))
    return f"{' '.join(map(str, numbers))}>{puzzle.target}:"


def write_rows(path: Path, puzzles: list[Puzzle], rng: random.Random) -> None:
    with path.open("w", encoding="ascii", newline="\n") as file:
        for i, puzzle in enumerate(puzzles):
            row = {
                "id": f"{path.stem}-{i}",
                "prompt": prompt_of(puzzle, rng),
                "answer": str(puzzle.target),
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the Countdown puzzles of the quickstart.")
    parser.add_argument("--seed", type=int, default=0, help="decides the split and the order")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write to")
    args = parser.parse_args()

    heldout, others = split_puzzles(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    for name, puzzles in (("heldout", heldout), ("train", others[:NUM_TRAIN])):
        path = args.out / f"{name}.jsonl"
        write_rows(path, puzzles, rng)
        print(f"{path}: {len(puzzles)} puzzles, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
