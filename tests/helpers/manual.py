"""The blocks of code of the README, the pages of docs/ and the examples' pages.

```bash     commands that a reader runs: tests/runs/test_manual.py runs them, unless
            `<!-- not run: REASON -->` stands before the block
```text     what is no code, or a command with a placeholder: CAPITALS, ... or [...]
```toml, ```python, ```json     a file, or a part of one; a first line `# NAME` names it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.helpers.commands import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
MARKDOWN = MarkdownIt("commonmark").enable("table")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*$")
_NAMED = re.compile(r"# ([\w.-]+\.(?:py|toml))\b")


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    language: the fence's, or None for an indented block. not_run: the reason, if it is not run.
    """

    page: Path
    line: int
    language: str | None
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        named = _NAMED.match(self.text)
        return named[1] if named and self.language in ("python", "toml") else None


def blocks(page: Path) -> list[Block]:
    found, comment = [], None
    for token in MARKDOWN.parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            language = token.info if token.type == "fence" else None
            line = token.map[0] + 1
            found.append(Block(page, line, language, token.content, comment and comment[1]))
        comment = _NOT_RUN.match(token.content) if token.type == "html_block" else None
    return found
