"""Files of scored responses: what is read, what is refused, and the memory that it takes."""

from __future__ import annotations

import json
import tracemalloc

import numpy
import pyarrow
import pytest
from pyarrow import parquet

from megafork.analysis.entropy import entropy_tables
from megafork.analysis.pairs import entropy_change, overlap
from megafork.analysis.scored import check_same_responses, read_scored
from megafork.analysis.tokens import rank_tokens
from megafork.errors import UserError
from megafork.ops.top_fraction import top_k  # noqa: F401  (imported before memory is measured)
from tests.helpers.scored import VOCAB, entropies_of, make_rows, rescored, scored_of, write

GOOD = {"prompt_ids": [1], "response_ids": [2, 3], "entropies": [0.5, 0]}


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=17)
    return path


@pytest.mark.parametrize("writer", [write, write_parquet])
def test_columns_are_the_rows(tmp_path, writer):
    rows = make_rows(0)
    path = writer(tmp_path / ("a.jsonl" if writer is write else "a.parquet"), rows)
    scored = read_scored(path, vocab_size=VOCAB)
    lengths = [len(row["entropies"]) for row in rows]
    assert scored.entropy_T.tolist() == entropies_of(rows).tolist()
    assert scored.entropy_T.dtype == numpy.float32
    assert scored.id_T.tolist() == [i for row in rows for i in row["response_ids"]]
    assert scored.length_B.tolist() == lengths
    assert scored.num_tokens == sum(lengths)
    of_token = [i for i, length in enumerate(lengths) for _ in range(length)]
    assert scored.response_T().tolist() == of_token
    check_same_responses(scored, scored_of(tmp_path, "same", rows))


def test_text_is_tokenized_where_ids_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "ba", "entropies": [1.0, 2.0]}])
    scored = read_scored(path, vocab_size=128, encode=lambda text: [ord(c) for c in text])
    assert scored.id_T.tolist() == [98, 97]
    assert read_scored(path).id_T is None
    with pytest.raises(UserError, match=r"a.jsonl, line 1: 2 entropies for 1 response tokens"):
        read_scored(path, vocab_size=128, encode=lambda text: [0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        (json.dumps(GOOD | {"entropies": [0.5, float("nan")]}), r"entropies\[1\] is nan"),
        (json.dumps(GOOD | {"entropies": [float("inf"), 1.0]}), r"entropies\[0\] is inf"),
        (json.dumps(GOOD | {"entropies": [0.5, None]}), r"got `null` - at `\$.entropies\[1\]`"),
        (json.dumps(GOOD | {"entropies": [0.5, -0.1]}), r"entropies\[1\] is -0.1, which is no"),
        (json.dumps(GOOD | {"entropies": [0.5, 1e39]}), r"entropies\[1\] is 1e\+39"),
        (json.dumps(GOOD | {"entropies": [0.5]}), "1 entropies for 2 response tokens"),
        (json.dumps({"response_ids": [2, 3]}), "no column 'entropies': score it"),
        (json.dumps({"entropies": [0.5]}), "neither response_ids nor response"),
        (json.dumps(GOOD | {"response_ids": [2, 40]}), "from 2 to 40, outside .* of 40"),
        (json.dumps(GOOD | {"response_ids": [-1, 4]}), "from -1 to 4, outside"),
        (json.dumps(GOOD | {"prompt_ids": [2**63]}), r"Expected `int` .*prompt_ids"),
        (json.dumps(GOOD | {"response_ids": "ab"}), r"Expected `array \| null`, got `str`"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: .*{message}"):
        read_scored(path, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropies": [0.5, float("nan")]}, r"row 2: entropies\[1\] is nan"),
        ({"entropies": [0.5, -0.1]}, r"row 2: entropies\[1\] is -0.1, which is no"),
        ({"entropies": [0.5, 1e39]}, r"row 2: entropies\[1\] is inf"),
        ({"entropies": [0.5, None]}, "row 2: null in entropies"),
        ({"entropies": None}, "row 2: null in entropies"),
        ({"entropies": [0.5]}, "row 2: 1 entropies for 2 response tokens"),
        ({"response_ids": [2, 40]}, "row 2: response_ids go from 2 to 40, outside .* of 40"),
        ({"response_ids": [2**40, 2]}, "cannot be read as parquet .*not in range"),
    ],
)
def test_a_bad_row_of_parquet_is_named(tmp_path, change, message):
    path = write_parquet(tmp_path / "a.parquet", [GOOD, GOOD | change])
    with pytest.raises(UserError, match=rf"a\.parquet,? {message}"):
        read_scored(path, vocab_size=VOCAB)


def test_damaged_parquet_is_told(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [GOOD])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet .*copy it again"):
        read_scored(path)
    write_parquet(path, [{"prompt_ids": [1], "response_ids": [2]}])
    with pytest.raises(UserError, match=r"a\.parquet: no column 'entropies': score it"):
        read_scored(path)
    write_parquet(path, [GOOD | {"entropies": "0.5"}])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet"):
        read_scored(path)


@pytest.mark.parametrize("text", ["", "\n \n", '{"entropies": [], "response_ids": []}\n'])
def test_a_file_without_tokens_is_refused(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"a\.jsonl holds no response token"):
        read_scored(tmp_path / "a.jsonl")


@pytest.mark.parametrize("column", ["prompt_ids", "response_ids"])
def test_other_responses_are_named(tmp_path, column):
    rows = make_rows(0)
    other = rescored(rows, 1)
    same, scored_again = (scored_of(tmp_path, n, r) for n, r in (("a", rows), ("b", other)))
    check_same_responses(same, scored_again)
    ids = other[41][column]
    other[41] = other[41] | {column: [*ids[:-1], (ids[-1] + 1) % VOCAB]}
    changed = scored_of(tmp_path, "c", other)
    with pytest.raises(UserError, match=r"c\.jsonl, line 42: not the .*a\.jsonl, line 42"):
        check_same_responses(same, changed)


def test_a_shorter_file_is_named(tmp_path):
    rows = make_rows(0)
    whole = scored_of(tmp_path, "a", rows)
    shorter = scored_of(tmp_path, "b", rows[:-2])
    for pair in ((whole, shorter), (shorter, whole)):
        with pytest.raises(UserError, match=r"a\.jsonl, line 59: .*b\.jsonl ends .*58 of 60"):
            check_same_responses(*pair)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "ab", "response": "c"}, {"prompt": "a", "response": "bc"}),
        (
            {"prompt_ids": [1, 2], "response_ids": [3]},
            {"prompt_ids": [1], "response_ids": [2, 3]},
        ),
    ],
)
def test_the_same_in_other_parts_is_another_response(tmp_path, one, other):
    paths = [
        write(
            tmp_path / f"{i}.jsonl",
            [row | {"entropies": [1.0] * len(row.get("response_ids", "1"))}],
        )
        for i, row in enumerate([one, other])
    ]
    with pytest.raises(UserError, match="line 1"):
        check_same_responses(*(read_scored(p) for p in paths))


def test_text_and_parquet_of_the_same_responses_are_of_two_formats(tmp_path):
    """`score` adds the ids to a parquet, so it is keyed by them and a jsonl of text by its text."""
    text = {"prompt": "p", "response": "ba", "entropies": [1.0, 2.0]}
    a = read_scored(write(tmp_path / "a.jsonl", [text]))
    b = read_scored(write_parquet(tmp_path / "b.parquet", [GOOD]))
    with pytest.raises(UserError, match=r"b.parquet, row 1: .* files of one format \(.jsonl or"):
        check_same_responses(a, b)


def test_text_is_the_same_in_any_spelling(tmp_path):
    """An accent as it is or as an escape, turns with their keys in any order."""
    turns = [{"role": "user", "content": "\u00e9"}, {"content": "\u00e9", "role": "user"}]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, turn, is_ascii in zip(paths, turns, (True, False), strict=True):
        row = {"prompt": [turn], "response": "\u00fc", "entropies": [1.0]}
        path.write_text(json.dumps(row, ensure_ascii=is_ascii) + "\n", encoding="utf-8")
    a, b = (read_scored(path) for path in paths)
    check_same_responses(a, b)


def test_memory_is_that_of_the_columns(tmp_path):
    """Ten times the responses take 36 bytes for each token more, and no Python numbers."""

    def peak(num_rows, name):
        rows = make_rows(0, num_rows, 400)
        paths = [
            write(tmp_path / f"{name}{i}.jsonl", r) for i, r in enumerate([rows, rescored(rows, 1)])
        ]
        num_tokens = len(entropies_of(rows))
        del rows
        tracemalloc.start()
        a, b = (read_scored(path, vocab_size=VOCAB) for path in paths)
        entropy_tables(a)
        rank_tokens(a, VOCAB, str, 1, 1)
        overlap(a, b, 0.2, "batch")
        overlap(a, b, 0.2, "sequence")
        entropy_change(a, b)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, num_tokens

    peak(50, "warm")  # imports
    small, small_tokens = peak(250, "small")
    large, large_tokens = peak(2500, "large")
    column_bytes = 4 * (large_tokens - small_tokens)
    assert column_bytes > 1.7e6
    # Entropies and ids of two files, an eighth of room to grow, a float64 copy or two for a while.
    assert large - small < 9 * column_bytes
