"""`megafork analyze temperatures`: its table by hand, its settings, and the command on the toy."""

from __future__ import annotations

import csv
import json
import math
import statistics

import pytest
import torch

from megafork.analysis.temperatures import Evaluation, pairs_of, table
from megafork.config.file import load_config
from megafork.config.temperatures import TemperaturesConfig
from megafork.errors import UserError
from megafork.evaluation.metrics import Scored
from megafork.rewards.countdown import verify
from megafork.rollout.sampling import TwoTemperatures
from tests.helpers.commands import QUICKSTART, left_over, megafork
from tests.helpers.reference import load_model, response_logits

NEEDED = ["model.path=m", "reward.verifier=megafork.rewards.countdown:verify"]


def scored(*accuracies: float, length: int = 10, truncated: bool = False) -> list[Scored]:
    return [Scored(accuracy, None, length, truncated) for accuracy in accuracies]


def test_the_table_by_hand():
    base = Evaluation(TwoTemperatures(0.5), [scored(1, 0), scored(0, 0), scored(1, 1)])
    hot = Evaluation(
        TwoTemperatures(0.5, above=2.0),
        [scored(0, 0), scored(0, 1, length=20, truncated=True), scored(0, 1)],
    )
    first, second = table([base, hot])
    assert (first["above"], first["below"], second["above"]) == (1.0, 1.0, 2.0)
    assert (first["accuracy"], first["change"], first["change_high"]) == (0.5, 0.0, 0.0)
    assert second["accuracy"] == pytest.approx(1 / 3)
    assert (second["length"], second["truncated"]) == pytest.approx((40 / 3, 1 / 3))
    # Problem by problem -0.5, 0.5, -0.5; the 97.5% point of Student's t with 2 degrees is 4.302653.
    differences = [-0.5, 0.5, -0.5]
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)
    assert second["change"] == pytest.approx(-1 / 6)
    assert second["change_low"] == pytest.approx(max(-1.0, -1 / 6 - half))
    assert second["change_high"] == pytest.approx(min(1.0, -1 / 6 + half))


def test_every_pair_once_and_the_baseline_first():
    sweep = ["sweep.threshold=0.3", "sweep.above=[0.5, 1.0, 2.0]", "sweep.below=[1.0, 0.0]"]
    config = load_config(TemperaturesConfig, None, NEEDED + sweep)
    pairs = [(p.threshold, p.above, p.below) for p in pairs_of(config)]
    assert pairs == [(0.3, 1, 1), (0.3, 0.5, 1), (0.3, 2, 1), (0.3, 1, 0)]


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("rollout.temperature=0.7", r"rollout\.temperature=0\.7 would change"),
        ("rollout.top_p=0.9", r"rollout\.top_p=0\.9 would change"),
        ("rollout.top_k=5", r"rollout\.top_k=5 would change"),
        ("rollout.url=http://127.0.0.1:9", "knows one temperature"),
        ("sweep.above=[-1.0]", r"sweep\.above.*greater than or equal to 0"),
        ("sweep.threshold=p80", r"sweep\.threshold='p80'"),
        ("sweep.treshold=0.3", r"did you mean sweep\.threshold"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override, cause):
    with pytest.raises(UserError, match=cause):
        load_config(TemperaturesConfig, None, [*NEEDED, override])


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
            *("reward.verifier=megafork.rewards.countdown:verify", *overrides),
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
