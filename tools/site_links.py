"""A hook of mkdocs: files of the repository that pages link to are on the site too.

mkdocs knows the files of docs/ alone. Pages also link to ../README.md, ../examples/... and
../requirements/..., which work where the Markdown is read as files. Here each such file is added as
repository/PATH (a .md one becomes a page), and links to it are rewritten.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS, OUTSIDE = "docs/", "repository/"
_TARGET = re.compile(r"(?<=\]\()[^)\s]+(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of docs/, and what those pages link to in turn."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        source = repository_path(waiting.pop())
        for link in _TARGET.findall((ROOT / source).read_text(encoding="utf-8")):
            uri = site_uri(source, link)
            if uri is None or files.get_file_from_path(uri) is not None:
                continue
            path = ROOT / repository_path(uri)
            if path.is_file():
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                waiting += [uri] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the page's links to where their targets are on the site."""
    source = repository_path(page.file.src_uri)

    def on_site(match: re.Match[str]) -> str:
        uri = site_uri(source, match[0])
        if uri is None or files.get_file_from_path(uri) is None:
            return match[0]
        anchor = f"#{fragment}" if (fragment := urlsplit(match[0]).fragment) else ""
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + anchor

    return _TARGET.sub(on_site, markdown)


def repository_path(uri: str) -> str:
    """The path in the repository of a file of the site."""
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else DOCS + uri


def site_uri(source: str, link: str) -> str | None:
    """The place of a link's target on the site; None: it is on another host, or an anchor."""
    parts = urlsplit(link)
    if parts.scheme or not parts.path:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))
    return target.removeprefix(DOCS) if target.startswith(DOCS) else OUTSIDE + target
