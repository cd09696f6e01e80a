"""Files of scored responses, as rows and as read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy

from megafork.analysis.scored import Scored, read_scored

VOCAB = 40


def make_rows(
    seed: int, num_rows: int = 60, longest: int = 50, *, ties: bool = False
) -> list[dict]:
    """Responses of 0 to `longest` tokens, float32 entropies; with ties most are equal, many 0."""
    random = numpy.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        length = int(random.integers(0, longest + 1))
        entropies = random.exponential(0.4, length) * (random.random(length) < 0.7)
        if ties:
            entropies = (entropies * 4).round() / 4
        rows.append(
            {
                "id": index,
                "prompt_ids": [1, index],
                "response_ids": random.integers(0, VOCAB, length).tolist(),
                "entropies": entropies.astype(numpy.float32).tolist(),
            }
        )
    return rows


def rescored(rows: list[dict], seed: int, *, ties: bool = False) -> list[dict]:
    """The same responses with other entropies, near the first ones."""
    random = numpy.random.default_rng(seed)
    again = []
    for row in rows:
        entropies = numpy.array(row["entropies"]) * random.uniform(0.3, 1.6, len(row["entropies"]))
        if ties:
            entropies = (entropies * 4).round() / 4
        again.append(row | {"entropies": entropies.astype(numpy.float32).tolist()})
    return again


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored_of(folder: Path, name: str, rows: list[dict]) -> Scored:
    return read_scored(write(folder / f"{name}.jsonl", rows), vocab_size=VOCAB)


def entropies_of(rows: list[dict]) -> numpy.ndarray:
    """float64, of all tokens"""
    return numpy.concatenate([numpy.array(row["entropies"]) for row in rows])


def brute_error(values, rows):
    """The cluster-robust standard error of a mean, response by response."""
    mean, used = values.mean(), numpy.unique(rows)
    if len(used) < 2:
        return numpy.nan
    residuals = [(values[rows == r] - mean).sum() for r in used]
    return numpy.sqrt(len(used) / (len(used) - 1) * numpy.square(residuals).sum()) / len(values)
