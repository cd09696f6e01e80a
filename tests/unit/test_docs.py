"""The site builds, and the links, commands, settings, metrics and messages it names are there."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer
from markdown_it.token import Token
from typer.core import TyperGroup
from typer.testing import CliRunner

from megafork.cli import Command, app
from megafork.metrics.catalogue import CHARTS, METRICS
from tests.helpers.commands import ROOT
from tests.helpers.manual import MARKDOWN, PAGES, Block, blocks
from tools.write_reference import FOLDER, pages

REASONS = (
    *("needs a GPU", "needs a cluster", "needs the network", "needs Docker", "takes minutes"),
    *("it runs this", "the first does not end"),
    "needs packages of its own, which send to other hosts",
)
"""Why a block of commands is not run by tests/runs/test_manual.py"""
COMMAND = re.compile(
    r"(?m)^ *(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:megafork|bash|python|sbatch|torchrun|pip|hf) .*"
)
PLACEHOLDER = re.compile(r"\.\.\.|\[|\b[A-Z]{2,}\b")


def tokens_of(page: Path) -> Iterator[Token]:
    """Yield the page's blocks, and what stands inside of each."""
    for block in MARKDOWN.parse(page.read_text()):
        yield block
        yield from block.children or ()


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the page's headings."""
    found: set[str] = set()
    tokens = MARKDOWN.parse(page.read_text())
    for opening, heading in itertools.pairwise(tokens):
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


def fault_of_block(block: Block) -> str | None:
    """Return what is wrong with how a block is written; tests/helpers/manual.py has the rules."""
    if block.not_run is not None and (block.language != "bash" or block.not_run not in REASONS):
        return f"no reason: {block.not_run}"
    match block.language:
        case "bash":
            return None
        case "text":
            commands = COMMAND.findall(block.text)
            free = commands and not any(map(PLACEHOLDER.search, commands))
            return "commands without a placeholder are bash" if free else None
        case "json" | "toml" | "python":
            parse = {"json": json.loads, "toml": tomllib.loads, "python": ast.parse}
            try:
                parse[block.language](block.text)
            except (ValueError, SyntaxError) as error:
                return str(error)
            return None
    return f"unknown language: {block.language}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_code_say_what_they_are(page):
    assert {b.place: fault for b in blocks(page) if (fault := fault_of_block(b))} == {}


def test_a_block_that_is_no_more_run_is_found(tmp_path):
    page = ROOT / "page.md"
    written = [
        Block(page, 1, "text", "megafork train mine.toml\n", None),
        Block(page, 1, "text", "megafork train CONFIG.toml\nmegafork doctor\n", None),
        Block(page, 1, "bash", "megafork doctor\n", "nobody knows"),
        Block(page, 1, None, "megafork doctor\n", None),
        Block(page, 1, "toml", "a = ]", None),
    ]
    assert [fault_of_block(block) is None for block in written] == [False, True, *[False] * 3]
    (tmp_path / "page.md").write_text("<!-- not run: needs a GPU -->\n```bash\nx\n```\n\n    y\n")
    found = [(b.language, b.text, b.not_run) for b in blocks(tmp_path / "page.md")]
    assert found == [("bash", "x\n", "needs a GPU"), (None, "y\n", None)]


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


@functools.cache
def texts_of_the_package() -> list[str]:
    """Return every string constant in the package's code; the parts of f-strings are such, too."""
    trees = [ast.parse(path.read_text()) for path in ROOT.glob("megafork/**/*.py")]
    nodes = itertools.chain.from_iterable(map(ast.walk, trees))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def foreign_parts(message: str) -> list[str]:
    """Return the parts of a message that the package never says. Capitals stand for any word."""
    parts = re.split(r"\b[A-Z]+\b(?:-[A-Z]+)*|\.\.\.|'[a-z]+'|[(:]$", message)
    known = [part.strip(" :;,.()'=`") for part in parts]
    package = "\0".join(texts_of_the_package())
    return [part for part in known if len(part) > 3 and part not in package]


def test_troubleshooting_has_messages_that_are_printed():
    headings = re.findall(r"(?m)^\*\*`.*$", (ROOT / "docs/troubleshooting.md").read_text())
    messages = [text for line in headings for text in re.findall(r"\*\*`(.+?)`\*\*", line)]
    assert len(messages) > 30
    assert {text: parts for text in messages if (parts := foreign_parts(text))} == {}
    assert foreign_parts("the vLLM server took a day off: CAUSE") == [
        "the vLLM server took a day off"
    ]


def test_the_reference_is_what_the_config_and_the_catalogue_say():
    """tools/write_reference.py writes it."""
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == pages()


def test_every_metric_is_in_the_catalogue():
    known = {metric.name for metric in METRICS}
    groups = {name.split("/")[0] for name in known if "/" in name}
    named = {
        text
        for text in texts_of_the_package()
        if re.fullmatch(rf"({'|'.join(sorted(groups))})/[a-z_0-9]+", text)
    }
    assert named - known == set()
    assert {metric for chart in CHARTS for metric, _ in chart.curves} <= known
    assert len(named) > 60


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page(site):
    own = [path.relative_to(ROOT / "docs") for path in ROOT.glob("docs/**/*.md")]
    examples = [
        Path("repository") / path.relative_to(ROOT) for path in ROOT.glob("examples/*/*.md")
    ]
    missing = [page for page in own + examples if not (site / html_of(page)).is_file()]
    assert missing == []


def html_of(page: Path) -> Path:
    return page.with_name("index.html") if page.name == "README.md" else page.with_suffix(".html")


def test_the_site_asks_for_nothing_from_other_hosts(site):
    asked = r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=\"?https?:[^\">]*"
    loaded = {
        found
        for page in site.rglob("*.html")
        for found in re.findall(asked, page.read_text())
        if 'rel="canonical"' not in found
    }
    assert loaded == set()
