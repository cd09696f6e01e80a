"""Fetches what the Qwen3 recipes train and evaluate on: data/*.jsonl with prompt and answer.

    .venv/bin/python examples/dapo_math.py [FOLDER]

DAPO-Math-17K in the form of open-r1/DAPO-Math-17k-Processed (English and Chinese, each problem
once, without the instruction that the original wraps it in), and AIME 2024 and 2025, 30 problems
each, in one file. Needs `datasets` and a way to the hub; no data set comes with this repository.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# (file, [(data set, configuration, split, column of the problem, column of the answer)])
FILES = {
    "dapo_math_17k.jsonl": [
        ("open-r1/DAPO-Math-17k-Processed", "all", "train", "prompt", "solution"),
    ],
    "aime_2024_2025.jsonl": [
        ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
        ("MathArena/aime_2025", None, "train", "problem", "answer"),
    ],
}


def examples(rows: Iterable[dict[str, Any]], problem: str, answer: str) -> list[dict[str, str]]:
    """A row for each problem, the first where there are several; answers become text."""
    found: dict[str, str] = {}
    for row in rows:
        found.setdefault(row[problem].strip(), str(row[answer]).strip())
    return [{"prompt": text, "answer": value} for text, value in found.items()]


def main(folder: Path) -> None:
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    for name, sources in FILES.items():
        lines = []
        for dataset, configuration, split, problem, answer in sources:
            rows = load_dataset(dataset, configuration, split=split, trust_remote_code=False)
            lines += examples(rows, problem, answer)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / name}: {len(lines)} problems")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("data"))
