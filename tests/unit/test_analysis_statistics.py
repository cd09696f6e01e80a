"""Statistics of one file against numpy over all of its numbers at once, with ties."""

from __future__ import annotations

import numpy
import pytest

from megafork.analysis.entropy import BIN_NATS, entropy_tables
from megafork.analysis.statistics import clustered_means
from megafork.analysis.tokens import rank_tokens
from megafork.errors import UserError
from tests.helpers.scored import VOCAB, brute_error, entropies_of, make_rows, scored_of


@pytest.mark.parametrize("num_cells", [1, 3, 500])
def test_means_and_errors_of_cells(num_cells):
    random = numpy.random.default_rng(5)
    rows = numpy.sort(random.integers(0, 40, 600))
    cells = random.integers(0, num_cells, 600) // 2 * 2  # odd ones stay empty
    values = random.exponential(1, 600) + rows % 5
    means = clustered_means(values, cells, rows, num_cells)
    for cell in range(num_cells):
        inside = cells == cell
        assert means.count[cell] == inside.sum()
        assert means.num_responses[cell] == len(numpy.unique(rows[inside]))
        if not inside.any():
            assert numpy.isnan(means.mean[cell]) and numpy.isnan(means.standard_error[cell])
            continue
        assert means.mean[cell] == pytest.approx(values[inside].mean(), rel=1e-12)
        assert means.standard_error[cell] == pytest.approx(
            brute_error(values[inside], rows[inside]), rel=1e-9, nan_ok=True
        )


def test_with_one_token_a_response_it_is_the_usual_standard_error():
    values = numpy.random.default_rng(0).normal(2, 1, 50)
    means = clustered_means(values, numpy.zeros(50, numpy.int64), numpy.arange(50), 1)
    assert means.standard_error[0] == pytest.approx(values.std(ddof=1) / 50**0.5, rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_entropy_tables(tmp_path, ties):
    rows = make_rows(2, ties=ties)
    found = entropy_tables(scored_of(tmp_path, "a", rows))
    values = entropies_of(rows)
    of_row = numpy.repeat(range(len(rows)), [len(row["entropies"]) for row in rows])
    about, p80 = found.about, numpy.quantile(values, 0.8)
    assert (about["responses"], about["tokens"]) == (len(rows), len(values))
    assert about["mean_nats"] == pytest.approx(values.mean(), rel=1e-12)
    error = brute_error(values, of_row)
    assert about["mean_standard_error_nats"] == pytest.approx(error, rel=1e-9)
    assert about["share_below_0.01_nats"] == (values < 0.01).mean()
    top_share = values[values >= p80].sum() / values.sum()
    assert about["share_of_entropy_at_or_above_p80"] == pytest.approx(top_share, rel=1e-12)
    assert [row["percentile"] for row in found.percentiles] == list(range(101))
    for row in found.percentiles:
        expected = numpy.quantile(values, row["percentile"] / 100)
        assert row["entropy_nats"] == pytest.approx(expected, rel=1e-12)
    assert found.p80 == pytest.approx(p80, rel=1e-12)
    counts = [row["tokens"] for row in found.histogram]
    edges = numpy.arange(len(counts) + 1) * BIN_NATS
    assert counts == numpy.histogram(values, edges)[0].tolist()
    assert sum(counts) == len(values)


def tables_of(tmp_path, entropies):
    """(tables, counts of the histogram) of one response"""
    row = {"response_ids": [1] * len(entropies), "entropies": entropies}
    found = entropy_tables(scored_of(tmp_path, "a", [row]))
    return found, [row["tokens"] for row in found.histogram]


def test_entropies_that_rounding_left_below_zero_are_counted_at_zero(tmp_path):
    found, counts = tables_of(tmp_path, [-1e-7, 0.0, 0.02])
    assert counts == [3]
    assert found.percentiles[0]["entropy_nats"] == pytest.approx(-1e-7)
    assert numpy.isnan(found.about["mean_standard_error_nats"])


def test_a_model_that_is_sure_of_everything(tmp_path):
    found, counts = tables_of(tmp_path, [0.0, 0.0])
    assert counts == [2]
    assert found.about["share_below_0.01_nats"] == 1.0
    assert found.percentiles[99]["entropy_nats"] == 0.0
    assert numpy.isnan(found.about["share_of_entropy_at_or_above_p80"])


@pytest.mark.parametrize(("min_count", "min_responses"), [(1, 1), (38, 1), (1, 28)])
def test_tokens_by_mean_entropy(tmp_path, min_count, min_responses):
    rows = make_rows(4)
    scored = scored_of(tmp_path, "a", rows)
    found = rank_tokens(scored, VOCAB, lambda i: f" w{i}", min_count, min_responses)
    values = entropies_of(rows)
    ids = numpy.array([i for row in rows for i in row["response_ids"]])
    of_row = numpy.repeat(range(len(rows)), [len(row["entropies"]) for row in rows])
    spread = {i: len(numpy.unique(of_row[ids == i])) for i in range(VOCAB)}
    often = [i for i in range(VOCAB) if (ids == i).sum() >= min_count]
    expected = [i for i in often if spread[i] >= min_responses]
    expected.sort(key=lambda i: -values[ids == i].mean())
    assert len(expected) > 1 and (min_count == min_responses == 1 or len(expected) < VOCAB)
    assert [row["id"] for row in found.rows] == expected
    assert [row["rank"] for row in found.rows] == list(range(1, len(expected) + 1))
    for row in found.rows:
        inside = ids == row["id"]
        assert (row["count"], row["token"]) == (inside.sum(), f"·w{row['id']}")
        assert row["responses"] == len(numpy.unique(of_row[inside]))
        assert row["mean_entropy_nats"] == pytest.approx(values[inside].mean(), rel=1e-12)
        assert row["standard_error_nats"] == pytest.approx(
            brute_error(values[inside], of_row[inside]), rel=1e-8
        )
    half = -(-len(expected) // 2)
    assert [row["id"] for row in found.highest(100)] == expected[:half]
    assert [row["id"] for row in found.lowest(100)] == expected[half:][::-1]
    assert [row["id"] for row in found.lowest(2)] == expected[::-1][:2]


def test_tokens_that_are_too_rare_are_told(tmp_path):
    scored = scored_of(tmp_path, "a", [{"response_ids": [1, 1, 2], "entropies": [1, 2, 3]}])
    with pytest.raises(UserError, match=r"--min-count=3 .*\(the most frequent 2 times"):
        rank_tokens(scored, VOCAB, str, 3, 1)
    with pytest.raises(UserError, match=r"--min-responses=2: .*most widespread in 1 responses"):
        rank_tokens(scored, VOCAB, str, 1, 2)
