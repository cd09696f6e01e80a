"""Two models on the same responses, against set arithmetic and numpy over all tokens at once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest

from megafork.analysis.pairs import entropy_change, overlap
from megafork.errors import UserError
from tests.helpers.scored import brute_error, entropies_of, make_rows, rescored, scored_of

TIES = pytest.mark.parametrize("ties", [False, True])


def top_positions(values, rho):
    """Set of positions at or above the k-th largest, k = ceil(rho n)"""
    if not len(values):
        return set()
    k = math.ceil(Fraction(str(rho)) * len(values))
    threshold = sorted(values)[-k]
    return {i for i, value in enumerate(values) if value >= threshold}


@TIES
@pytest.mark.parametrize("rho", [0.05, 0.2, 1.0])
def test_overlap_is_set_arithmetic(tmp_path, ties, rho):
    rows = make_rows(6, ties=ties)
    other = rescored(rows, 7, ties=ties)
    a, b = (scored_of(tmp_path, n, r) for n, r in (("a", rows), ("b", other)))

    found = overlap(a, b, rho, "batch")
    tops = [top_positions(entropies_of(r), rho) for r in (rows, other)]
    assert (found["positions_base"], found["positions_model"]) == (len(tops[0]), len(tops[1]))
    assert found["positions_both"] == len(tops[0] & tops[1])
    assert found["overlap"] == len(tops[0] & tops[1]) / len(tops[0])
    assert found["overlap_by_chance"] == len(tops[1]) / len(entropies_of(rows))
    assert found["threshold_base_nats"] == min(entropies_of(rows)[list(tops[0])])
    assert found["threshold_model_nats"] == min(entropies_of(other)[list(tops[1])])

    found = overlap(a, b, rho, "sequence")
    tops = [
        {(i, p) for i, row in enumerate(r) for p in top_positions(row["entropies"], rho)}
        for r in (rows, other)
    ]
    assert (found["positions_base"], found["positions_model"]) == (len(tops[0]), len(tops[1]))
    assert found["positions_both"] == len(tops[0] & tops[1])
    assert math.isnan(found["threshold_base_nats"])


def test_a_model_overlaps_with_itself(tmp_path):
    a = scored_of(tmp_path, "a", make_rows(6, ties=True))
    for scope in ("batch", "sequence"):
        assert overlap(a, a, 0.2, scope)["overlap"] == 1.0


@TIES
def test_change_by_bins_of_the_base_model(tmp_path, ties):
    """A token's bin is that of its entropy's lowest rank: 20 * (tokens of less entropy) // n."""
    rows = make_rows(8, ties=ties)
    other = rescored(rows, 9)
    a, b = (scored_of(tmp_path, n, r) for n, r in (("a", rows), ("b", other)))
    found, about = entropy_change(a, b)
    before, after = entropies_of(rows), entropies_of(other)
    of_row = numpy.repeat(range(len(rows)), [len(row["entropies"]) for row in rows])
    less = numpy.array([(before < value).sum() for value in before])
    bins = 20 * less // len(before)
    for i in range(20):
        inside = bins == i
        assert found[i]["tokens"] == inside.sum()
        if not inside.any():
            assert numpy.isnan(found[i]["mean_change_nats"])
            continue
        change = (after - before)[inside]
        assert found[i]["mean_base_nats"] == pytest.approx(before[inside].mean(), rel=1e-12)
        assert found[i]["mean_change_nats"] == pytest.approx(change.mean(), rel=1e-9, abs=1e-12)
        assert found[i]["standard_error_nats"] == pytest.approx(
            brute_error(change, of_row[inside]), rel=1e-6, abs=1e-12, nan_ok=True
        )
        low, high = found[i]["base_above_nats"], found[i]["base_up_to_nats"]
        assert before[inside].max() <= high
        assert before[inside].min() > low or (i == 0 and before[inside].min() >= low)
    assert about["mean_change_nats"] == pytest.approx((after - before).mean(), rel=1e-9)
    assert sum(row["tokens"] for row in found) == about["tokens"] == len(before)


def test_bins_of_different_entropies_have_a_twentieth_each(tmp_path):
    row = {"response_ids": [1] * 200, "entropies": [0.01 * i for i in range(200)]}
    a = scored_of(tmp_path, "a", [row])
    rows, _ = entropy_change(a, a)
    assert [(row["tokens"], row["mean_change_nats"]) for row in rows] == [(10, 0.0)] * 20


def test_fewer_tokens_than_bins(tmp_path):
    a = scored_of(tmp_path, "a", [{"response_ids": [1, 2, 3], "entropies": [0.3, 0.1, 0.2]}])
    rows, _ = entropy_change(a, a)
    filled = [i for i, row in enumerate(rows) if row["tokens"]]
    assert filled == [0, 6, 13]  # 20 * rank // 3


def test_other_responses_are_refused(tmp_path):
    a = scored_of(tmp_path, "a", make_rows(0))
    b = scored_of(tmp_path, "b", make_rows(1))
    for compare in (entropy_change, lambda a, b: overlap(a, b, 0.2, "batch")):
        with pytest.raises(UserError, match="not the response of"):
            compare(a, b)
