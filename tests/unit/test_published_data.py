"""Rows of published data sets as they are published, and files as other systems write them.

The rows have the columns and the shape of what the named data sets hold; no network is asked.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from megafork.config import BenchmarkConfig, DataConfig
from megafork.data.columns import Further
from megafork.data.prompts import read_both, read_rows
from megafork.data.tables import files_of
from megafork.errors import UserError
from megafork.verifiers.names import load_verifier

ASKED = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"content": ASKED.format("What is $17 \\cdot 2$?"), "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
DAPO_PROCESSED = {
    "prompt": "What is $17 \\cdot 2$?",
    "solution": "34",
    "data_source": "math_dapo",
    "source_prompt": DAPO["prompt"],
    "ability": "MATH",
    "reward_model": DAPO["reward_model"],
    "extra_info": DAPO["extra_info"],
}
GSM8K = {
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many "
    "clips in May. How many clips did Natalia sell altogether in April and May?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = "
    "<<48+24=72>>72 clips altogether in April and May.\n#### 72",
}
MATH = {
    "problem": "What is the degree of the polynomial $(4 +5x^3 +100 +2\\pi x^4)$?",
    "level": "Level 3",
    "type": "Algebra",
    "solution": "The largest exponent is the degree, which is $\\boxed{4}$.",
}
MATH_500 = MATH | {
    "answer": "4",
    "subject": "Algebra",
    "level": 3,
    "unique_id": "test/algebra/1.json",
}
VERL_GSM8K = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": GSM8K["question"] + ' Output it after "####".'}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {
        "split": "train",
        "index": 0,
        "answer": GSM8K["answer"],
        "question": GSM8K["question"],
    },
}
NUMINA_COT = {
    "source": "synthetic_math",
    "problem": "Consider $x + 7 = 3$. Find $x$.",
    "solution": "Subtract 7: \\[x = \\boxed{-4}\\]",
    "messages": [
        {"content": "Consider $x + 7 = 3$. Find $x$.", "role": "user"},
        {"content": "Subtract 7: \\[x = \\boxed{-4}\\]", "role": "assistant"},
    ],
}
OPEN_R1 = NUMINA_COT | {
    "answer": "-4",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "uuid": "586fd646-76d6-5070-8c81-9993ab9d8559",
    "is_reasoning_complete": [True, False],
    "generations": ["<think>...</think> \\boxed{-4}", "<think>..."],
    "correctness_math_verify": [True, False],
    "finish_reasons": None,
    "correctness_count": 1,
}
OLYMPIAD_BENCH = {
    "id": 1606,
    "question": "Find all integers $n$ with $n^2 = 4$ and $n > 0$.",
    "solution": ["$n = 2$"],
    "final_answer": ["2"],
    "context": None,
    "is_multiple_answer": False,
    "unit": None,
}
# The row; its id; a right response; and where its answer stands.
PUBLISHED = {
    "DAPO-Math-17K": (DAPO, DAPO["extra_info"]["index"], "Answer: 34", ["answer_line"]),
    "DAPO-Math-17K, processed": (DAPO_PROCESSED, DAPO["extra_info"]["index"], "\\boxed{34}", None),
    "GSM8K": (GSM8K, "1", "so #### is\n#### 72", ["hash"]),
    "MATH": (MATH, "1", "\\boxed{4}", None),
    "MATH-500": (MATH_500, "test/algebra/1.json", "\\boxed{4}", None),
    "verl's GSM8K": (VERL_GSM8K, "0", "#### 72", ["hash"]),
    "NuminaMath-CoT": (NUMINA_COT, "1", "\\boxed{-4}", None),
    "OpenR1-Math": (OPEN_R1, OPEN_R1["uuid"], "\\boxed{-4}", None),
    "OlympiadBench": (OLYMPIAD_BENCH, "1606", "\\boxed{2}", None),
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(path, **settings):
    config = BenchmarkConfig(chat_template=True, **settings)
    return read_rows(path, config, config.id_key)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_are_read_without_a_setting_of_columns(tmp_path, name, kind):
    """The maths verifier takes the right response for right by what was read, and another not."""
    row, id_, right, places = PUBLISHED[name]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [row])
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    [found] = read(path)
    asked = row.get("prompt") or row.get("problem") or row["question"]
    assert (found.id, found.prompt) == (id_, asked)
    verify = load_verifier("maths", places)
    assert verify(found.text, right, found.answer) == 1.0
    assert verify(found.text, right.replace("4", "5").replace("2", "3"), found.answer) == 0.0
    train, _ = read_both(DataConfig(train=str(path), chat_template=True))
    assert [(r.prompt, r.answer) for r in train] == [(found.prompt, found.answer)]


def test_files_of_several_kinds_are_one_data_set(tmp_path):
    """In the order of the list; each file has its own columns, and ids stay distinct."""
    write_jsonl(tmp_path / "b-1.jsonl", [MATH_500])
    write_jsonl(tmp_path / "b-0.jsonl", [GSM8K, GSM8K | {"question": "And two?"}])
    parquet.write_table(pyarrow.Table.from_pylist([VERL_GSM8K]), tmp_path / "a.parquet")
    files = [str(tmp_path / "b-*.jsonl"), str(tmp_path / "a.parquet")]
    assert [name[-9:] for name in files_of(files)] == ["b-0.jsonl", "b-1.jsonl", "a.parquet"]
    rows, held_out = read_both(DataConfig(train=files, eval=files[:1], chat_template=True))
    assert [row.text[:8] for row in rows] == ["Natalia ", "And two?", "What is ", "Natalia "]
    assert [row.answer[-2:] for row in rows] == ["72", "72", "4", "72"]
    assert len({row.id for row in rows}) == 4 and len(held_out) == 3
    with pytest.raises(UserError, match=r"no file fits the pattern .*none-\*.jsonl: give .jsonl"):
        read(str(tmp_path / "none-*.jsonl"))
    (tmp_path / "b-2.jsonl").touch()
    with pytest.raises(UserError, match=r"data file .*b-2.jsonl is empty"):
        read(files)


PLAIN = [
    {"problem": "Wie groß, in \u201cm\u201d?\nSag es.", "answer": "0.50"},
    {"problem": "b", "answer": "007"},
]


def as_csv(rows, separator=","):
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in PLAIN)
TEXTS = {
    "rows.jsonl": LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n") + "\r\n",
    "rows.json": json.dumps(PLAIN, indent=2),
    "one_line.json": "\n" + json.dumps(PLAIN, ensure_ascii=False),
    "lines.json": LINES,
    "rows.csv": as_csv(PLAIN),
    "rows.tsv": as_csv(PLAIN, "\t"),
}


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_text_files_of_every_kind(tmp_path, name, packed, mark):
    content = mark + TEXTS[name].encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    wanted = [tuple(row.values()) for row in PLAIN]
    if name == "crlf.jsonl":
        assert "\r\n" in TEXTS[name]
    assert [(row.text, row.answer) for row in read(path)] == wanted


def test_a_number_of_a_json_list_keeps_its_text(tmp_path):
    (tmp_path / "a.json").write_text('[{"problem": "p", "answer": 1.50}]')
    assert read(tmp_path / "a.json")[0].answer == "1.50"


BROKEN = {
    "bad.json": (b'[{"problem": "p"},', "bad.json: not JSON"),
    "object.json": (b'{\n "data": []\n}', "line 1: not JSON"),
    "cells.csv": (b"problem,answer\nSay a, b,1\n", "row 1 has more cells than the 2 columns"),
    "short.csv": (b"problem,answer\nSay\n", "row 1: 'answer' is null"),
    "quote.csv": (b'problem,answer\n"Say,1\n', "not CSV"),
    "twice.csv": (b"problem,problem\na,b\n", "two columns have one name"),
    "torn.jsonl.gz": (gzip.compress(LINES.encode())[:-9], "cannot be unpacked"),
    "plain.csv.gz": (b"problem,answer\na,1\n", "cannot be unpacked"),
    "pointer.parquet": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "only git's pointer to a large file: fetch that with git lfs pull",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}|{message}"):
        read(tmp_path / name)


def test_repeated_ids_are_made_distinct_and_told_once(tmp_path):
    ids = ["a", "b", "a", "a#2", "a"]
    rows = [{"id": id_, "problem": str(i), "answer": "1"} for i, id_ in enumerate(ids)]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    told = []
    found = read_rows(path, BenchmarkConfig(), None, tell=told.append)
    assert [row.id for row in found] == ["a", "b", "a#2", "a#2#2", "a#3"]
    assert (
        len(told) == 1 and "line 3: id 'a' is that of an earlier row, as it is of 3 of 5" in told[0]
    )


def test_a_chat_may_be_the_text_of_its_json(tmp_path):
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "1 + 1"}]
    path = tmp_path / "chat.csv"
    path.write_text(as_csv([{"prompt": json.dumps(turns), "answer": "2"}]))
    [row] = read(path)
    assert (row.prompt, row.text) == (turns, "1 + 1")
    for text in ("[1, 2, 3] has which sum?", "[1, 2, 3]", "[]", '[{"role": "user"}]'):
        path.write_text(as_csv([{"prompt": text, "answer": "2"}]))
        assert read(path)[0].prompt == text


AMBIGUOUS = {
    "two prompts": (
        {"prompt": "Solve p", "problem": "p", "answer": "1"},
        "data.prompt_key is unset, and it could be any of prompt, problem: say which, as in "
        "data.prompt_key=prompt",
    ),
    "two answers": (
        {"problem": "p", "answer": "long", "final_answer": "1"},
        "data.answer_key is unset, and it could be any of answer, final_answer",
    ),
    "no prompt": (
        {"text": "p", "answer": "1"},
        r"no column 'prompt', nor another of prompt, problem, .* \(it has 'text', 'answer'\)",
    ),
    "no answer": (
        {"problem": "p", "label": "1"},
        r"no column 'answer', nor another of .*solution \(it has 'problem', 'label'\)",
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", AMBIGUOUS)
def test_columns_that_could_be_meant_are_named(tmp_path, case, kind):
    row, message = AMBIGUOUS[case]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [row])
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_setting_of_a_column_ends_the_doubt(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [AMBIGUOUS["two prompts"][0]])
    assert read(path, prompt_key="problem")[0].prompt == "p"
    same = {"prompt": "p", "problem": "p", "answer": "1"}
    assert read(write_jsonl(path, [same]))[0].prompt == "p"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_further_columns_for_verifiers(tmp_path, kind):
    row = MATH_500 | {"rate": 0.25, "steps": [1, 2], "raw": b"\x00"} | {"prompt_of": None}
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        del row["raw"]
        write_jsonl(path, [row])
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)

    def columns(**further):
        [found] = read_rows(path, BenchmarkConfig(), None, Further(**further))
        return found.columns

    assert columns() == {}
    some = columns(required=frozenset({"level", "rate"}), optional=frozenset({"steps", "none"}))
    assert some == {"level": 3, "rate": 0.25, "steps": [1, 2]}
    everything = dict(row)
    everything.pop("raw", None)
    assert columns(takes_all=True) == everything
    with pytest.raises(UserError, match=r"no column 'none' \(it has .*'level'.*give its param"):
        columns(required=frozenset({"none"}))
    if kind == "parquet":
        with pytest.raises(UserError, match=r"row 1: 'raw', .*it is bytes.*: store it as one"):
            columns(required=frozenset({"raw"}))
