"""What a response costs the rank that collects it, token by token, from the server's bytes to rows.

    OMP_NUM_THREADS=1 python tools/benchmark_collection.py [--groups 6] [--tokens 20480]

Groups of 16 responses in the server's own encoding; each stage alone, on one core. The last column
is what a step of the paper's size (8,192 responses of 20,480 tokens at most) takes of each of 8
data-parallel replicas. The verifier is not in it, nor what the network takes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megafork.rollout.journal import Journal, read_step
from megafork.rollout.sampling import Completion, decode_completions, encode_completions
from megafork.sample import Group, Sample
from megafork.types import known_table

GROUP_SIZE = 16
STEP_TOKENS, REPLICAS = 8192 * 20480, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=20480, help="of each response")
    options = parser.parse_args()
    num_tokens = options.groups * GROUP_SIZE * options.tokens
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.process_time(), time.monotonic()
        yield
        seconds[stage] = time.process_time() - started[0]
        seconds[f"{stage}, wall"] = time.monotonic() - started[1]

    payload = _payload(options.tokens)
    with timed("read the server's bytes"):
        answers = [decode_completions(payload) for _ in range(options.groups)]
    groups = [_group(index, answer) for index, answer in enumerate(answers)]
    with timed("summarise for rank 0"):
        summaries = [group.summary() for group in groups]
    with tempfile.TemporaryDirectory() as folder:
        with timed("journal"), Journal(Path(folder) / "step_000001.journal") as journal:
            for group in groups:
                journal.append(group)
        size = journal.path.stat().st_size
        with timed("make rows"):
            table = known_table(summaries).with_tokens(groups)
        with timed("read the journal (a resumed step)"):
            assert len(read_step(Path(folder), 1)) == options.groups
    assert table.num_rows == num_tokens
    _print(seconds, num_tokens, size)


def _payload(length: int) -> bytes:
    draw = random.Random(0)
    return encode_completions(
        [
            Completion(
                [draw.randrange(151_936) for _ in range(length)],
                [-draw.expovariate(2.0) for _ in range(length)],
                "stop",
                [(1, 0)],
            )
            for _ in range(GROUP_SIZE)
        ]
    )


def _group(index: int, answer: list[Completion]) -> Group:
    samples = [
        Sample(index * GROUP_SIZE + i, c.token_ids, c.logprobs, c.truncated)
        for i, c in enumerate(answer)
    ]
    return Group(index, list(range(200)), 1, samples)


def _print(seconds: dict[str, float], num_tokens: int, journal_bytes: int) -> None:
    def cell(of: Callable[[float], float], stage: str, digits: int) -> str:
        return f"{of(seconds[stage]):.{digits}f}"

    print(f"{num_tokens:,} tokens; the journal has {journal_bytes / num_tokens:.1f} bytes a token")
    print("\n| | CPU ns a token | wall ns a token | CPU s of a step, each of 8 replicas |")
    print("|---|---|---|---|")
    for stage in [name for name in seconds if not name.endswith(", wall")]:
        nanoseconds = cell(lambda s: s / num_tokens * 1e9, stage, 0)
        wall = cell(lambda s: s / num_tokens * 1e9, f"{stage}, wall", 0)
        step = cell(lambda s: s / num_tokens * STEP_TOKENS / REPLICAS, stage, 1)
        print(f"| {stage} | {nanoseconds} | {wall} | {step} |")


if __name__ == "__main__":
    main()
