"""Links, commands and settings that the documentation names are there."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.core import TyperGroup
from typer.testing import CliRunner

from megafork.cli import Command, app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
_MARKDOWN = MarkdownIt("commonmark").enable("table")


def tokens_of(page: Path) -> Iterator[Token]:
    """Yield the page's blocks, and what stands inside of each."""
    for block in _MARKDOWN.parse(page.read_text()):
        yield block
        yield from block.children or ()


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the page's headings."""
    found: set[str] = set()
    blocks = _MARKDOWN.parse(page.read_text())
    for opening, heading in itertools.pairwise(blocks):
        if opening.type != "heading_open":
            continue
        text = "".join(part.content for part in heading.children or ())
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def broken_links(page: Path) -> list[str]:
    """Return the relative links that lead to no file, or to no heading of it."""
    broken = []
    for token in tokens_of(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        link = urlsplit(target)
        if not target or link.scheme:
            continue
        file = page.parent / unquote(link.path) if link.path else page
        if not file.exists() or (link.fragment and link.fragment not in anchors_of(file)):
            broken.append(target)
    return broken


def commands_in(page: Path) -> Iterator[str]:
    """Yield what follows `megafork` in each command of the page, with its arguments."""
    for token in tokens_of(page):
        if token.type not in ("code_block", "fence", "code_inline"):
            continue
        for line in token.content.replace("\\\n", " ").splitlines():
            for command in re.findall(r"(?:^\s*|\.venv/bin/|-m )megafork (\w.*)", line):
                yield command.split(" # ")[0]


def faults_of(command: str) -> list[str]:
    """Return the commands, options and settings of a command line that do not exist.

    `a | b` in place of a command stands for two of them, which both have the options.
    """
    chosen: list[Any] = [typer.main.get_command(app)]
    words = command.replace("|", " | ").split()
    while words and isinstance(chosen[0], TyperGroup):
        names = [words.pop(0)]
        while words[:1] == ["|"]:
            names.append(words[1])
            del words[:2]
        if unknown := [name for name in names if name not in chosen[0].commands]:
            return unknown
        chosen = [chosen[0].commands[name] for name in names]
    text = " ".join(words)
    faults = []
    for option in re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", text):
        for one in chosen:
            known = [name for param in one.params for name in param.opts + param.secondary_opts]
            faults += [] if option in known else [f"{one.name} {option}"]
    return faults + [key for key in _settings_in(text) if key not in known_settings()]


def _settings_in(text: str) -> list[str]:
    found = re.findall(r"(?<!\S)'?\[?([a-z_]+(?:\.[a-z_0-9]+)+)=", text)
    return [key for key in found if key != "section.key"]


@functools.cache
def known_settings() -> set[str]:
    listed = [CliRunner().invoke(app, ["keys", command]).output for command in Command]
    return {line.split()[0] for text in listed for line in text.splitlines() if line[0] != " "}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    assert {text: faults for text in commands_in(page) if (faults := faults_of(text))} == {}


def test_the_manual_has_links_and_commands():
    """Were none found, the tests above would hold whatever the pages say."""
    links = [token for page in PAGES for token in tokens_of(page) if token.type == "link_open"]
    commands = [command for page in PAGES for command in commands_in(page)]
    assert len(links) > 30
    assert len(commands) > 40
    assert {command.split()[0] for command in commands} >= {"train", "score", "convert", "analyze"}


def test_what_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `word`, two\n\n## Again\n\n## Again\n\n"
        "[a](page.md#one-word-two) [b](#again-1) [c](https://example.org/x) ![d](none.png)\n"
        "[over two\nlines](none.md) [e](page.md#twice) [f](#again-2) `[g](code.md)`\n\n"
        "    .venv/bin/megafork train A.toml --resum RUN \\\n        parallel.tq=2 # megafork no\n"
        "    python -m megafork convert hf-to-megatron | verify --hf A --max-file-gb 1\n\n"
        "and `megafork analyse run` and `megafork keys eval`; megafork does not read this.\n"
    )
    assert broken_links(page) == ["none.png", "none.md", "page.md#twice", "#again-2"]
    assert [faults_of(command) for command in commands_in(page)] == [
        ["train --resum", "parallel.tq"],
        ["verify --max-file-gb"],
        ["analyse"],
        [],
    ]
