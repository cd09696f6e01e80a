"""`megafork data check`: what it tells of a file, and of each row that a run would refuse."""

from __future__ import annotations

import json

import pytest

from megafork.config import GenerateConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.evaluation.data_report import check_data
from tests.helpers.commands import QUICKSTART, megafork

GSM8K = {"question": "How many?", "answer": "Half of 144.\n#### 72", "level": 1}


def told_of(path, *settings, model="", verifiers=()):
    lines = []
    config = load_config(GenerateConfig, None, [f'model.path="{model}"', *settings])
    try:
        check_data(config, [str(path)], verifiers, lines.append)
    except UserError as error:
        lines.append(f"error: {error}")
    return lines


@pytest.fixture
def rows(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return write


def test_the_quickstart_s_data_with_its_model():
    path = QUICKSTART / "data" / "heldout.jsonl"
    count = len(path.read_text().splitlines())
    lines = told_of(path, model=QUICKSTART / "model")
    assert lines[0] == f"{path}: {count} rows"
    text = "\n".join(lines[1:])
    assert f"countdown {count} of {count} rows are its puzzles" in text
    assert "  prompt    prompt, 9 to 12 characters" in text
    assert "  tokens    of prompts, 9 to 12 tokens" in text
    assert text.endswith("tokens\n  | " + json.loads(path.read_text().splitlines()[0])["prompt"])


def test_every_row_that_cannot_be_used_is_told(rows):
    path = rows(GSM8K, GSM8K | {"question": " "}, GSM8K | {"answer": None}, GSM8K, "{", GSM8K)
    lines = told_of(path)
    assert lines[0].endswith("rows.jsonl: 5 rows")
    assert "  maths     reads 2 of 2 answers; others are right only as they are spelled" in lines
    assert "  exact     0 of 2 answers are a line of at most 40 characters" in lines
    assert "  others    level" in lines and "  | How many?" in lines
    start = lines.index("  3 rows cannot be used:")
    for line, found in zip((2, 3, 5), lines[start + 1 :], strict=False):
        assert found.startswith(f"    {path}, line {line}: ")
    assert "the rows after it were not read" in lines[-2]
    assert lines[-1] == "error: 3 of 5 rows cannot be used: mend or remove them"


def test_long_prompts_are_faults_or_left_out(rows):
    path = rows({"prompt": "12 13>25:", "answer": "25"}, {"prompt": "1", "answer": "1"})
    settings = ["data.max_prompt_tokens=8"]
    lines = told_of(path, *settings, model=QUICKSTART / "model")
    assert "1 of 2 rows cannot be used" in lines[-1] and "line 1: the prompt" in lines[-2]
    lines = told_of(path, *settings, "data.too_long=drop", model=QUICKSTART / "model")
    [told] = [line for line in lines if "tokens    of prompts" in line]
    assert told.endswith("; 1 are too long and left out") and "error" not in lines[-1]


def needs_difficulty(prompt, response, answer, difficulty):
    return 1.0


def test_verifiers_that_are_named_are_held_against_the_rows(rows):
    path = rows(GSM8K | {"difficulty": 1}, GSM8K, GSM8K | {"difficulty": 2, "answer": "$$"})
    lines = told_of(path, verifiers=[f"{__name__}:needs_difficulty"])
    assert "line 2: no column 'difficulty'" in lines[-2] and lines[-1].startswith("error: 1 of 3")
    lines = told_of(path, verifiers=["maths"])
    assert "line 3: reward.verifier=maths finds no answer in '$$'" in lines[-2]


def test_a_file_whose_columns_are_unknown_is_an_error(rows):
    assert told_of(rows({"text": "a"}))[0].startswith("error: ")
    done = megafork("data", "check", rows(GSM8K), "data.template=Q: {problem}")
    assert done.returncode == 0 and "  | Q: How many?" in done.stdout.splitlines()
