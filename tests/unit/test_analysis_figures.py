"""Tables and figures as the commands write them: what is drawn is what was computed."""

from __future__ import annotations

import csv
import json

import matplotlib.image
import numpy
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from typer.testing import CliRunner

from megafork.analysis.commands import analyze
from megafork.analysis.glyphs import Font, token_label
from megafork.analysis.tokens import rank_tokens, write_tokens
from megafork.errors import UserError
from megafork.system.printable import as_cell
from tests.helpers.commands import QUICKSTART
from tests.helpers.scored import entropies_of, make_rows, rescored, scored_of, write

CHARACTERS = 22
"""ids of the quickstart's tokenizer, the last one the blank"""


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open: {axes, in order} of each."""
    kept = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: kept.append(figure.axes))
    yield kept
    close("all")


@pytest.fixture
def scored(tmp_path):
    """Two files of scores of the same responses, in the quickstart's tokens."""
    rows = make_rows(0)
    for row in rows:
        row["response_ids"] = [i % CHARACTERS for i in row["response_ids"]]
    return [
        write(tmp_path / name, r)
        for name, r in (("base.jsonl", rows), ("step_30.jsonl", rescored(rows, 1)))
    ]


def run(*arguments):
    done = CliRunner().invoke(analyze, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


def table(path):
    """Rows of a CSV file, and of the JSON file beside it, which hold the same.

    But for text that a spreadsheet would take for a formula.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    document = json.loads(path.with_suffix(".json").read_text())
    for row, same in zip(rows, document["rows"], strict=True):
        assert row == {k: cell(v) for k, v in same.items()}
    return document["rows"], document


def cell(value):
    if isinstance(value, str):
        return as_cell(value)
    return "" if value is None else str(value)


def is_drawn(path):
    pixels = matplotlib.image.imread(path)
    return path.stat().st_size < 200_000 and (pixels[..., :3] < 0.9).any(axis=-1).mean() > 0.005


def entropies(path):
    return entropies_of([json.loads(line) for line in path.read_text().splitlines()])


def test_entropy(tmp_path, scored, figures):
    out = tmp_path / "new" / "out"
    run("entropy", scored[0], "--output", out)
    values = entropies(scored[0])
    percentiles, about = table(out / "entropy_percentiles.csv")
    assert percentiles[80]["entropy_nats"] == pytest.approx(numpy.quantile(values, 0.8))
    assert about["tokens"] == len(values)
    assert about["share_below_0.01_nats"] == (values < 0.01).mean()
    bins, _ = table(out / "entropy_histogram.csv")
    [[axes]] = figures
    assert [bar.get_height() for bar in axes.patches] == [row["tokens"] for row in bins]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(numpy.quantile(values, 0.8))
    assert axes.get_yscale() == "log"
    assert is_drawn(out / "entropy_histogram.png")
    assert sorted(p.suffix for p in out.iterdir()) == [".csv"] * 2 + [".json"] * 2 + [".png"]


def test_tokens(tmp_path, scored, figures):
    run(
        *("tokens", scored[0], "--model", QUICKSTART / "model", "--output", tmp_path),
        *("--min-count", 20, "--words", 5),
    )
    rows, about = table(tmp_path / "tokens.csv")
    assert about["highest"] == [row["token"] for row in rows][:5]
    assert about["not_drawn"] == []
    assert {"+", "=", "<eos>", "·"} <= {row["token"] for row in rows}
    (top, below), _ = figures
    half = -(-len(rows) // 2)
    assert [bar.get_width() for bar in top.patches] == [r["mean_entropy_nats"] for r in rows][:half]
    assert below.lines[0].get_xdata().tolist() == [r["mean_entropy_nats"] for r in rows][half:]
    assert is_drawn(tmp_path / "tokens.png") and is_drawn(tmp_path / "tokens_cloud.png")


def test_tokens_of_another_vocabulary(tmp_path, scored):
    rows = [{"response_ids": [3, 512], "entropies": [1.0, 2.0]}]
    path = write(tmp_path / "other.jsonl", rows)
    with pytest.raises(UserError, match=r"other\.jsonl, line 1: response_ids go from 3 to 512"):
        run("tokens", path, "--model", QUICKSTART / "model", "--output", tmp_path / "out")


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_overlap_of_several_steps(tmp_path, scored, figures, scope):
    lines = [json.loads(line) for line in scored[1].read_text().splitlines()]
    later = write(tmp_path / "step_40.jsonl", rescored(lines, 2))
    out = tmp_path / "out"
    run("overlap", *scored, later, "--output", out, "--rho", 0.3, "--scope", scope)
    rows, about = table(out / "overlap.csv")
    assert [(row["model"], row["step"]) for row in rows] == [("step_30", 30), ("step_40", 40)]
    for row in rows:
        assert row["overlap"] == row["positions_both"] / row["positions_base"]
    assert (about["base"], about["rho"], about["scope"]) == ("base", 0.3, scope)
    [[axes]] = figures
    curve, chance = axes.lines
    assert list(curve.get_xdata()) == [30, 40]
    assert list(curve.get_ydata()) == [100 * row["overlap"] for row in rows]
    assert list(chance.get_ydata()) == [100 * row["overlap_by_chance"] for row in rows]
    assert is_drawn(out / "overlap.png")


def test_many_steps_in_any_order_are_drawn_in_theirs(tmp_path, scored, figures):
    steps = [50, 10, 40, 20, 70, 30, 60, 110, 90, 80, 100]
    others = [tmp_path / f"step_{step}.jsonl" for step in steps]
    for path in others:
        path.write_bytes(scored[1].read_bytes())
    run("overlap", scored[0], *others, "--output", tmp_path / "out", "--rho", 0.125)
    [[axes]] = figures
    assert list(axes.lines[0].get_xdata()) == sorted(steps)
    assert len(axes.texts) == 0 and "top 12.5% by" in axes.get_title()


def test_change(tmp_path, scored, figures):
    run("change", *scored, "--output", tmp_path)
    rows, about = table(tmp_path / "change.csv")
    difference = entropies(scored[1]) - entropies(scored[0])
    assert about["mean_change_nats"] == pytest.approx(difference.mean())
    filled = [row for row in rows if row["tokens"]]
    assert 10 < len(filled) < 20  # zeros are in one bin
    [[axes]] = figures
    bars = {round(b.get_x() + b.get_width() / 2, 6): b.get_height() for b in axes.patches}
    assert bars == {5 * row["bin"] - 2.5: row["mean_change_nats"] for row in filled}
    assert is_drawn(tmp_path / "change.png")


def test_training(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self.axes) or savefig(self, *a, **k)
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "entropy/p80": 0.5, "entropy/threshold": null, "reward/accuracy": 0.1}\n'
        '{"step": 2, "entropy/p80": 0.4, "entropy/threshold": 0.3, "reward/accuracy": 0.2}\n'
        '{"step": 3, "entropy/p80"'  # a crash
    )
    (tmp_path / "eval.jsonl").write_text('{"step": 0, "eval/accuracy": 0.05}\n')
    run("training", tmp_path, "--output", tmp_path / "out")
    rows, _ = table(tmp_path / "out" / "training.csv")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["entropy_p80_nats"] for row in rows] == [None, 0.5, 0.4]
    assert [row["held_out_accuracy"] for row in rows] == [0.05, None, None]
    [(accuracy, entropy)] = figures  # a chart without a value is left out
    drawn = {
        line.get_label(): [
            x for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if y == y
        ]
        for line in entropy.lines + accuracy.lines
    }
    assert drawn["threshold"] == [2]
    assert drawn["80th percentile"] == [1, 2]
    assert drawn["held-out prompts"] == [0]
    assert is_drawn(tmp_path / "out" / "training.png")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl with a step"):
        run("training", tmp_path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is damaged"):
        run("training", tmp_path, "--output", tmp_path / "out")


@pytest.mark.parametrize("rho", [0, 1.5])
def test_a_rho_that_is_no_fraction(tmp_path, scored, rho):
    with pytest.raises(UserError, match=f"--rho={rho:g}"):
        run("overlap", *scored, "--output", tmp_path / "out", "--rho", rho)


def test_nothing_is_left_where_a_file_is_bad(tmp_path, scored):
    scored[1].write_text(scored[1].read_text() + "{\n")
    with pytest.raises(UserError, match=r"step_30\.jsonl, line 61"):
        run("change", *scored, "--output", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" the", "·the"),
        ("\n\n", "\\n\\n"),
        ("\\n", "\\\\n"),
        ("\t", "\\t"),
        ("\x00", "\\x00"),
        ("\u200b", "\\u200b"),
        ("\u3000", "\\u3000"),
        ("\U000e0001", "\\U000e0001"),
        ("", "<7>"),
        ("�", "<7>"),
        ("因为", "因为"),
        ("x" * 30, "x" * 11 + "…"),
    ],
)
def test_labels_can_be_seen(text, label):
    assert token_label(7, text, 12) == label


def test_what_the_font_lacks_is_told(tmp_path, figures):
    """DejaVu Sans has Cyrillic and no Chinese letters; two tokens of one text are told apart."""
    names = ["ведь", "因为", "$x$", "same", "same", ""]
    ids = [i for i in range(len(names)) for _ in range(3)]
    rows = [{"response_ids": ids, "entropies": [0.1 * (i + 1) for i in ids]}] * 2
    found = rank_tokens(scored_of(tmp_path, "a", rows), len(names), names.__getitem__, 1, 1)
    assert [row["token"] for row in found.rows] == [
        "<5>",
        "same #4",
        "same #3",
        "$x$",
        "因为",
        "ведь",
    ]
    write_tokens(found, "a", tmp_path, "tokens", num_words=10, font=Font())
    assert json.loads((tmp_path / "tokens.json").read_text())["not_drawn"] == ["因为"]
    (_, below), (cloud, _) = figures
    ticks = [label.get_text() for label in below.get_yticklabels()]
    assert ticks == ["$x$  (6)", "\\u56e0\\u4e3a  (6)", "ведь  (6)"]
    assert "1 that the font lacks are left out" in cloud.figure.get_suptitle()


def test_a_file_that_is_no_font(tmp_path):
    (tmp_path / "a.ttf").write_text("no font")
    with pytest.raises(UserError, match=r"--font .*a\.ttf cannot be read"):
        Font(tmp_path / "a.ttf")
