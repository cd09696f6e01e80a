"""How entropy is spread over response tokens (arXiv 2506.01939, figure 2a)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy

from megafork.analysis.columns import Columns
from megafork.analysis.means import ClusteredMeans
from megafork.analysis.order import quantiles
from megafork.analysis.output import BLUE, ORANGE, figure, write_table

PERCENTILES = range(1, 100)
BIN_NATS = 0.05
NEAR_ZERO_NATS = 0.01
_FORKING = 80


@dataclass(frozen=True)
class EntropyStatistics:
    """Of all response tokens of a file; entropies in nats."""

    num_responses: int
    num_tokens: int
    mean: float
    standard_error: float
    below_near_zero: float
    """share of the tokens with less than NEAR_ZERO_NATS"""
    top_share: float
    """share of all entropy that tokens at or above the 80th percentile hold"""
    percentiles: dict[int, float]
    """linear between two order statistics, as numpy.quantile; 0 and 100 are the extremes"""
    counts: list[int]
    """tokens in [i, i + 1) * BIN_NATS; the last bin has its upper edge too"""


def entropy_statistics(columns: Columns) -> EntropyStatistics:
    """Exact: three passes over the columns."""
    wanted = [0, *PERCENTILES, 100]
    found = quantiles(columns.entropies, columns.num_tokens, [p / 100 for p in wanted])
    percentiles = dict(zip(wanted, found.tolist(), strict=True))
    num_bins = max(1, int(numpy.ceil(percentiles[100] / BIN_NATS)))
    counts = numpy.zeros(num_bins, numpy.int64)
    means = ClusteredMeans(1)
    near_zero, top = 0, 0.0
    for block in columns.blocks():
        entropy_T = block.entropy_T.astype(numpy.float64)
        means.add(entropy_T, numpy.zeros(len(entropy_T), numpy.int64), block.row_T)
        near_zero += int((entropy_T < NEAR_ZERO_NATS).sum())
        top += float(entropy_T[entropy_T >= percentiles[_FORKING]].sum())
        # Rounding may leave an entropy a little below 0.
        counts += numpy.histogram(
            entropy_T.clip(min=0.0), num_bins, range=(0.0, num_bins * BIN_NATS)
        )[0]
    mean, total = float(means.mean[0]), float(means.mean[0]) * columns.num_tokens
    return EntropyStatistics(
        num_responses=columns.num_rows,
        num_tokens=columns.num_tokens,
        mean=mean,
        standard_error=float(means.standard_error[0]),
        below_near_zero=near_zero / columns.num_tokens,
        top_share=top / total if total > 0 else float("nan"),
        percentiles=percentiles,
        counts=counts.tolist(),
    )


def write_entropy(found: EntropyStatistics, source: str, folder: Path, name: str) -> None:
    """NAME_percentiles.csv, NAME_histogram.csv, both as JSON, and NAME_histogram.png."""
    about = {
        "source": source,
        "responses": found.num_responses,
        "tokens": found.num_tokens,
        "mean_nats": found.mean,
        "mean_standard_error_nats": found.standard_error,
        f"share_below_{NEAR_ZERO_NATS:g}_nats": found.below_near_zero,
        "share_of_entropy_at_or_above_p80": found.top_share,
        "percentiles_are": "exact, linear between two order statistics",
        "standard_errors": "over responses",
    }
    rows = [{"percentile": p, "entropy_nats": value} for p, value in found.percentiles.items()]
    write_table(folder, f"{name}_percentiles", rows, about)
    bins = [
        {
            "from_nats": round(i * BIN_NATS, 6),
            "to_nats": round((i + 1) * BIN_NATS, 6),
            "tokens": count,
            "share": count / found.num_tokens,
        }
        for i, count in enumerate(found.counts)
    ]
    write_table(folder, f"{name}_histogram", bins, about)
    _draw(found, source, folder / f"{name}_histogram.png")


def _draw(found: EntropyStatistics, source: str, path: Path) -> None:
    p80 = found.percentiles[_FORKING]
    with figure(path) as [axes]:
        left = numpy.arange(len(found.counts)) * BIN_NATS
        axes.bar(left, found.counts, BIN_NATS, align="edge", color=BLUE, linewidth=0)
        axes.axvline(p80, color=ORANGE, linestyle="--", label=f"80th percentile: {p80:.3g} nats")
        axes.plot(
            [],
            [],
            " ",
            label=f"{found.below_near_zero:.1%} of the tokens below {NEAR_ZERO_NATS:g} nats",
        )
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.set_xlim(left=0.0)
        axes.set_xlabel("entropy of the token's distribution (nats)")
        axes.set_ylabel(f"response tokens per {BIN_NATS:g} nats")
        axes.set_title(f"{source}: {found.num_tokens:,} tokens", fontsize="medium")
        axes.legend(frameon=False)
