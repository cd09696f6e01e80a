"""`megafork compare`: the page of several runs, and what is said of what cannot be compared."""

from __future__ import annotations

import re

import pytest

from megafork.errors import UserError
from megafork.metrics.side_by_side import write_comparison
from tests.helpers.commands import megafork
from tests.helpers.pages import make_run, metrics_row, read_page, write_rows


@pytest.fixture
def runs(tmp_path):
    """Two runs that differ in a setting, in one metric's values and in another's constant."""
    folders = []
    for i, name in enumerate(("<b>a$x", "_b$y")):
        folder = make_run(tmp_path / name, steps=3 + i, asked=3)
        (folder / "config.toml").write_text(
            f'[run]\ndir = "{i}"\n[training]\nsteps = 3\nlr = {i + 1}e-6\n[forking]\nrho = 0.2\n'
            + ('select = "random"\n' if i else "")
        )
        rows = [
            metrics_row(s, **{"grad_norm": s + i, "forking/rho": 0.2, "lr": 0.5 + i})
            for s in range(1, 4 + i)
        ]
        write_rows(folder / "metrics.jsonl", rows)
        folders.append(folder)
    return folders


def test_the_page_has_curves_of_all_runs_and_the_settings_that_differ(runs, tmp_path):
    page = read_page(write_comparison(runs, tmp_path / "page.html"))
    assert page.by_id("settings").cells() == [
        ["forking.select", "\u2013", "random"],
        ["training.lr", "1e-06", "2e-06"],
    ]
    results = {row[0]: row[1:] for row in page.by_id("results").cells()}
    assert results["State"] == ["finished: 3 of 3 steps", "finished: 4 of 3 steps"]
    assert results["Training accuracy"] == ["30.0% \u2192 50.0%", "30.0% \u2192 60.0%"]
    figures = {figure.all("h3")[0].text: figure for figure in page.all("figure")}
    assert "Tokens that are kept: rho" not in figures  # 0.2 everywhere
    assert "Learning rate: policy" in figures  # constant, but not the same
    norms = figures["Gradient norm: policy"]
    told = [[line.text for line in at.all("tspan")] for at in norms.of_class("at")]
    assert told == [
        ["step 1", "<b>a$x 1", "_b$y 2"],
        ["step 2", "<b>a$x 2", "_b$y 3"],
        ["step 3", "<b>a$x 3", "_b$y 4"],
        ["step 4", "_b$y 5"],
    ]
    legend = [text.text.strip() for text in norms.all("text")]
    assert {"<b>a$x", "_b$y"} <= set(legend)
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script|<b>a|https?://(?!www\.w3\.org)", text)
    assert "default-src 'none'" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / seed / "run") for seed in ("one", "two")]
    page = read_page(write_comparison(folders, tmp_path / "page.html"))
    head = [cell.text for cell in page.by_id("results").all("th")]
    assert head == ["", "one/run", "two/run"]
    assert page.by_id("settings").text == "None but run.dir."


def test_what_cannot_be_compared_is_told(runs, tmp_path):
    empty, damaged = tmp_path / "empty", make_run(tmp_path / "damaged")
    empty.mkdir()
    (empty / "config.toml").write_text("[training]\nsteps = 5\n")
    for second, cause in (
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path, "no run in this folder"),
        (empty, "empty: no step has ended yet, so there is nothing to compare"),
        (runs[0], "is given twice"),
    ):
        with pytest.raises(UserError, match=cause):
            write_comparison([runs[0], second], tmp_path / "page.html")
    for few_or_many in ([runs[0]], 9 * [runs[0]]):
        with pytest.raises(UserError, match="give 2 to 8 runs to compare; megafork report RUN"):
            write_comparison(few_or_many, tmp_path / "page.html")
    (damaged / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is damaged"):
        write_comparison([runs[0], damaged], tmp_path / "page.html")
    (runs[1] / "config.toml").write_text("[training\n")
    with pytest.raises(UserError, match=r"config\.toml is damaged"):
        write_comparison(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_where_it_is_told(runs, tmp_path):
    done = megafork("compare", *runs, "--output", tmp_path / "there.html")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "there.html")), done.stderr
    assert read_page(tmp_path / "there.html").all("h1")[0].text == "2 runs side by side"
    done = megafork("compare", runs[0])
    assert done.returncode == 2 and "give 2 to 8 runs" in done.stderr
