"""Every reader of a file that a person may damage: it reads it, or says what is wrong with it.

Anything but a UserError is a defect, and so is a reader that takes more than ten seconds.
"""

from __future__ import annotations

import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megafork.analysis.scored import read_scored
from megafork.config import DataConfig, ScoreConfig, TrainConfig
from megafork.config.load import load_config
from megafork.data.prompts import read_rows
from megafork.data.sample import Group, Sample
from megafork.errors import UserError
from megafork.evaluation.sample_file import SampleFile
from megafork.evaluation.scoring import read_responses
from megafork.metrics.page import write_report
from megafork.metrics.run_files import read_run
from megafork.rollout.journal import Journal
from tests.helpers.commands import QUICKSTART
from tests.helpers.damage import damaged, torn
from tests.helpers.pages import make_run

CASES = int(os.environ.get("MEGAFORK_CASES", "150"))
"""of each reader; all have seen 2,000"""


def cases(count: int = CASES):
    """`count` seeded examples, each of which has ten seconds."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=timedelta(seconds=10),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def reads_or_tells(path: Path, content: bytes, read) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        assert str(error)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


SETTINGS = tomli_w.dumps(
    {
        "run": {"dir": "runs/one"},
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "train.jsonl", "template": "{problem}\n"},
        "reward": {"verifier": "countdown"},
        "training": {"steps": 3, "lr": 1e-3},
        "parallel": {"tp": 2},
    }
).encode()
ROW = {"prompt": "1 + 1 =", "answer": "2", "extra": {"index": 3}, "turns": [{"role": "user"}]}
GROUP = {
    "prompt_index": 1,
    "prompt_ids": [3, 4],
    "policy_version": 1,
    "samples": [
        {
            "uid": 1,
            "token_ids": [5, 6],
            "logprobs": [-0.5, -1.0],
            "truncated": False,
            "reward": 1.0,
            "accuracy": 1.0,
        }
    ],
}
SCORED = {"response_ids": [1, 2], "prompt_ids": [3], "entropies": [0.5, 0.1], "logprobs": [-1, -2]}


@pytest.mark.slow
@given(content=torn(SETTINGS))
@cases()
def test_settings(folder, content):
    reads_or_tells(folder / "config.toml", content, lambda path: load_config(TrainConfig, path, []))


@pytest.mark.slow
@given(content=damaged([ROW, ROW, ROW]))
@cases()
def test_data(folder, content):
    data = DataConfig(train="train.jsonl")
    for kind in ("jsonl", "json", "csv", "jsonl.gz"):
        reads_or_tells(folder / f"train.{kind}", content, lambda path: read_rows(path, data))


@pytest.mark.slow
@given(content=damaged([GROUP, GROUP]))
@cases()
def test_journal_of_the_former_format(folder, content):
    reads_or_tells(folder / "step_000001.jsonl", content, Journal.read)


WRITTEN = [
    Group(i, [3, 4], 1, [Sample(i, [5, 6], [-0.5, -1.0], False, reward=1.0, accuracy=1.0)])
    for i in (1, 2)
]


@pytest.fixture(scope="module")
def journal(folder):
    with Journal(folder / "written.journal") as written:
        for group in WRITTEN:
            written.append(group)
    return written.path.read_bytes()


@pytest.mark.slow
@given(data=st.data())
@cases()
def test_journal(folder, journal, data):
    """What is read was written; and the journal can be gone on with."""
    path = folder / "step_000001.journal"
    path.write_bytes(data.draw(torn(journal)))
    read = Journal.read(path)
    assert all(group in WRITTEN for group in read)
    with Journal(path) as again:
        again.append(WRITTEN[0])
    assert Journal.read(path) == [*read, WRITTEN[0]]


@pytest.mark.slow
@given(content=damaged([SCORED, SCORED]))
@cases()
def test_scored_responses(folder, content):
    reads_or_tells(folder / "scored.jsonl", content, read_scored)


@pytest.mark.slow
@given(content=damaged([{"prompt_ids": [3], "response_ids": [1, 2]}] * 2))
@cases()
def test_responses_to_score(folder, content):
    config = ScoreConfig(model={"path": str(QUICKSTART / "model")})

    def read(path):
        list(read_responses(path, config, 32))

    reads_or_tells(folder / "input.jsonl", content, read)


@pytest.mark.slow
@given(content=damaged([{"group": 0, "rows": [{"id": "a"}]}]), kept=damaged({"seed": 1, "a": {}}))
@cases()
def test_samples_that_are_gone_on_with(folder, content, kept):
    path = folder / "samples.jsonl"
    path.with_name("samples.jsonl.settings.json").write_bytes(kept)

    def go_on(partial):
        file = SampleFile(path, {"seed": 1, "a": {}}, 2)
        file.open()
        try:
            file.missing()
        finally:
            file.close()

    reads_or_tells(folder / "samples.jsonl.partial", content, go_on)


OF_A_REPORT = (
    "metrics.jsonl",
    "eval.jsonl",
    "forking_tokens.jsonl",
    "entropy_histogram.jsonl",
    "samples.jsonl",
)


def check_report(folder, name, count, read):
    run = folder / f"{read.__name__}-{name}"
    make_run(run)
    whole = [json.loads(line) for line in (run / name).read_text().splitlines()][:3]

    @given(content=damaged(whole))
    @cases(count)
    def check(content):
        reads_or_tells(run / name, content, lambda path: read(run))

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_REPORT)
def test_what_a_report_is_made_from(folder, name):
    check_report(folder, name, CASES, read_run)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OF_A_REPORT)
def test_report(folder, name):
    """It draws for a second."""
    check_report(folder, name, 60, write_report)
