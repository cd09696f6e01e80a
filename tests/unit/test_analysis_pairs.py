"""Two models on the same responses, against set arithmetic and numpy over all tokens at once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest

from megafork.analysis.pairs import entropy_change, overlap
from megafork.errors import UserError
from tests.helpers.scored import brute_error, columns_of, entropies_of, make_rows, rescored

BLOCKS = pytest.mark.parametrize("block_tokens", [1, 100, 10**6])
TIES = pytest.mark.parametrize("ties", [False, True])


def top_positions(values, rho):
    """Set of positions at or above the k-th largest, k = ceil(rho n)"""
    if not len(values):
        return set()
    k = math.ceil(Fraction(str(rho)) * len(values))
    threshold = sorted(values)[-k]
    return {i for i, value in enumerate(values) if value >= threshold}


@BLOCKS
@TIES
@pytest.mark.parametrize("rho", [0.05, 0.2, 1.0])
def test_overlap_is_set_arithmetic(tmp_path, block_tokens, ties, rho):
    rows = make_rows(6, ties=ties)
    other = rescored(rows, 7, ties=ties)
    a, b = (columns_of(tmp_path, n, r, block_tokens) for n, r in (("a", rows), ("b", other)))

    found = overlap(a, b, rho, "batch")
    tops = [top_positions(entropies_of(r), rho) for r in (rows, other)]
    assert (found.num_a, found.num_b) == (len(tops[0]), len(tops[1]))
    assert found.num_both == len(tops[0] & tops[1])
    assert found.overlap == len(tops[0] & tops[1]) / len(tops[0])
    assert found.by_chance == len(tops[1]) / len(entropies_of(rows))
    assert found.threshold_a == min(entropies_of(rows)[list(tops[0])])
    assert found.threshold_b == min(entropies_of(other)[list(tops[1])])

    found = overlap(a, b, rho, "sequence")
    tops = [
        {(i, p) for i, row in enumerate(r) for p in top_positions(row["entropies"], rho)}
        for r in (rows, other)
    ]
    assert (found.num_a, found.num_b) == (len(tops[0]), len(tops[1]))
    assert found.num_both == len(tops[0] & tops[1])
    assert math.isnan(found.threshold_a)


def test_a_model_overlaps_with_itself(tmp_path):
    a = columns_of(tmp_path, "a", make_rows(6, ties=True))
    assert overlap(a, a, 0.2, "batch").overlap == overlap(a, a, 0.2, "sequence").overlap == 1.0


@BLOCKS
@TIES
def test_change_by_bins_of_the_base_model(tmp_path, block_tokens, ties):
    """A token's bin is that of its entropy's lowest rank: 20 * (tokens of less entropy) // n."""
    rows = make_rows(8, ties=ties)
    other = rescored(rows, 9)
    a, b = (columns_of(tmp_path, n, r, block_tokens) for n, r in (("a", rows), ("b", other)))
    found = entropy_change(a, b)
    before, after = entropies_of(rows), entropies_of(other)
    of_row = numpy.repeat(range(len(rows)), [len(row["entropies"]) for row in rows])
    less = numpy.array([(before < value).sum() for value in before])
    bins = 20 * less // len(before)
    for i in range(20):
        inside = bins == i
        assert found.change.count[i] == inside.sum()
        if not inside.any():
            assert numpy.isnan(found.change.mean[i])
            continue
        change = (after - before)[inside]
        assert found.before.mean[i] == pytest.approx(before[inside].mean(), rel=1e-12)
        assert found.change.mean[i] == pytest.approx(change.mean(), rel=1e-9, abs=1e-12)
        assert found.change.standard_error[i] == pytest.approx(
            brute_error(change, of_row[inside]), rel=1e-6, abs=1e-12, nan_ok=True
        )
        low, high = found.edges[i], found.edges[i + 1]
        assert before[inside].max() <= high
        assert before[inside].min() > low or (i == 0 and before[inside].min() >= low)
    assert found.overall.mean[0] == pytest.approx((after - before).mean(), rel=1e-9)
    assert found.change.count.sum() == len(before)


def test_bins_of_different_entropies_have_a_twentieth_each(tmp_path):
    row = {"response_ids": [1] * 200, "entropies": [0.01 * i for i in range(200)]}
    a = columns_of(tmp_path, "a", [row])
    assert entropy_change(a, a).change.count.tolist() == [10] * 20
    assert entropy_change(a, a).change.mean.tolist() == [0.0] * 20


def test_fewer_tokens_than_bins(tmp_path):
    a = columns_of(tmp_path, "a", [{"response_ids": [1, 2, 3], "entropies": [0.3, 0.1, 0.2]}])
    filled = entropy_change(a, a).change.count.nonzero()[0].tolist()
    assert filled == [0, 6, 13]  # 20 * rank // 3


def test_other_responses_are_refused(tmp_path):
    a = columns_of(tmp_path, "a", make_rows(0))
    b = columns_of(tmp_path, "b", make_rows(1))
    for compare in (entropy_change, lambda a, b: overlap(a, b, 0.2, "batch")):
        with pytest.raises(UserError, match="not the response of"):
            compare(a, b)
