"""Two models on the same responses: positions that fork in both, and the change of entropy.

arXiv 2506.01939 measures both on its models: about 86.7% of the base model's top-20% positions are
still in the top 20% when training has converged, and the top bins' entropy changes most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy

from megafork.analysis.output import BLUE, GREY, Row, figure, rows_of, write_table
from megafork.analysis.scored import Scored, check_same_responses
from megafork.analysis.statistics import clustered_means, overall_mean

Scope = Literal["batch", "sequence"]
NUM_BINS = 20
BIN_PERCENT = 100 // NUM_BINS
_NAMED_POINTS = 10
"""At most as many have their numbers and steps written, as more would overlap."""


def overlap(base: Scored, model: Scored, rho: float, scope: Scope) -> Row:
    """Count the positions in the top rho of each model and of both: a row of overlap.csv.

    The threshold is the k-th largest entropy, k = ceil(rho n), of the file or of each response
    (then NaN in the row); ties at it are kept, as in training. `overlap` is |base and model| /
    |base|; `overlap_by_chance` is |model| / tokens, its value if the model's positions were
    anywhere. Raises UserError for other responses.
    """
    check_same_responses(base, model)
    (base_T, base_threshold), (model_T, model_threshold) = (
        _top(scored, rho, scope) for scored in (base, model)
    )
    num_base, num_model, num_both = (int(top.sum()) for top in (base_T, model_T, base_T & model_T))
    return {
        "overlap": num_both / num_base,
        "overlap_by_chance": num_model / base.num_tokens,
        "positions_base": num_base,
        "positions_model": num_model,
        "positions_both": num_both,
        "tokens": base.num_tokens,
        "threshold_base_nats": base_threshold,
        "threshold_model_nats": model_threshold,
    }


def _top(scored: Scored, rho: float, scope: Scope) -> tuple[numpy.ndarray, float]:
    """Positions at or above their threshold (bool [T]), and the file's threshold or NaN."""
    import torch

    from megafork.ops.top_fraction import top_k

    if scope == "batch":
        parts = [scored.entropy_T]
    else:
        responses = numpy.split(scored.entropy_T, scored.length_B.cumsum()[:-1])
        parts = [part_T for part_T in responses if len(part_T)]
    lengths = [len(part_T) for part_T in parts]
    ks = top_k(torch.tensor(lengths), rho).tolist()
    thresholds = [numpy.partition(p_T, -k)[-k] for p_T, k in zip(parts, ks, strict=True)]
    top_T = scored.entropy_T >= numpy.repeat(thresholds, lengths)
    return top_T, float(thresholds[0]) if scope == "batch" else float("nan")


def write_overlap(
    found: Sequence[tuple[str, Row]], base: str, rho: float, scope: Scope, folder: Path
) -> None:
    """Write overlap.csv, .json, .png: one row and one point for each (label, overlap's row)."""
    rows: list[Row] = [{"model": label, "step": step_of(label), **row} for label, row in found]
    about = {
        "base": base,
        "rho": rho,
        "scope": scope,
        "overlap_is": "positions of both / positions of the base; ties at a threshold are kept",
    }
    write_table(folder, "overlap", rows, about)
    steps = {row["step"] for row in rows}
    in_steps = None not in steps and len(steps) == len(rows)
    if in_steps:
        rows.sort(key=lambda row: row["step"])
    places = [row["step"] if in_steps else index for index, row in enumerate(rows)]
    shares = [100 * row["overlap"] for row in rows]
    with figure(folder / "overlap.png") as [axes]:
        axes.plot(places, shares, "o-", color=BLUE, label=f"with {base}")
        chance = [100 * row["overlap_by_chance"] for row in rows]
        axes.plot(places, chance, ":" if len(rows) > 1 else "o", color=GREY, label="by chance")
        if len(rows) <= _NAMED_POINTS:
            for place, share in zip(places, shares, strict=True):
                axes.annotate(
                    f"{share:.1f}", (place, share), (0, 7), textcoords="offset points", ha="center"
                )
        if not in_steps:
            axes.set_xticks(places, [row["model"] for row in rows])
        elif len(rows) <= _NAMED_POINTS:
            axes.set_xticks(places)
        if in_steps:
            axes.set_xlabel("training step")
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


def entropy_change(base: Scored, trained: Scored) -> tuple[list[Row], Row]:
    """Rows and description of change.csv: the change in 20 bins by rank of the base's entropy.

    Edge i is the base's ceil(i n / 20)-th smallest entropy; a bin is above its lower edge up to and
    with its upper edge, and the first has its lower edge too. Each bin has 5% of the tokens unless
    entropies are equal, which are never parted: a bin may then have more, the next ones fewer or
    none. Raises UserError for other responses.
    """
    check_same_responses(base, trained)
    n = base.num_tokens
    ranks = [max(-(-i * n // NUM_BINS) - 1, 0) for i in range(NUM_BINS + 1)]
    edges = numpy.partition(base.entropy_T, sorted(set(ranks)))[ranks]
    bin_T = numpy.searchsorted(edges[1:-1], base.entropy_T, side="left").astype(numpy.int8)
    change_T = trained.entropy_T.astype(numpy.float64) - base.entropy_T
    response_T = base.response_T()
    before = clustered_means(base.entropy_T, bin_T, response_T, NUM_BINS)
    change = clustered_means(change_T, bin_T, response_T, NUM_BINS)
    mean_change, mean_change_error = overall_mean(change_T, response_T)
    index = numpy.arange(NUM_BINS)
    rows = rows_of(
        bin=index + 1,
        from_percentile=index * BIN_PERCENT,
        to_percentile=(index + 1) * BIN_PERCENT,
        base_above_nats=edges[:-1],
        base_up_to_nats=edges[1:],
        tokens=change.count,
        mean_base_nats=before.mean,
        mean_change_nats=change.mean,
        standard_error_nats=change.standard_error,
    )
    about = {
        "tokens": n,
        "mean_change_nats": mean_change,
        "mean_change_standard_error_nats": mean_change_error,
        "bins_are": "of the base's entropy by rank; equal entropies are in one bin, so a bin may "
        "have more than 5% of the tokens and the next ones fewer or none",
        "standard_errors": "over responses; empty with fewer than two",
    }
    return rows, about


def write_change(rows: list[Row], about: Row, base: str, trained: str, folder: Path) -> None:
    """Write change.csv, .json, .png from what entropy_change found."""
    write_table(folder, "change", rows, {"base": base, "trained": trained, **about})
    filled = [row for row in rows if row["tokens"]]
    with figure(folder / "change.png") as [axes]:
        axes.bar(
            [row["from_percentile"] + BIN_PERCENT / 2 for row in filled],
            [row["mean_change_nats"] for row in filled],
            0.8 * BIN_PERCENT,
            yerr=numpy.nan_to_num([row["standard_error_nats"] for row in filled]),
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
            f"{trained} less {base}, on the same {about['tokens']:,} tokens, with standard errors",
            fontsize="medium",
        )
