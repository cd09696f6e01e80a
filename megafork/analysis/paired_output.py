"""Tables and figures of two models on the same responses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy

from megafork.analysis.output import BLUE, GREY, figure, write_table
from megafork.analysis.pairs import NUM_BINS, Change, Overlap, Scope

_NAMED_POINTS = 10
"""Of more, numbers and steps would be written over one another."""


def write_overlap(
    found: Sequence[tuple[str, Overlap]], base: str, rho: float, scope: Scope, folder: Path
) -> None:
    """overlap.csv, .json, .png: one row and one point for each (label, Overlap), in their order."""
    rows = [
        {
            "model": label,
            "step": step_of(label),
            "overlap": one.overlap,
            "overlap_by_chance": one.by_chance,
            "positions_base": one.num_a,
            "positions_model": one.num_b,
            "positions_both": one.num_both,
            "tokens": one.num_tokens,
            "threshold_base_nats": one.threshold_a,
            "threshold_model_nats": one.threshold_b,
        }
        for label, one in found
    ]
    about = {
        "base": base,
        "rho": rho,
        "scope": scope,
        "overlap_is": "positions of both / positions of the base; ties at a threshold are kept",
    }
    write_table(folder, "overlap", rows, about)
    steps = [step for label, _ in found if (step := step_of(label)) is not None]
    in_steps = len(set(steps)) == len(found)
    places = steps if in_steps else list(range(len(found)))
    points = sorted(zip(places, (one for _, one in found), strict=True), key=lambda point: point[0])
    with figure(folder / "overlap.png") as [axes]:
        places = [place for place, _ in points]
        shares = [100 * one.overlap for _, one in points]
        axes.plot(places, shares, "o-", color=BLUE, label=f"with {base}")
        axes.plot(
            places, [100 * one.by_chance for _, one in points], ":", color=GREY, label="by chance"
        )
        has_room = len(points) <= _NAMED_POINTS
        for place, share in zip(places, shares, strict=True) if has_room else ():
            axes.annotate(
                f"{share:.1f}", (place, share), (0, 7), textcoords="offset points", ha="center"
            )
        if in_steps:
            axes.set_xlabel("training step")
            if has_room:
                axes.set_xticks(places)
        else:
            axes.set_xticks(places, [label for label, _ in found])
        axes.margins(x=0.15)
        axes.set_ylim(0, 108)
        axes.set_ylabel("overlap of positions (%)")
        axes.set_title(
            f"Positions in the top {100 * rho:g}% by entropy, thresholds by {scope}",
            fontsize="medium",
        )
        axes.legend(frameon=False, loc="lower left")


def step_of(label: str) -> int | None:
    """The last number in a file's name: 30 for scored_step_000030."""
    numbers = re.findall(r"\d+", label)
    return int(numbers[-1]) if numbers else None


def write_change(found: Change, base: str, trained: str, folder: Path) -> None:
    """change.csv, .json, .png"""
    width = 100 // NUM_BINS
    rows = [
        {
            "bin": i + 1,
            "from_percentile": i * width,
            "to_percentile": (i + 1) * width,
            "base_above_nats": found.edges[i],
            "base_up_to_nats": found.edges[i + 1],
            "tokens": int(found.change.count[i]),
            "mean_base_nats": float(found.before.mean[i]),
            "mean_change_nats": float(found.change.mean[i]),
            "standard_error_nats": float(found.change.standard_error[i]),
        }
        for i in range(NUM_BINS)
    ]
    about = {
        "base": base,
        "trained": trained,
        "tokens": int(found.overall.count[0]),
        "mean_change_nats": float(found.overall.mean[0]),
        "mean_change_standard_error_nats": float(found.overall.standard_error[0]),
        "bins_are": "of the base's entropy by rank; equal entropies are in one bin, so a bin may "
        "have more than 5% of the tokens and the next ones fewer or none",
        "standard_errors": "over responses; empty with fewer than two",
    }
    write_table(folder, "change", rows, about)
    with figure(folder / "change.png") as [axes]:
        filled = found.change.count > 0
        middle = (numpy.arange(NUM_BINS) + 0.5) * width
        errors = numpy.nan_to_num(found.change.standard_error)
        axes.bar(
            middle[filled],
            found.change.mean[filled],
            0.8 * width,
            yerr=errors[filled],
            color=BLUE,
            ecolor="black",
            capsize=2,
        )
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xlim(0, 100)
        axes.set_xticks(range(0, 101, 10))
        axes.set_xlabel(f"percentile of the token's entropy under {base}")
        axes.set_ylabel("mean change of entropy (nats)")
        axes.set_title(
            f"{trained} less {base}, on the same {int(found.overall.count[0]):,} tokens, with "
            "standard errors",
            fontsize="medium",
        )
