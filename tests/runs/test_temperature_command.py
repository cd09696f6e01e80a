"""`megafork analyze temperatures` on the toy, with servers of its own."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
import torch

from megafork.verifiers.countdown import verify
from tests.helpers.commands import QUICKSTART, left_over, megafork
from tests.helpers.reference import load_model, response_logits


@torch.no_grad()
def greedy(model, prompt: list[int], eos: int, longest: int) -> list[int]:
    response: list[int] = []
    while len(response) < longest and eos not in response:
        response.append(int(response_logits(model, prompt, [*response, 0])[-1].argmax()))
    return response


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_command_sweeps_judges_and_takes_what_is_there(tmp_path):
    """At a threshold of 0 every uncertain token is above: greedy there is greedy decoding."""
    lines = (QUICKSTART / "data/heldout.jsonl").read_text().splitlines(keepends=True)[:16]
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(lines))

    def run(*overrides: str):
        return megafork(
            *("analyze", "temperatures", "--model", QUICKSTART / "model", "--data", data),
            *("--output", output, "data.prompt_key=prompt", "data.max_prompt_tokens=24"),
            *("rollout.max_response_tokens=24", "rollout.samples=3", "rollout.dtype=float32"),
            *("reward.verifier=megafork.verifiers.countdown:verify", *overrides),
            mark=tmp_path,
        )

    sweep = ["sweep.threshold=0.0", "sweep.above=[0.0]"]
    done = run(*sweep, "sweep.below=[0.5]")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((output / "temperatures.csv").open()))
    pairs = [(float(row["above"]), float(row["below"])) for row in rows]
    assert pairs == [(1, 1), (0, 1), (1, 0.5)]
    model = load_model(QUICKSTART / "model", torch.float64)
    samples = [json.loads(s) for s in (output / "samples/above_0_below_1.jsonl").open()]
    assert len(samples) == 48
    for sample in samples:
        assert sample["response_ids"] == greedy(model, sample["prompt_ids"], 1, 24)
        right = verify(sample["prompt"], sample["response"], sample["answer"]) >= 1.0
        assert sample["accuracy"] == right
    mean = statistics.fmean(sample["accuracy"] for sample in samples)
    assert float(rows[1]["accuracy"]) == pytest.approx(mean)
    assert (output / "temperatures.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (output / "samples").glob("*.jsonl")}

    done = run(*sweep, "sweep.below=[]", "rollout.python=/bin/true")  # nothing is left to generate
    assert done.returncode == 0, done.stderr
    again = json.loads((output / "temperatures.json").read_text())["rows"]
    assert [row["accuracy"] for row in again] == [float(row["accuracy"]) for row in rows[:2]]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    done = run("sweep.threshold=0.3", "sweep.above=[0.0]", "sweep.below=[]")
    assert done.returncode == 2 and "temperatures" in done.stderr
    assert not left_over(tmp_path)
