"""Distribution of the entropy over response tokens (arXiv 2506.01939, figure 2a)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy

from megafork.analysis.output import BLUE, ORANGE, Row, figure, rows_of, write_table
from megafork.analysis.scored import Scored
from megafork.analysis.statistics import overall_mean

BIN_NATS = 0.05
NEAR_ZERO_NATS = 0.01
_FORKING = 80


@dataclass(frozen=True)
class EntropyTables:
    """Tables over all response tokens of a file."""

    about: Row
    percentiles: list[Row]
    """of 0 to 100, linear between two order statistics; 0 and 100 are the extremes"""
    histogram: list[Row]
    """bins of BIN_NATS; a bin lacks its upper edge, but the last one has it"""

    @property
    def p80(self) -> float:
        """80th percentile, in nats"""
        return self.percentiles[_FORKING]["entropy_nats"]


def entropy_tables(scored: Scored) -> EntropyTables:
    """The exact percentiles, the histogram, and the mean with its standard error over responses."""
    mean, error = overall_mean(scored.entropy_T, scored.response_T())
    entropy_T = scored.entropy_T.astype(numpy.float64)
    near_zero = int((entropy_T < NEAR_ZERO_NATS).sum())
    percentile_at = numpy.arange(101) / 100
    percentiles = numpy.quantile(entropy_T, percentile_at, overwrite_input=True).tolist()
    top = float(entropy_T[entropy_T >= percentiles[_FORKING]].sum())
    total = mean * scored.num_tokens
    num_bins = max(1, int(numpy.ceil(percentiles[100] / BIN_NATS)))
    edges = numpy.linspace(0.0, num_bins * BIN_NATS, num_bins + 1)
    edges[0] = min(0.0, percentiles[0])  # rounding may leave an entropy a little below 0
    counts = numpy.histogram(entropy_T, edges)[0]
    about = {
        "responses": len(scored.length_B),
        "tokens": scored.num_tokens,
        "mean_nats": mean,
        "mean_standard_error_nats": error,
        f"share_below_{NEAR_ZERO_NATS:g}_nats": near_zero / scored.num_tokens,
        "share_of_entropy_at_or_above_p80": top / total if total > 0 else float("nan"),
        "percentiles_are": "exact, linear between two order statistics",
        "standard_errors": "over responses",
    }
    rows = rows_of(percentile=range(101), entropy_nats=percentiles)
    left = numpy.arange(num_bins)
    bins = rows_of(
        from_nats=(left * BIN_NATS).round(6),
        to_nats=((left + 1) * BIN_NATS).round(6),
        tokens=counts,
        share=counts / scored.num_tokens,
    )
    return EntropyTables(about, rows, bins)


def write_entropy(found: EntropyTables, source: str, folder: Path, name: str) -> None:
    """Write NAME_percentiles.csv, NAME_histogram.csv, both as JSON, and NAME_histogram.png."""
    about = {"source": source, **found.about}
    write_table(folder, f"{name}_percentiles", found.percentiles, about)
    write_table(folder, f"{name}_histogram", found.histogram, about)
    near_zero = about[f"share_below_{NEAR_ZERO_NATS:g}_nats"]
    with figure(folder / f"{name}_histogram.png") as [axes]:
        left = numpy.arange(len(found.histogram)) * BIN_NATS
        counts = [row["tokens"] for row in found.histogram]
        axes.bar(left, counts, BIN_NATS, align="edge", color=BLUE, linewidth=0)
        p80 = f"80th percentile: {found.p80:.3g} nats"
        axes.axvline(found.p80, color=ORANGE, linestyle="--", label=p80)
        axes.plot([], [], " ", label=f"{near_zero:.1%} of the tokens below {NEAR_ZERO_NATS:g} nats")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.set_xlim(left=0.0)
        axes.set_xlabel("entropy of the token's distribution (nats)")
        axes.set_ylabel(f"response tokens per {BIN_NATS:g} nats")
        axes.set_title(f"{source}: {about['tokens']:,} tokens", fontsize="medium")
        axes.legend(frameon=False)
