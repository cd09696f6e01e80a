"""Draw the pictures of docs/concepts.md into docs/concepts/.

    .venv/bin/python tools/draw_concepts.py RUN

RUN is a run of the quickstart: its curves, and the entropies of responses that it kept in
samples.jsonl, are real. The diagrams of who scores when, of denominators and of layouts are drawn
from their definitions.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import msgspec

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from megafork.metrics.palette import CURVES, SHADES, shade_of

OUTPUT = Path(__file__).parents[1] / "docs" / "concepts"
BLUE, ORANGE, GREEN, PURPLE = CURVES[:4]
QUIET, INK = "#565c66", "#1a1c1f"
RHO = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run of the quickstart")
    run = parser.parse_args().run
    OUTPUT.mkdir(exist_ok=True)
    responses = [msgspec.json.decode(line) for line in (run / "samples.jsonl").open()]
    first = [row for row in responses if row["step"] == responses[0]["step"]]
    shutil.copy(run / "curves.png", OUTPUT / "quickstart_curves.png")
    save(draw_responses(first), "forking_tokens.png")
    save(draw_scopes(first), "threshold_scope.png")
    save(draw_whose_entropy(), "whose_entropy.png")
    save(draw_denominators(), "denominators.png")
    save(draw_layouts(), "layouts.png")


def save(figure: Figure, name: str) -> None:
    figure.savefig(OUTPUT / name, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure whose axes have no frame, with one data unit to the inch, y downwards."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def draw_responses(responses: list[dict[str, Any]]) -> Figure:
    """Each token in a box with the shade of its entropy; the selected ones have a frame."""
    figure, axes = blank(10, 0.85 + 0.75 * len(responses))
    axes.text(0.1, 0.3, "shade: entropy in nats (number below).  frame: selected", color=QUIET)
    for i, row in enumerate(responses):
        top = 0.6 + 0.75 * i
        axes.text(0.1, top + 0.28, row["prompt"], va="center", family="monospace", color=INK)
        tokens = zip(row["text"], row["entropies"], row["selected"], strict=True)
        for j, (text, entropy, is_selected) in enumerate(tokens):
            left = 1.75 + 0.42 * j
            shade = shade_of(entropy)
            axes.add_patch(
                Rectangle(
                    (left, top),
                    0.38,
                    0.36,
                    facecolor=SHADES["light"][shade - 1] if shade else "#f5f6f8",
                    edgecolor=INK if is_selected else "#f5f6f8",
                    linewidth=2 if is_selected else 0,
                )
            )
            name = "end" if text.startswith("<") else text
            size = 9 if name == "end" else 13
            axes.text(left + 0.19, top + 0.19, name, ha="center", va="center", fontsize=size)
            axes.text(
                left + 0.19, top + 0.5, f"{entropy:.2f}", ha="center", fontsize=7, color=QUIET
            )
    return figure


def threshold(entropies: list[float]) -> float:
    """The k-th largest, k = ceil(rho n)."""
    return sorted(entropies, reverse=True)[math.ceil(RHO * len(entropies) - 1e-9) - 1]


def draw_scopes(responses: list[dict[str, Any]]) -> Figure:
    """The same tokens three times: which are kept by thresholds over all, two, or one response."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True)
    for axes, size, title in zip(
        panels,
        (len(responses), 2, 1),
        ("one threshold for all\n(scope = minibatch)", "one for every micro-batch\n(elsewhere)",
         "one for every response\n(scope = sequence)"),
        strict=True,
    ):  # fmt: skip
        kept = 0
        for start in range(0, len(responses), size):
            part = responses[start : start + size]
            tau = threshold([h for row in part for h in row["entropies"]])
            axes.hlines(tau, start - 0.4, start + size - 0.6, color=ORANGE, linewidth=2)
            for i, row in enumerate(part, start):
                n = len(row["entropies"])
                x = [i + 0.6 * (j / (n - 1) - 0.5) for j in range(n)]
                above = [h >= tau for h in row["entropies"]]
                kept += sum(above)
                colors = [BLUE if a else "#c9ced6" for a in above]
                axes.scatter(x, row["entropies"], c=colors, s=22)
                axes.text(i, 1.68, f"{sum(above)} of {n}", ha="center", fontsize=9, color=BLUE)
        axes.set(title=title, ylim=(-0.06, 1.8), xticks=range(len(responses)))
        axes.set_xticklabels([f"response {i + 1}" for i in range(len(responses))], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("entropy (nats)")
    figure.tight_layout()
    return figure


def box(axes: Axes, left: float, top: float, width: float, text: str, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, top), width, 0.5, boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=color + "22", edgecolor=color, linewidth=1.5,
        )
    )  # fmt: skip
    axes.text(left + width / 2, top + 0.26, text, ha="center", va="center", fontsize=10)


def draw_whose_entropy() -> Figure:
    """A batch from its generation to its last update, and where the entropies come from."""
    figure, axes = blank(10, 2.9)
    for top, title, extra in (
        (0.35, "entropy_of = old", False),
        (1.75, "entropy_of = current", True),
    ):
        axes.text(0.1, top - 0.08, title, fontsize=11, color=INK, weight="bold")
        box(axes, 0.1, top + 0.1, 1.3, "generate", QUIET)
        box(axes, 1.55, top + 0.1, 1.5, "score all", GREEN)
        left = 3.2
        for i in range(1, 4):
            if extra and i > 1:
                box(axes, left, top + 0.1, 0.95, f"score {i}", GREEN)
                left += 1.05
            box(axes, left, top + 0.1, 1.15, f"update {i}", BLUE)
            source = f"entropies of\npolicy {i - 1 if extra else 0}"
            axes.text(left + 0.57, top + 0.83, source, ha="center", va="center", fontsize=8,
                      color=ORANGE if extra and i > 1 else QUIET)  # fmt: skip
            left += 1.3
    return figure


def draw_denominators() -> Figure:
    """The weight of a token in a mini-batch of a response of 3 tokens and one of 9."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 2.7), sharey=True)
    lengths, longest = (3, 9), 12
    names = ("tokens\n(DAPO)", "sequence_tokens\n(GRPO)", "max_response_tokens\n(Dr. GRPO)")
    weights = (
        [1 / sum(lengths)] * 2,
        [1 / (len(lengths) * n) for n in lengths],
        [1 / (len(lengths) * longest)] * 2,
    )
    for axes, name, (short, long) in zip(panels, names, weights, strict=True):
        axes.bar(range(3), [short] * 3, color=BLUE, label="a response of 3 tokens")
        axes.bar(range(4, 13), [long] * 9, color=PURPLE, label="a response of 9 tokens")
        axes.set(title=name, xticks=[])
        axes.spines[["top", "right"]].set_visible(False)
        for x, weight in ((1, short), (8, long)):
            axes.text(x, weight + 0.004, f"1/{round(1 / weight)}", ha="center", fontsize=10)
    panels[0].set(ylabel="weight of a token", ylim=(0, 0.19))
    panels[2].legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout()
    return figure


def draw_layouts() -> Figure:
    """Sixteen ranks as tp=4, pp=2: what each holds, and who sums with whom."""
    figure, axes = blank(10, 3.7)
    for rank in range(16):
        tp, dp, pp = rank % 4, rank // 4 % 2, rank // 8
        left, top = 0.25 + 1.1 * tp + 4.95 * dp, 0.75 + 1.25 * pp
        color = (BLUE, ORANGE)[pp]
        axes.add_patch(
            Rectangle(
                (left, top), 1.0, 0.85, facecolor=color + "22", edgecolor=color, linewidth=1.5
            )
        )
        axes.text(left + 0.5, top + 0.25, f"rank {rank}", ha="center", va="center", fontsize=10)
        part = f"{'lower' if pp == 0 else 'upper'} layers\nshard {tp + 1} of 4"
        axes.text(left + 0.5, top + 0.58, part, ha="center", va="center", fontsize=8, color=QUIET)
    for dp in range(2):
        middle = 2.4 + 4.95 * dp
        axes.text(middle, 0.35, f"replica {dp + 1} (dp): half of the responses", ha="center")
        axes.annotate("", (middle, 2.0), (middle, 1.6), arrowprops={"arrowstyle": "->"})
        axes.text(middle + 0.1, 1.83, "activations (pp)", fontsize=8, color=QUIET, va="center")
    for top, text in (
        (3.1, "one row of four (tp): sums over the vocabulary; all four have the same entropies"),
        (3.4, "the upper layers of both replicas: the exact threshold; all ranks: one denominator"),
    ):
        axes.text(0.25, top, text, fontsize=9, color=INK)
    return figure


if __name__ == "__main__":
    main()
