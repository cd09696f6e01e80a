"""What is read of scored responses, what is refused, and that memory does not grow with them."""

from __future__ import annotations

import json
import os
import signal
import tracemalloc

import numpy
import pytest

from megafork.analysis.columns import check_same_responses, read_scored
from megafork.analysis.entropy import entropy_statistics
from megafork.analysis.output import spool_beside
from megafork.analysis.pairs import entropy_change, overlap
from megafork.analysis.tokens import rank_tokens
from megafork.errors import UserError
from megafork.ops.top_fraction import top_k  # noqa: F401  (imported before memory is measured)
from tests.helpers.scored import VOCAB, columns_of, entropies_of, make_rows, rescored, write

GOOD = {"prompt_ids": [1], "response_ids": [2, 3], "entropies": [0.5, 0]}


@pytest.mark.parametrize("block_tokens", [1, 100, 10**6])
def test_columns_are_the_rows(tmp_path, block_tokens):
    rows = make_rows(0)
    columns = columns_of(tmp_path, "a", rows, block_tokens)
    blocks = list(columns.blocks())
    lengths = [len(row["entropies"]) for row in rows]
    joined = {
        name: numpy.concatenate([getattr(block, name) for block in blocks])
        for name in ("entropy_T", "id_T", "length_B", "row_T")
    }
    assert joined["entropy_T"].tolist() == entropies_of(rows).tolist()
    assert joined["id_T"].tolist() == [i for row in rows for i in row["response_ids"]]
    assert joined["length_B"].tolist() == lengths
    assert joined["row_T"].tolist() == numpy.repeat(range(len(rows)), lengths).tolist()
    assert (columns.num_rows, columns.num_tokens) == (len(rows), sum(lengths))


def test_text_is_tokenized_where_ids_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "ba", "entropies": [1.0, 2.0]}])
    columns = read_scored(path, tmp_path / "with", encode=lambda text: [ord(c) for c in text])
    assert next(columns.blocks()).id_T.tolist() == [98, 97]
    assert next(read_scored(path, tmp_path / "without").blocks()).id_T.tolist() == [-1, -1]
    with pytest.raises(UserError, match=r"a.jsonl, line 1: 2 entropies for 1 response tokens"):
        read_scored(path, tmp_path / "other", encode=lambda text: [0])


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
        read_scored(path, tmp_path / "spool", vocab_size=VOCAB)


@pytest.mark.parametrize("text", ["", "\n \n", '{"entropies": [], "response_ids": []}\n'])
def test_a_file_without_tokens_is_refused(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"a\.jsonl holds no response token"):
        read_scored(tmp_path / "a.jsonl", tmp_path / "spool")


@pytest.mark.parametrize("block_tokens", [1, 60, 10**6])
@pytest.mark.parametrize("column", ["prompt_ids", "response_ids"])
def test_other_responses_are_named(tmp_path, block_tokens, column):
    rows = make_rows(0)
    other = rescored(rows, 1)
    same, scored_again = (
        columns_of(tmp_path, n, r, block_tokens) for n, r in (("a", rows), ("b", other))
    )
    check_same_responses(same, scored_again)
    ids = other[41][column]
    other[41] = other[41] | {column: [*ids[:-1], (ids[-1] + 1) % VOCAB]}
    changed = columns_of(tmp_path, "c", other, block_tokens)
    with pytest.raises(UserError, match=r"c\.jsonl, line 42: not the .*a\.jsonl, line 42"):
        check_same_responses(same, changed)


@pytest.mark.parametrize("block_tokens", [1, 60, 10**6])
def test_a_shorter_file_is_named(tmp_path, block_tokens):
    rows = make_rows(0)
    whole = columns_of(tmp_path, "a", rows, block_tokens)
    shorter = columns_of(tmp_path, "b", rows[:-2], block_tokens)
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
        check_same_responses(*(read_scored(p, tmp_path / p.stem) for p in paths))


def test_text_is_the_same_in_any_spelling(tmp_path):
    """An accent as it is or as an escape, turns with their keys in any order."""
    turns = [{"role": "user", "content": "\u00e9"}, {"content": "\u00e9", "role": "user"}]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, turn, is_ascii in zip(paths, turns, (True, False), strict=True):
        row = {"prompt": [turn], "response": "\u00fc", "entropies": [1.0]}
        path.write_text(json.dumps(row, ensure_ascii=is_ascii) + "\n", encoding="utf-8")
    a, b = (read_scored(path, tmp_path / path.stem) for path in paths)
    check_same_responses(a, b)


def test_a_signal_leaves_no_columns_behind(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="75"), spool_beside(tmp_path) as spool:
        (spool / "entropies").write_bytes(b"much")
        os.kill(os.getpid(), signal.SIGTERM)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Ten times the responses, megabytes of columns more, and the same peak."""

    def peak(num_rows, name):
        rows = make_rows(0, num_rows, 400)
        paths = [
            write(tmp_path / f"{name}{i}.jsonl", r) for i, r in enumerate([rows, rescored(rows, 1)])
        ]
        num_tokens = len(entropies_of(rows))
        del rows
        tracemalloc.start()
        a, b = (
            read_scored(path, tmp_path / path.stem, vocab_size=VOCAB, block_tokens=1 << 14)
            for path in paths
        )
        entropy_statistics(a)
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
    assert large - small < 0.1 * column_bytes
