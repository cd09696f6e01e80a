"""What models, verifiers and files may say to a terminal, a log and a spreadsheet."""

from __future__ import annotations

import csv
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megafork.analysis.output import write_table
from megafork.errors import UserError
from megafork.metrics.log import MetricsLog
from megafork.system import failure_file
from megafork.system.disk import naming, refuse_links
from megafork.system.printable import as_cell, printable

HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b31m": r"\x9b31m",
    "a\rb": r"a\rb",
    "a\bb": r"a\x08b",
    "a\0b": r"a\x00b",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2066x": r"\u2066x",
    "\ud800": r"\ud800",
    "\x7f": r"\x7f",
    "\u2028": r"\u2028",
    "a\u200bb": r"a\u200bb",
    "\U000e0041": r"\U000e0041",
}


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_terminal_would_act_on_is_escaped(text):
    assert printable(f"x{text}y") == f"x{HOSTILE[text]}y"


def test_what_people_read_stays():
    for text in ("plain", "é ü 中文 ×½→", "a\tb\nc", "[/bold]", "C:\\new"):
        assert printable(text) == text


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.text())
def test_nothing_else_comes_through(text):
    for character in printable(text).replace("\n", "").replace("\t", ""):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def test_notes_and_last_words_are_printable(tmp_path, monkeypatch):
    path = tmp_path / "words"
    monkeypatch.setenv(failure_file.VARIABLE, str(path))
    failure_file.leave("a \x1b[2J verifier", status=1)
    assert failure_file.read(path).message == r"a \x1b[2J verifier"
    with MetricsLog(tmp_path, 1, tensorboard=False) as log:
        log._console = Console(force_terminal=True, width=80)
        with log._console.capture() as shown:
            log.note("warning: \x1b]0;x\x07 \x9b [bold]b")
    assert shown.get() == "warning: \\x1b]0;x\\x07 \\x9b [bold]b\n"


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "=cmd|' /C calc'!A0",
        " =1",
        "\uff1d1",
    ],
    ids=ascii,
)
def test_no_cell_starts_a_formula(tmp_path, text):
    assert as_cell(text) == f"'{text}"
    write_table(tmp_path, "tokens", [{"token": text, "count": -1, "mean": -0.5}], {})
    with (tmp_path / "tokens.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row == {"token": f"'{text}", "count": "-1", "mean": "-0.5"}
    [row] = json.loads((tmp_path / "tokens.json").read_text())["rows"]
    assert row["token"] == text


def test_other_cells_stay():
    for text in ("", "a=1", "1-2", "Wait", "中"):
        assert as_cell(text) == text


def test_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/name'"),
        naming(tmp_path / "name"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="'other'"), naming(tmp_path / "name"):
        raise FileNotFoundError(2, "none", "other")


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "rollouts", "rollouts/step_000001.journal", "checkpoints/step_1.partial"],
)
def test_a_link_in_a_runs_folder_is_refused(tmp_path, name):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"run.dir={run_dir} holds a symbolic link, {name}, "):
        refuse_links(run_dir, "run.dir")


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "scratch" / "rollouts").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    refuse_links(tmp_path / "run", "run.dir")
    refuse_links(tmp_path / "nothing", "run.dir")
