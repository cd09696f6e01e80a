"""Prompts and answers from every kind of data file, and what is told of a bad one."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal

import datasets
import numpy
import pyarrow
import pytest
from pyarrow import parquet

from megafork.config import BenchmarkConfig, DataConfig, RewardConfig
from megafork.data.prompts import Prompt, lines_of, read_prompts, read_rows
from megafork.data.tables import stem_of
from megafork.data.tokenizer import HfTokenizer
from megafork.errors import UserError
from megafork.verifiers.names import check_answers
from tests.helpers.commands import QUICKSTART

ROWS = [
    {"id": "aime24-0", "problem": "How many? Größe", "answer": "204"},
    {"id": "aime24-1", "problem": "And now?", "answer": "25"},
]
# The columns of DAPO-Math-17K.
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve: {n} + 1\nAnswer: $Answer", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"9a9b6eb4-{n}"},
    }
    for n in range(3)
]
DAPO_KEYS = {"answer_key": "reward_model.ground_truth", "chat_template": True}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_folder(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "folder": write_folder}


def written(tmp_path, kind, rows):
    return WRITERS[kind](tmp_path / f"bench.{kind}", rows)


def read(path, **settings):
    config = BenchmarkConfig(**settings)
    return read_rows(path, config, config.id_key)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_benchmark_is_read_from_every_kind_of_file(tmp_path, kind):
    rows = read(written(tmp_path, kind, ROWS))
    assert [(r.id, r.text, r.answer) for r in rows] == [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize("kind", WRITERS)
def test_dapo_s_nested_columns(tmp_path, kind):
    path = written(tmp_path, kind, DAPO)
    rows = read(path, prompt_key="prompt", id_key="extra_info.index", **DAPO_KEYS)
    assert [(row.id, row.answer) for row in rows] == [
        (f"9a9b6eb4-{n}", str(n + 1)) for n in (0, 1, 2)
    ]
    assert rows[2].text == "Solve: 2 + 1\nAnswer: $Answer"
    trained_on = read_rows(path, DataConfig(train=str(path), **DAPO_KEYS))
    assert [(row.prompt, row.answer) for row in trained_on] == [(r.prompt, r.answer) for r in rows]


def test_a_column_whose_name_holds_a_dot_wins(tmp_path):
    row = {"id": 1, "problem": "p", "a.b": "flat", "a": {"b": "nested"}}
    for kind in ("jsonl", "parquet"):
        assert read(written(tmp_path, kind, [row]), answer_key="a.b")[0].answer == "flat"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (204, "204"),
        (2.5, "2.5"),
        (["\\frac{1}{2}"], "\\frac{1}{2}"),
        (["1", "2"], '["1", "2"]'),
        ({"é": 1}, '{"é": 1}'),
    ],
)
def test_answers_reach_the_verifier_as_text(tmp_path, answer, text):
    path = write_jsonl(tmp_path / "b.jsonl", [{"id": 7, "problem": "p", "answer": answer}])
    [row] = read(path)
    assert (row.id, row.answer) == ("7", text)


GOOD = ROWS[0]
NUMBERS = ["0.00005", "5e-05", "5e-5", "1E5", "1.0", "1.50", "-0.0", "100", "-7", "1e400", "1e-400"]
NUMBERS += ["12345678901234567890123", "3.14159265358979323846", "9" * 5000]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_of_a_jsonl_keeps_its_text(tmp_path, text):
    path = tmp_path / "b.jsonl"
    path.write_text(f'{{"id": 7, "problem": "p", "answer": {text}}}\n')
    [row] = read(path)
    assert (row.id, row.answer) == ("7", text)
    path.write_text(f'{{"id": 7, "problem": "p", "answer": [{text}]}}\n')
    assert read(path)[0].answer == text
    path.write_text(
        f'{{"id": 7, "problem": "p", "answer": {{"x": {{"é": [{text}, 1.0, "a"]}}}}}}\n'
    )
    assert read(path)[0].answer == f'{{"x": {{"é": [{text}, 1.0, "a"]}}}}'
    assert read(path, answer_key="answer.x")[0].answer == f'{{"é": [{text}, 1.0, "a"]}}'


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize(
    ("value", "type_", "text"),
    [
        (0.00005, "float64", "0.00005"),
        (0.1, "float32", "0.1"),
        (0.1, "float16", "0.1"),
        (1e22, "float64", "10000000000000000000000.0"),
        (2.0, "float64", "2.0"),
        (-0.25, "float32", "-0.25"),
        (Decimal("0.00000012"), pyarrow.decimal128(20, 8), "0.00000012"),
        (2**63, "uint64", str(2**63)),
        (7, "int8", "7"),
    ],
)
def test_a_number_of_a_table_has_the_text_of_its_type(tmp_path, kind, value, type_, text):
    """The shortest decimal that is that number, and no power of ten."""
    kept = pyarrow.array([numpy.float16(value) if type_ == "float16" else value], type_)
    nested = pyarrow.StructArray.from_arrays([kept], ["x"])
    table = pyarrow.table({"id": ["a"], "problem": ["p"], "answer": kept, "nested": nested})
    path = tmp_path / f"b.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(path)
    assert read(path)[0].answer == text
    assert read(path, answer_key="nested.x")[0].answer == text


NO_ANSWERS = {
    "null": "is null",
    "[null]": "is null",
    '""': "is empty",
    '" \\n"': "is empty",
    '[""]': "is empty",
    "[]": "is empty",
    "{}": "is empty",
    "NaN": "is NaN, no number",
    "[NaN]": "is NaN, no number",
    "Infinity": "is Infinity, no number",
    "-Infinity": "is -Infinity, no number",
    "true": "is true, a boolean",
    "[false]": "is false, a boolean",
    '["1", null]': "is null",
    '{"x": ["1", NaN]}': "is NaN, no number",
    '["1", ""]': "is empty",
}


@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_what_is_no_answer_is_told_with_its_row(tmp_path, answer):
    path = tmp_path / "b.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n{{"id": 7, "problem": "p", "answer": {answer}}}\n')
    with pytest.raises(UserError, match=rf"b.jsonl, line 2: 'answer'.* {NO_ANSWERS[answer]}"):
        read(path)
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: 'answer'"):
        read_rows(path, DataConfig(train=str(path), prompt_key="problem"))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([1.5, float("nan")], "is NaN, no number"),
        ([1.5, float("inf")], "is Infinity, no number"),
        ([1.5, None], "is null"),
        ([True, False], "is true, a boolean"),
        (["1", ""], "is empty"),
        ([["1"], []], "is empty"),
    ],
)
def test_what_is_no_answer_of_a_table_is_told_with_its_row(tmp_path, kind, answers, message):
    rows = [{"id": i, "problem": "p", "answer": answer} for i, answer in enumerate(answers)]
    path = written(tmp_path, kind, rows)
    number = 1 if "boolean" in message else 2
    with pytest.raises(UserError, match=rf"b[a-z]*.{kind}, row {number}: 'answer' {message}"):
        read(path)


def test_numbers_are_no_problems_and_no_fractions_are_ids(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"id": 1.5, "problem": "p", "answer": 1}\n')
    with pytest.raises(UserError, match="'id' must be a non-empty string or a whole number"):
        read(path, id_key="id")
    assert read(path)[0].id == "1"  # a column that nobody named: the row's number then


@pytest.mark.parametrize("answer", ["$$", r"\boxed{}", "."])
def test_an_answer_that_is_empty_for_maths_is_told_before_the_start(tmp_path, answer):
    path = write_jsonl(tmp_path / "b.jsonl", [GOOD, GOOD | {"id": "b", "answer": answer}])
    with pytest.raises(UserError, match=r"b.jsonl, line 2: reward.verifier=maths finds no answer"):
        check_answers(read(path), RewardConfig(verifier="maths"))
    check_answers(read(path), RewardConfig(verifier="exact"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [(b"42", "row 1: 'answer' is bytes"), ([b"4", b"2"], "row 1: .* cannot be written as JSON")],
)
def test_an_answer_that_is_no_text_is_told(tmp_path, answer, message):
    path = written(tmp_path, "parquet", [{"id": 7, "problem": "p", "answer": answer}])
    with pytest.raises(UserError, match=message):
        read(path)


def test_without_an_id_column_the_row_s_number_is_the_id(tmp_path):
    path = write_jsonl(tmp_path / "b.jsonl", [{"problem": "p", "answer": "1"}] * 3)
    assert [row.id for row in read(path, id_key="")] == ["1", "2", "3"]


SURROGATE = '{"id": 1, "problem": "\\ud83d", "answer": "1"}'
BAD = {
    "no such column": ({"id": 1, "answer": "1"}, r"no column 'problem' \(it has 'id', 'answer'\)"),
    "no such nested column": (
        {"id": 1, "problem": "p", "answer": "1"},
        r"no column 'x.y' \(it has .*\): set data.answer_key",
        {"answer_key": "x.y"},
    ),
    "no id": (
        {"problem": "p", "answer": "1"},
        r"no column 'id' .*: set data.id_key \(empty",
        {"id_key": "id"},
    ),
    "null id": (
        {"id": None, "problem": "p", "answer": "1"},
        "'id' must be a non-empty string",
        {"id_key": "id"},
    ),
    "empty problem": ({"id": 1, "problem": " ", "answer": "1"}, "'problem' must be a non-empty"),
    "a number": ({"id": 1, "problem": 5, "answer": "1"}, "'problem' must be a non-empty"),
    "no answer": ({"id": 1, "problem": "p", "answer": None}, "'answer' is null"),
    "not an object": ([1], r"no column 'problem', the row is not an object"),
    "turns without a chat template": (
        {"id": 1, "problem": [{"role": "user", "content": "p"}], "answer": "1"},
        "'problem' is a list of chat turns, .*: set data.chat_template=true",
    ),
    "turns in a template": (
        {"id": 1, "problem": [{"role": "user", "content": "p"}], "answer": "1"},
        "leave data.template unset",
        {"chat_template": True, "template": "{problem}!"},
    ),
    "no turns": ({"id": 1, "problem": ["p"], "answer": "1"}, r"not of \{role, content\} turns"),
    "an assistant's turn": (
        {"id": 1, "problem": [{"role": "assistant", "content": "p"}], "answer": "1"},
        "must end with a user's turn",
        {"chat_template": True},
    ),
    "half a character": (SURROGATE, "holds half of a surrogate pair"),
    "half a character in the first turn": (
        {
            "id": 1,
            "problem": [
                {"role": "system", "content": "\ud83d"},
                {"role": "user", "content": "p"},
            ],
            "answer": "1",
        },
        "holds half of a surrogate pair",
        {"chat_template": True},
    ),
    "not JSON": ("{", "not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_file(tmp_path, case):
    row, message, *settings = BAD[case]
    path = tmp_path / "bench.jsonl"
    line = row if isinstance(row, str) else json.dumps(row)
    keyed = GOOD | {"x": {"y": 1}}
    path.write_text(f"{json.dumps(keyed)}\n\n{line}\n")
    with pytest.raises(UserError, match=rf"bench.jsonl, line 3: .*{message}"):
        read(path, **(settings[0] if settings else {}))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_bad_row_of_a_table_is_named_by_its_number(tmp_path, kind):
    path = written(tmp_path, kind, [*ROWS, ROWS[1] | {"id": "aime24-2", "problem": ""}])
    with pytest.raises(UserError, match=rf"bench.{kind}, row 3: 'problem' must be"):
        read(path)


def test_a_folder_of_splits_names_them(tmp_path):
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"several splits: name one of .*both/train, .*both/test"):
        read(tmp_path / "both")
    assert len(read(tmp_path / "both" / "test")) == 2


def test_what_is_no_data_file_is_told(tmp_path, monkeypatch):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "none.jsonl": "does not exist: give .jsonl, .json, .csv",
        "torn.parquet": "cannot be read as parquet",
        "latin.jsonl": "is not UTF-8",
        "empty.jsonl": "is empty",
        "folder": "is no folder of datasets' save_to_disk",
    }.items():
        with pytest.raises(UserError, match=f"{name} {message}"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"'hf:short' is not of the form hf:owner/name"):
        read("hf:short")


def test_a_hub_without_a_network_is_told(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hf:owner/name:test cannot be loaded .*the network"):
        read("hf:owner/name:test")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/aime_2024.jsonl", "aime_2024"),
        ("x.parquet", "x"),
        ("x.jsonl.gz", "x"),
        ("a/gsm8k.csv", "gsm8k"),
        ("a/test-*-of-*.parquet", "test--of"),
        ("data/math/*.parquet", "math"),
        ("runs/math.v2", "math.v2"),
        ("hf:HuggingFaceH4/MATH-500:test", "MATH-500-test"),
        ("hf:openai/gsm8k/main:test", "gsm8k-main-test"),
    ],
)
def test_a_benchmark_has_a_short_name(path, name):
    assert stem_of(path) == name


# ----------------------------------------------------------------------------- templates

QWEN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<no>{% endif %}"
)


@pytest.fixture
def chat_folder(tmp_path):
    """The quickstart's characters; letters of the template become <unk>."""
    folder = tmp_path / "chat"
    shutil.copytree(QUICKSTART / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(QWEN.replace("<no>", "=9").replace("<", "1"))
    return folder


def test_a_template_stands_around_the_problem_before_the_chat_template(tmp_path, chat_folder):
    path = write_jsonl(tmp_path / "b.jsonl", [{"problem": "6*4", "answer": "24"}])
    plain = HfTokenizer(QUICKSTART / "model")
    data = BenchmarkConfig(template="1+{problem}={problem};")
    [prompt] = read_prompts(path, data, plain.encode_prompt)
    assert prompt.ids == plain.encode("1+6*4=6*4;")
    assert prompt.text == "6*4"  # what the verifier is told
    chat = HfTokenizer(chat_folder, chat_template=True)
    [prompt] = read_prompts(path, data, chat.encode_prompt)
    assert prompt.ids == plain.encode("1user>1+6*4=6*4;")


def test_a_chat_of_several_turns_and_thinking(tmp_path, chat_folder):
    turns = [{"role": "system", "content": "7"}, {"role": "user", "content": "8"}]
    path = write_jsonl(tmp_path / "b.jsonl", [{"problem": turns, "answer": "24"}])
    plain = HfTokenizer(QUICKSTART / "model")
    data = BenchmarkConfig(chat_template=True)
    for thinking, end in ((None, ""), (True, ""), (False, "=9")):
        chat = HfTokenizer(chat_folder, chat_template=True, enable_thinking=thinking)
        [prompt] = read_prompts(path, data, chat.encode_prompt)
        assert prompt.ids == plain.encode(f"1system>71user>8{end}")
        assert prompt.text == "8"


def test_a_prompt_is_shown_as_the_model_reads_it(chat_folder):
    """Its special tokens, and what a terminal would not show or would act upon."""
    plain = HfTokenizer(chat_folder)
    shown = lines_of(Prompt(0, "", "", plain.encode("6*4<eos>8\n")), plain)
    assert shown == ["6 tokens", "| 6*4<eos>8<unk>"]

    class AsWritten:
        show = staticmethod("".join)

    text = "a\x08oxed\n\x1b[31m\tb\u202e"
    [_, first, second] = lines_of(Prompt(0, "", "", list(text)), AsWritten())
    assert (first, second) == (r"| a\x08oxed", r"| \x1b[31m\tb\u202e")
    lines = lines_of(Prompt(0, "", "", list("x" * 5000)), AsWritten())
    assert lines == ["5000 tokens", "| " + "x" * 1500, "| [2000 characters]", "| " + "x" * 1500]


def test_thinking_needs_a_template_that_knows_it(chat_folder):
    (chat_folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match=r"enable_thinking=false, but the chat template of"):
        HfTokenizer(chat_folder, chat_template=True, enable_thinking=False)


def test_a_long_prompt_is_named(tmp_path):
    path = write_jsonl(tmp_path / "b.jsonl", [{"problem": "1" * 9, "answer": "24"}])
    data = BenchmarkConfig(max_prompt_tokens=8)
    with pytest.raises(UserError, match=r"b.jsonl, line 1: .* has 9 tokens, .*too_long=drop"):
        read_prompts(path, data, HfTokenizer(QUICKSTART / "model").encode)


def test_long_prompts_can_be_left_out(tmp_path):
    rows = [{"problem": "1" * length, "answer": "24"} for length in (9, 8, 30, 2)]
    path = write_jsonl(tmp_path / "b.jsonl", rows)
    tokenizer = HfTokenizer(QUICKSTART / "model")
    told = []
    data = BenchmarkConfig(max_prompt_tokens=8, too_long="drop")
    prompts = read_prompts(path, data, tokenizer.encode, None, tell=told.append)
    assert [(p.index, p.id, len(p.ids)) for p in prompts] == [(0, "2", 8), (1, "4", 2)]
    assert told == [
        "note: 2 of 4 rows are left out, since their prompts have more than "
        "data.max_prompt_tokens=8 tokens (data.too_long=drop)"
    ]
    none = BenchmarkConfig(max_prompt_tokens=1, too_long="drop")
    with pytest.raises(UserError, match=r"leaves none of 4 rows: .* data.max_prompt_tokens=1"):
        read_prompts(path, none, tokenizer.encode)
