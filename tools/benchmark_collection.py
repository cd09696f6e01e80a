"""What a response costs the process that collects it, token by token, from bytes to rows.

    OMP_NUM_THREADS=1 python tools/benchmark_collection.py [--groups 6] [--tokens 20480]

Groups of 16 responses in the server's own encoding; each stage alone, on one core. "read the
message" is each replica's first rank's, the rest the collector's. The last column is what a step of
the paper's size (8,192 responses of 20,480 tokens at most) takes. The verifier is not in it, nor
what the network takes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from megafork.data.sample import Group, Sample
from megafork.data.token_table import known_table
from megafork.rollout.collector import RolloutBatch
from megafork.rollout.frames import PREFIX_BYTES, Prefix, encode
from megafork.rollout.journal import Journal, read_step
from megafork.rollout.sampling import decode_samples, encode_samples
from megafork.trainer.rows import columns_of

GROUP_SIZE = 16
STEP_TOKENS = 8192 * 20480


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
        answers = [decode_samples(payload) for _ in range(options.groups)]
    groups = [_group(index, answer) for index, answer in enumerate(answers)]
    with tempfile.TemporaryDirectory() as folder:
        with timed("journal"), Journal(Path(folder) / "step_000001.journal") as journal:
            for group in groups:
                journal.append(group)
        size = journal.path.stat().st_size
        known = known_table(groups)
        with timed("make the rows' message"):
            parts = encode({}, RolloutBatch(groups=groups).rows(known.uid_B.tolist()))
        message = b"".join(parts)
        with timed("read the message"):
            columns = columns_of(_arrays_of(message))
        with timed("read the journal (a resumed step)"):
            assert len(read_step(Path(folder), 1)) == options.groups
    assert all(len(column) == num_tokens for column in columns.values())
    _print(seconds, num_tokens, size)


def _arrays_of(message: bytes) -> dict[str, np.ndarray]:
    prefix = Prefix.parse(message[:PREFIX_BYTES])
    start = PREFIX_BYTES + prefix.header_bytes
    header = prefix.header(message[PREFIX_BYTES:start])
    return prefix.arrays(header, message[start:])


def _payload(length: int) -> bytes:
    draw = random.Random(0)
    return encode_samples(
        [
            Sample.from_server(
                [draw.randrange(151_936) for _ in range(length)],
                [-draw.expovariate(2.0) for _ in range(length)],
                "stop",
                [(1, 0)],
            )
            for _ in range(GROUP_SIZE)
        ]
    )


def _group(index: int, answer: list[Sample]) -> Group:
    samples = [replace(sample, uid=index * GROUP_SIZE + i) for i, sample in enumerate(answer)]
    return Group(index, list(range(200)), 1, samples)


def _print(seconds: dict[str, float], num_tokens: int, journal_bytes: int) -> None:
    def cell(of: Callable[[float], float], stage: str, digits: int) -> str:
        return f"{of(seconds[stage]):.{digits}f}"

    print(f"{num_tokens:,} tokens; the journal has {journal_bytes / num_tokens:.1f} bytes a token")
    print("\n| | CPU ns a token | wall ns a token | CPU s of a step |")
    print("|---|---|---|---|")
    for stage in [name for name in seconds if not name.endswith(", wall")]:
        nanoseconds = cell(lambda s: s / num_tokens * 1e9, stage, 0)
        wall = cell(lambda s: s / num_tokens * 1e9, f"{stage}, wall", 0)
        step = cell(lambda s: s / num_tokens * STEP_TOKENS, stage, 1)
        print(f"| {stage} | {nanoseconds} | {wall} | {step} |")


if __name__ == "__main__":
    main()
