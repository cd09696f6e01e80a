"""RUN/report.html as a browser reads it: what it shows, what it does not do, what it copes with."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from megafork.controller.run_log import RunLog
from megafork.errors import UserError
from megafork.metrics import palette
from megafork.metrics.page import duration, write_report
from megafork.metrics.shaded_tokens import sampled_steps, visible
from tests.helpers.commands import megafork
from tests.helpers.pages import (
    Element,
    make_run,
    metrics_row,
    read_page,
    response,
    token_row,
    write_rows,
)
from tools.benchmarks.configs import learner_config

HOSTILE = {
    "</script><script>alert(1)</script>": None,
    "<img src=x onerror=alert(1)>": None,
    '"><svg/onload=alert(1)>': None,
    "</span></div></main><style>*{display:none}</style>": None,
    "' onmouseover='alert(1)": None,
    "<!-- ": None,
    "]]>": None,
    "&lt;b&gt; &amp; &#60;": None,
    "{{ run }}{% raw %}": None,
    "javascript:alert(1)//https://example.org": None,
    "\n": "↵\n",
    ".\n\n": ".↵\n↵\n",
    "\r": "␍",
    "\t": "⇥\t",
    " ": "·",
    "   ": "···",
    " the": " the",
    "": "∅",
    "\u202eabc": "⟨U+202E⟩abc",
    "\u200b": "⟨U+200B⟩",
    "\x00\x1b": "⟨U+0000⟩⟨U+001B⟩",
    "\ufffd": "\ufffd",
    "漢字é": "漢字é",
    "\U0001f600": "\U0001f600",
}
"""Tokens, and what a reader sees of them where it is not the token itself."""
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "dl", "dt"),
    *("dd", "div", "small", "strong", "details", "summary", "ul", "li", "code", "pre", "table"),
    *("caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "span", "mark"),
    *("article",),
}


def page_of(run_dir: Path) -> Element:
    return read_page(write_report(run_dir))


def tokens_of(article: Element) -> list[Element]:
    [box] = article.of_class("response")
    assert all(isinstance(child, Element) for child in box.children)  # no text between tokens
    return box.children


def drawn(page: Element) -> dict[str, Element]:
    """The charts by title."""
    return {figure.all("h3")[0].text: figure for figure in page.all("figure")}


@pytest.fixture
def hostile(tmp_path):
    """A run whose every text is an attack."""
    run_dir = make_run(tmp_path / "<img src=x onerror=alert(1)>")
    attack = "</pre></details><script>alert(1)</script><a href=https://example.org>"
    (run_dir / "config.toml").write_text(f"[training]\nsteps = 3\n# {attack}\n")
    rows = [response(1, 9, list(HOSTILE), prompt=attack), response(3, 2, ["ok"])]
    write_rows(run_dir / "samples.jsonl", rows)
    write_rows(run_dir / "forking_tokens.jsonl", [token_row(3, next(iter(HOSTILE)))])
    return run_dir


def test_the_page_asks_for_nothing_and_runs_nothing(hostile):
    page = page_of(hostile)
    drawings = {id(e) for svg in page.all("svg") for e in [svg, *svg.all()]}
    policy = [m.attributes for m in page.all("meta") if "http-equiv" in m.attributes]
    assert policy[0]["content"].startswith("default-src 'none'")
    for element in page.all():
        assert element.tag in TAGS or id(element) in drawings, element.tag
        assert element.tag not in ("script", "image", "foreignobject", "a")
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            assert name not in ("src", "srcset", "action", "background", "data"), name
            if name.split(":")[-1] == "href":
                assert value.startswith("#"), value
            assert all(url.startswith("#") for url in re.findall(r"url\((.*?)\)", value)), value
    for style in page.all("style"):
        assert "@import" not in style.text and "url(" not in style.text
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert page.all("h1")[0].text == hostile.name


def test_hostile_tokens_are_text_each_once_in_order(hostile):
    page = page_of(hostile)
    article = page.by_id("sample-1-9")
    shown = [token.text for token in tokens_of(article)]
    assert shown == [text if seen is None else seen for text, seen in HOSTILE.items()]
    assert article.of_class("prompt")[0].text.strip().startswith("</pre></details><script>")
    assert "# </pre></details><script>" in page.by_id("settings").text
    assert page.by_id("forking").cells()[0][0] == next(iter(HOSTILE))


def test_tokens_are_marked_and_shaded_as_the_file_has_them(tmp_path):
    run_dir = make_run(tmp_path / "run")
    edges = palette.SHADE_EDGES
    entropies = [0.0, edges[0] - 1e-6, edges[0], 0.3, edges[3], 1.2, 2.0, edges[-1], 11.0]
    selected = [False, True, False, True, True, False, True, False, False]
    row = response(
        3, 7, list("abcdefghi"), entropies=entropies, selected=selected, truncated=True, loss=False
    )
    write_rows(run_dir / "samples.jsonl", [row, response(3, 8, ["x"], accuracy=0.0, reward=-0.5)])
    page = page_of(run_dir)
    tokens = tokens_of(page.by_id("sample-3-7"))
    assert [token.tag == "mark" for token in tokens] == selected
    shades = [int(token.attributes["class"].removeprefix("e")) for token in tokens]
    assert shades == [0, 0, 1, 2, 4, 5, 6, 7, 7]
    assert tokens[3].attributes["title"] == (
        "0.3000 nats, rank 6 of 9, log-probability -0.7500, id 103, forking"
    )
    assert tokens[8].attributes["title"] == (
        "11.0000 nats, rank 1 of 9, log-probability -2.0000, id 108"
    )
    said = page.by_id("sample-3-7").text
    assert "✓ right, cut at the limit, not in the loss" in said
    assert "9 tokens, 4 forking; threshold 0.25 nats" in said
    wrong = page.by_id("sample-3-8").text
    assert "✗ wrong" in wrong and "reward -0.5, advantage 0.5" in wrong
    legend = page.by_id("legend").text
    assert all(str(edge) in legend for edge in edges) and "nats" in legend


def test_unknown_entropies_are_said_and_not_drawn(tmp_path):
    run_dir = make_run(tmp_path / "run")
    row = response(3, 1, ["a", "b"], entropies=None, threshold=None, selected=[True, True])
    write_rows(run_dir / "samples.jsonl", [row])
    (run_dir / "entropy_histogram.jsonl").unlink()
    page = page_of(run_dir)
    tokens = tokens_of(page.by_id("sample-3-1"))
    assert [t.attributes["class"] for t in tokens] == ["e0", "e0"]
    assert tokens[1].attributes["title"] == "log-probability -0.2500, id 101, forking"
    assert "entropies are unknown" in page.by_id("sample-3-1").text
    assert not any("histogram" in title for title in drawn(page))
    assert "entropy_histogram.jsonl" in page.by_id("missing").text


def test_the_numbers_are_those_of_the_files(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    told = {
        e.all("dt")[0].text: e.all("dd")[0].text for e in page.of_class("headlines")[0].all("div")
    }
    assert told["Held-out accuracy"].startswith("10.0% → 70.0%step 0 to step 3, 64 responses")
    assert told["Training accuracy"].startswith("30.0% → 50.0%")
    assert told["Trained on"].startswith("3,006response tokens in 3 steps")
    assert told["Time"].startswith("3 min 0 s")
    assert told["Skipped updates"] == "3"
    assert told["KL of engine and trainer"] == "3e-09nats, last step; 3e-09 at most"
    assert page.by_id("state").text == "finished: 3 of 3 steps"
    numbers = {row[0]: row[1:] for row in page.by_id("numbers").cells()}
    assert numbers["tokens"] == ["1001", "1003", "1001", "1003"]
    assert numbers["reward/accuracy"] == ["0.3", "0.5", "0.3", "0.5"]
    assert set(numbers) == set(metrics_row(1)) - {"step"}
    # Of the last step that has a list, alone.
    assert page.by_id("forking").cells() == 2 * [["so3", "7", "0.7500", "80", "20", "25.0%"]]


def test_curves_go_through_their_values_and_stop_at_null(tmp_path):
    run_dir = make_run(tmp_path / "run", asked=9)
    values = [0.1, 0.5, 0.3, None, 0.7, 0.2]
    rows = [metrics_row(i + 1, grad_norm=v, lr=None) for i, v in enumerate(values)]
    write_rows(run_dir / "metrics.jsonl", rows)
    page = page_of(run_dir)
    assert "Learning rate" not in drawn(page)  # null everywhere
    assert page.by_id("state").text.startswith("not finished: 6 of 9 steps, the last at ")
    paths = [path.attributes for path in drawn(page)["Gradient norm"].all("path")]
    [curve] = [
        p["d"] for p in paths if palette.CURVES[0] in p.get("style", "") and p["d"].count("L") > 2
    ]
    assert curve.count("M") == 2  # a gap
    points = [tuple(map(float, p)) for p in re.findall(r"([\d.]+) ([\d.]+)", curve)]
    known = [(i + 1, v) for i, v in enumerate(values) if v is not None]
    assert len(points) == len(known)
    for axis in (0, 1):  # the drawing is an affine map of the data
        (a, _), (b, _) = ((p[axis], q[axis]) for p, q in zip(points[:2], known[:2], strict=True))
        per_unit = (b - a) / (known[1][axis] - known[0][axis])
        for point, value in zip(points, known, strict=True):
            assert point[axis] - a == pytest.approx(
                (value[axis] - known[0][axis]) * per_unit, abs=0.01
            )


def test_a_step_that_is_pointed_at_shows_its_values(tmp_path):
    run_dir = make_run(tmp_path / "run")
    norms = [0.5, None, 0.25, 12345.678]
    write_rows(
        run_dir / "metrics.jsonl", [metrics_row(i + 1, grad_norm=v) for i, v in enumerate(norms)]
    )
    figure = drawn(page_of(run_dir))["Gradient norm"]
    told = [[line.text for line in at.all("tspan")] for at in figure.of_class("at")]
    assert told == [
        ["step 1", "policy 0.5"],
        ["step 2"],
        ["step 3", "policy 0.25"],
        ["step 4", "policy 1.235e+04"],
    ]
    strips = [at.all("rect")[0].attributes for at in figure.of_class("at")]
    ends = [(float(s["x"]), float(s["x"]) + float(s["width"])) for s in strips]
    lines = [
        float(at.all("path")[0].attributes["d"][1:].split()[0]) for at in figure.of_class("at")
    ]
    marks = [float(use.attributes["x"]) for use in figure.all("use") if _is_dot(use)]
    assert [lines[0], lines[2], lines[3]] == pytest.approx(marks, abs=0.5)  # on the curve's dots
    assert all(low < x < high for x, (low, high) in zip(lines, ends, strict=True))
    assert [high for _, high in ends[:-1]] == pytest.approx([low for low, _ in ends[1:]], abs=0.11)


def _is_dot(use: Element) -> bool:
    return palette.CURVES[0] in use.attributes.get("style", "") and float(use.attributes["y"]) > 25


def test_many_steps_have_a_bounded_number_of_readings(tmp_path):
    run_dir = make_run(tmp_path / "run")
    write_rows(
        run_dir / "metrics.jsonl", [metrics_row(step, grad_norm=step) for step in range(1, 1001)]
    )
    told = [
        at.all("tspan")[0].text for at in drawn(page_of(run_dir))["Gradient norm"].of_class("at")
    ]
    assert 100 <= len(told) <= 121
    assert (told[0], told[-1]) == ("step 1", "step 1000")


def test_constant_curves_are_folded_away(tmp_path):
    run_dir = make_run(tmp_path / "run")
    row = {"sampling/groups_dropped": 3, "sampling/groups_stale": 0}
    write_rows(
        run_dir / "metrics.jsonl",
        [metrics_row(s, **row | {"sampling/tail_groups": s}) for s in (1, 2, 3)],
    )
    page = page_of(run_dir)
    assert "Skipped updates" not in drawn(page)  # 1 at every step
    groups = drawn(page)["Groups that were not trained on"]
    assert groups.all("figcaption")[0].text.strip() == "sampling/tail_groups"
    assert page.by_id("constants").cells() == [
        ["entropy/threshold", "0.7"],
        ["sampling/groups_dropped", "3"],
        ["sampling/groups_stale", "0"],
        ["update/skipped", "1"],
    ]


def test_held_out_points_carry_their_intervals(tmp_path):
    run_dir = make_run(tmp_path / "run")
    ends = {"eval/accuracy_low": 0.05, "eval/accuracy_high": 0.9}
    rows = [{"step": step, "eval/accuracy": 0.5} | ends for step in (0, 3)]
    unknown = {"eval/accuracy_low": None, "eval/accuracy_high": None}
    write_rows(run_dir / "eval.jsonl", [*rows, {"step": 4, "eval/accuracy": 0.5} | unknown])
    figure = drawn(page_of(run_dir))["Accuracy"]
    held_out = [
        path.attributes.get("d", "")
        for path in figure.all("path")
        if f"stroke: {palette.CURVES[1]}" in path.attributes.get("style", "")
        and path.attributes.get("clip-path")
    ]
    points = [
        [tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", data)]
        for data in held_out
    ]
    [line] = [drawn for drawn in points if len(drawn) == 3]
    bars = [drawn for drawn in points if len(drawn) == 2 and drawn[0][0] == drawn[1][0]]
    assert [bar[0][0] for bar in bars] == [line[0][0], line[1][0]]  # none where it is unknown
    for (_, low), (_, high) in bars:
        assert (low - line[0][1]) / (low - high) == pytest.approx(0.45 / 0.85, abs=1e-3)


def test_a_curve_beneath_another_is_seen(tmp_path):
    """The threshold and the 80th percentile are nearly one line."""
    run_dir = make_run(tmp_path / "run")
    rows = [
        metrics_row(s) | {"entropy/threshold": 1 / s, "entropy/p80": 1.01 / s} for s in (1, 2, 3)
    ]
    write_rows(run_dir / "metrics.jsonl", rows)
    paths = drawn(page_of(run_dir))["Threshold and percentiles of the entropy"].all("path")
    styles = [p.attributes.get("style", "") for p in paths if p.attributes["d"].count("L") == 2]
    threshold, percentile = (
        next(i for i, s in enumerate(styles) if f"stroke: {palette.CURVES[j]}" in s) for j in (0, 1)
    )
    assert threshold > percentile  # drawn later, so on top
    assert "stroke-width: 6" in styles[percentile] and "stroke-width: 1.6" in styles[threshold]


def test_an_empty_run_a_run_of_nulls_and_a_run_of_one_step(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.toml").write_text("[training]\nsteps = 5\n")
    page = page_of(empty)
    assert page.by_id("state").text == "not finished: 0 of 5 steps"
    assert {row.all("code")[0].text for row in page.by_id("missing").all("li")} == {
        "metrics.jsonl", "eval.jsonl", "forking_tokens.jsonl", "entropy_histogram.jsonl",
        "samples.jsonl",
    }  # fmt: skip
    nulls = make_run(tmp_path / "nulls")
    row = dict.fromkeys(metrics_row(1), None)
    write_rows(nulls / "metrics.jsonl", [row | {"step": step} for step in (1, 2, 3)])
    page = page_of(nulls)
    assert set(drawn(page)) == {"Accuracy", "Entropy histogram, first and last step"}
    assert ["tokens", "–", "–", "–", "–"] in page.by_id("numbers").cells()
    one = page_of(make_run(tmp_path / "one", steps=1, asked=1))
    assert one.by_id("state").text == "finished: 1 of 1 steps"
    assert "Time of a step" in drawn(one)
    assert len(one.of_class("step")) == 1
    markers = drawn(one)["Skipped updates"].all("use")
    assert any(palette.CURVES[0] in m.attributes.get("style", "") for m in markers)  # a dot


def test_an_evaluation_without_a_result(tmp_path):
    run_dir = make_run(tmp_path / "run")
    rows = [{"step": 0, "eval/accuracy": 0.25}, {"step": 3, "eval/accuracy": None}]
    write_rows(run_dir / "eval.jsonl", rows)
    headlines = [one.text for one in page_of(run_dir).all("dd")]
    assert "25.0%step 0" in headlines


def test_a_live_run_is_read_as_far_as_it_is_written(tmp_path):
    run_dir = make_run(tmp_path / "run", asked=9)
    for path in run_dir.glob("*.jsonl"):
        path.write_bytes(path.read_bytes() + '{"step": 4, "text": "é'.encode()[:-1])
    (run_dir / "checkpoints" / "final").rmdir()
    page = page_of(run_dir)
    assert page.by_id("state").text.startswith("not finished: 3 of 9 steps")
    assert page.by_id("numbers").cells()
    assert [s.text for s in page.all("summary") if s.text.startswith("Step")] == [
        "Step 1, 2 responses", "Step 3, 2 responses",
    ]  # fmt: skip
    assert not list(run_dir.glob("*.partial"))


def test_steps_done_again_are_shown_once_as_they_were_last(tmp_path):
    run_dir = make_run(tmp_path / "run")
    again = [metrics_row(1, tokens=7), metrics_row(2), metrics_row(3, tokens=9)]
    before = [metrics_row(step) for step in (1, 2, 3, 4)]
    write_rows(run_dir / "metrics.jsonl", [*before[:3], *again])
    write_rows(
        run_dir / "samples.jsonl",
        [response(2, 5, ["old"]), response(2, 6, ["other"]), response(2, 5, ["new"])],
    )
    page = page_of(run_dir)
    numbers = {row[0]: row[1:] for row in page.by_id("numbers").cells()}
    assert numbers["tokens"] == ["7", "9", "7", "1002"]
    assert [t.text for t in tokens_of(page.by_id("sample-2-5"))] == ["new"]
    assert len(page.all("article")) == 2


def test_a_folder_without_a_run_and_a_damaged_line_are_told(tmp_path):
    for folder, cause in ((tmp_path, "no run in this folder"), (tmp_path / "x", "no such folder")):
        with pytest.raises(UserError, match=cause):
            write_report(folder)
    assert not list(tmp_path.iterdir())
    run_dir = make_run(tmp_path / "run")
    whole = write_report(run_dir).read_bytes()
    for second, cause in (('{"step": 2', ":2 is damaged"), ('{"tokens": 5}', "without a step")):
        (run_dir / "metrics.jsonl").write_text(f'{{"step": 1}}\n{second}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match=rf"metrics\.jsonl.*{cause}"):
            write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == whole


def test_a_run_ends_although_its_pictures_fail(tmp_path, capsys):
    """What it has learnt is on disk: a page that cannot be drawn is a warning."""
    run_dir = make_run(tmp_path / "run")
    config = learner_config(tmp_path, run={"dir": str(run_dir), "tensorboard": False})
    with contextlib.closing(RunLog(config, tokenizer=None, steps_done=3)) as log:
        log.end(run_dir / "final")
        for name in ("curves.png", "report.html"):
            assert (run_dir / name).exists()
        assert "warning" not in (told := capsys.readouterr()).err + told.out
        (run_dir / "metrics.jsonl").write_text('{"tokens": 5}\n')
        log.end(run_dir / "final")
    told = capsys.readouterr()
    for name in ("curves.png", "report.html"):
        assert f"warning: {run_dir}/{name} was not written: UserError" in told.err + told.out


def test_the_command_writes_where_it_is_told(tmp_path):
    run_dir = make_run(tmp_path / "run")
    done = megafork("report", run_dir, "--output", tmp_path / "there.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "there.html")
    assert not (run_dir / "report.html").exists()
    assert read_page(tmp_path / "there.html").by_id("state").text == "finished: 3 of 3 steps"
    done = megafork("report", tmp_path)
    assert done.returncode == 2 and "no run in this folder" in done.stderr


def test_whole_steps_are_left_out_when_there_are_too_many_tokens(tmp_path):
    rows = [response(step, step, ["a"] * 10) for step in range(1, 8)]
    shown = [[one.step for one in sampled_steps(rows, most)] for most in (1000, 45, 40, 5)]
    assert shown == [[1, 2, 3, 4, 5, 6, 7], [1, 5, 6, 7], [1, 5, 6, 7], [1, 7]]
    assert sampled_steps([]) == []
    assert all(len(r.tokens) == 10 for one in sampled_steps(rows, 5) for r in one.responses)


def test_text_has_contrast_on_every_colour():
    for name, theme in palette.THEMES.items():
        for shade in palette.SHADES[name]:
            assert contrast(theme["ink"], shade) >= 4.5
        for ground in (theme["page"], theme["panel"]):
            assert min(contrast(theme[i], ground) for i in ("ink", "quiet", "good", "bad")) >= 4.5
            assert min(contrast(curve, ground) for curve in palette.CURVES) >= 3.0


def contrast(one: str, other: str) -> float:
    """WCAG 2, of two #rrggbb colours."""

    def luminance(colour):
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_times_and_signs_are_written_for_people():
    seconds = (0.25, 61, 7500, 90061)
    assert [duration(s) for s in seconds] == ["0.2 s", "1 min 1 s", "2 h 5 min", "1 d 1 h"]
    assert visible("\u2028") == "↵\u2028"
    assert [visible(text) for text in (" a", "  ", "\u00a0", "\u3000")] == [
        " a",
        "··",
        "⟨U+00A0⟩",
        "⟨U+3000⟩",
    ]
