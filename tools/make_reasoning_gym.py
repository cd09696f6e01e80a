"""Rows of a reasoning-gym task on the screen, as `megafork train` reads them.

    pip install reasoning-gym
    python tools/make_reasoning_gym.py TASK --count 1000 --seed 0 > train.jsonl

TASK is one that `reward.verifier = "reasoning-gym:TASK"` can score (docs/verifiers.md).
"""

from __future__ import annotations

import argparse
import json

from megafork.errors import UserError
from megafork.verifiers.reasoning_gym import task_verifier

ASK = "\n\nGive the final answer between <answer> and </answer>, and nothing else between them."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        parser.exit(2, "error: reasoning-gym is not installed: pip install reasoning-gym\n")
    try:
        task_verifier(arguments.task)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    rows = reasoning_gym.create_dataset(arguments.task, size=arguments.count, seed=arguments.seed)
    for row in rows:
        print(json.dumps({"prompt": row["question"] + ASK, "answer": row["answer"]}))


if __name__ == "__main__":
    main()
