"""How far the forking masks of one rollout batch move while it is trained on.

    OMP_NUM_THREADS=1 python tools/measure_masks.py RUN [--steps 10] [section.key=value ...]

Trains again, on one rank, on the journals of a run that has ended, with the entropies of the policy
before each batch (forking.entropy_of=old). Before each update it selects once more by those of the
policy as it is then (current), and prints, for each mini-batch of a batch, the share of the first
mask's tokens that the second has too, over all steps: what `entropy_of` decides about.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megafork.algorithms.advantages import group_advantages
from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.data.token_table import TokenTable, token_table
from megafork.parallel.mesh import Mesh, initialize
from megafork.parallel.ports import free_port
from megafork.rollout.journal import read_step
from megafork.trainer.policy import Policy


def join_alone(config: TrainConfig) -> Mesh:
    """A world of this process alone."""
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return initialize(config.parallel)


def minibatches(config: TrainConfig, run: Path, step: int) -> list[TokenTable]:
    """Of the step's first groups that carry a signal, with their advantages."""
    groups = [group for _, group in sorted(read_step(run / "rollouts", step).items())]
    kept = [group for group in groups if group.has_signal][: config.rollout.prompts_per_step]
    table = token_table(kept, overlong_filtering=config.algorithm.overlong_filtering)
    advantages_B = group_advantages(
        table.reward_B, table.group_B, normalize=config.algorithm.normalize_advantage
    )
    table = table.with_columns(advantage_R=advantages_B[table.sample_R])
    return table.minibatches(config.training.prompts_per_minibatch, config.training.seed + step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    one_rank = ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "parallel.vpp=1"]
    settings = [*one_rank, "parallel.sequence_parallel=false", *arguments.settings]
    config = load_config(TrainConfig, arguments.run / "config.toml", settings)
    policy = Policy(config, join_alone(config))
    shares: dict[int, list[float]] = {}
    moved: dict[int, list[float]] = {}
    for step in range(1, arguments.steps + 1):
        tables = minibatches(config, arguments.run, step)
        scored = [policy.score(table) for table in tables]
        for index, (table, old) in enumerate(zip(tables, scored, strict=True)):
            now = policy.score(table)
            [mask], _ = policy.select([table], [old], step=step)
            [current], _ = policy.select([table], [now], step=step)
            shares.setdefault(index, []).append(float((mask & current).sum() / mask.sum()))
            difference = (now.entropy_N - old.entropy_N).abs().mean()
            moved.setdefault(index, []).append(float(difference))
            policy.update(table, old, mask)
    print("| mini-batch | share of the mask that stays | mean change of an entropy, nats |")
    print("|---|---|---|")
    for index, found in shares.items():
        mean, lowest = sum(found) / len(found), min(found)
        change = sum(moved[index]) / len(moved[index])
        print(f"| {index + 1} | {mean:.1%} (lowest {lowest:.1%}) | {change:.4f} |")


if __name__ == "__main__":
    main()
