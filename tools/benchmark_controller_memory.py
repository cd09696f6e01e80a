"""The memory that the controller needs for the batches of a step of the paper's size.

    OMP_NUM_THREADS=1 python tools/benchmark_controller_memory.py [--lag 2] [--dropped 0.5]
        [--prompts 512] [--tokens 20480] [--folder DIR]

The real collector and its journal (8 bytes a token in DIR), fed with the server's own encoding by a
client that needs no server; a verifier is not in it. With a lag of n, n more batches are generated
while one is trained on. dropped: the share of groups without a signal, which are generated again.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megafork.config import RolloutConfig
from megafork.data.prompts import Prompt, PromptStream
from megafork.data.sample import Sample
from megafork.rollout.collector import Collector, RolloutBatch
from megafork.rollout.frames import encode
from megafork.rollout.sampling import Sampling, decode_samples, encode_samples
from megafork.rollout.step_journals import StepJournals

GROUP_SIZE = 16
GIB = 1 << 30


class Client:
    """Stands where the servers stand: each group's bytes are its own, as of a connection."""

    url, version = "memory", 1

    def __init__(self, num_tokens: int) -> None:
        draw = np.random.default_rng(0)
        sample = Sample.from_server(
            draw.integers(0, 150_000, num_tokens), -draw.random(num_tokens), "stop", [(1, 0)]
        )
        self._payload = encode_samples([sample] * GROUP_SIZE)

    async def generate(self, *arguments: Any, **options: Any) -> list[Sample]:
        await asyncio.sleep(0)
        return decode_samples(bytes(bytearray(self._payload)))


class Judging:
    """Gives the wanted share of groups equal rewards."""

    def __init__(self, dropped: float) -> None:
        self.dropped, self.judge = dropped, self
        self._draw = np.random.default_rng(1)

    def check_failures(self, failures: object) -> None: ...

    def has_failed(self, failures: object) -> bool:
        return False

    async def __call__(self, prompt: Prompt, samples: list[Sample]) -> list[Sample]:
        same = self._draw.random() < self.dropped
        return [
            replace(sample, reward=float(i % 2 and not same), accuracy=float(i % 2 and not same))
            for i, sample in enumerate(samples)
        ]


async def collect(options: argparse.Namespace, folder: Path) -> list[RolloutBatch]:
    collector = Collector(
        fleet=Client(options.tokens),
        prompts=PromptStream([Prompt(0, "", "", [1, 2, 3])], seed=0),
        judging=Judging(options.dropped),
        journals=StepJournals(folder),
        rollout=RolloutConfig(
            prompts_per_step=options.prompts,
            group_size=GROUP_SIZE,
            max_response_tokens=options.tokens,
            max_policy_lag=options.lag,
            max_sampling_rounds=30,
        ),
        sampling=Sampling(max_tokens=options.tokens),
    )
    batches = [await collector.collect(step, step) for step in range(1, 2 + options.lag)]
    collector.journals.close()
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512, help=f"groups of {GROUP_SIZE}")
    parser.add_argument("--tokens", type=int, default=20480, help="of each response")
    parser.add_argument("--lag", type=int, default=0, help="rollout.max_policy_lag")
    parser.add_argument("--dropped", type=float, default=0.0, help="share of the groups")
    parser.add_argument("--folder", help="for the journals; unset: a temporary one")
    options = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        (path := Path(folder) / "rollouts").mkdir()
        started = time.process_time()
        batches = asyncio.run(collect(options, path))
        seconds = time.process_time() - started
        uids = [sample.uid for group in batches[0].groups for sample in group.samples]
        for part in range(4):  # as four replicas would ask for them
            sum(len(piece) for piece in encode({}, batches[0].rows(uids[part::4])))
        written = sum(file.stat().st_size for file in path.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "torch" not in sys.modules
    print(
        f"{options.prompts * GROUP_SIZE} x {options.tokens} tokens, lag {options.lag}, "
        f"{options.dropped:.0%} of the groups dropped: peak {peak / 2**20:.2f} GiB, of it "
        f"{before / 2**20:.2f} before the first batch; {seconds:.1f} CPU s, "
        f"{written / GIB:.2f} GiB of journal"
    )


if __name__ == "__main__":
    main()
