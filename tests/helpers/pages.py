"""A report as a browser reads it, and the folders of runs that never were."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "hr", "img", "link", "input", "base", "embed", "source"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, *tags: str) -> list[Element]:
        """Below this one, in the page's order; of any tag without `tags`."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if not tags or child.tag in tags else []
                found += child.all(*tags)
        return found

    def of_class(self, name: str) -> list[Element]:
        return [e for e in self.all() if name in e.attributes.get("class", "").split()]

    def by_id(self, name: str) -> Element:
        [found] = [e for e in self.all() if e.attributes.get("id") == name]
        return found

    def cells(self) -> list[list[str]]:
        """Rows of all tables in it, without their heads."""
        rows = ([cell.text for cell in row.all("td")] for row in self.all("tr"))
        return [row for row in rows if row]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read_page(path: Path) -> Element:
    """Fails where tags are not closed in order."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def response(step: int, uid: int, text: list[str], **columns: Any) -> dict[str, Any]:
    """A row of samples.jsonl; token i has entropy i / 10, the last two are selected."""
    n = len(text)
    row = {
        "step": step,
        "uid": uid,
        "group": uid // 4,
        "prompt_ids": [5, 6],
        "token_ids": list(range(100, 100 + n)),
        "entropies": [i / 10 for i in range(n)],
        "selected": [i >= n - 2 for i in range(n)],
        "rollout_logprobs": [-i / 4 for i in range(n)],
        "reward": 1.0,
        "accuracy": 1.0,
        "advantage": 0.5,
        "threshold": 0.25,
        "truncated": False,
        "loss": True,
        "prompt": "2 + 2?",
        "text": text,
    }
    return row | columns


def token_row(step: int, text: str, **columns: Any) -> dict[str, Any]:
    listed = {"id": 7, "count": 80, "selected": 20, "mean_entropy": 0.75, "text": text}
    return {
        "step": step,
        "tokens": 400,
        "selected": 80,
        "min_count": 50,
        "highest_entropy": [listed],
        "most_selected": [listed],
    } | columns


def histogram_row(step: int) -> dict[str, Any]:
    edges = [0.0, 0.01, 0.1, 1.0, 10.0]
    return {"step": step, "edges": edges, "tokens": [6, 3, 0, 1], "selected": [0, 0, 0, 1]}


def metrics_row(step: int, **columns: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "reward/accuracy": 0.2 + 0.1 * step,
        "entropy/threshold": 0.7,
        "tokens": 1000 + step,
        "mismatch/kl": 1e-9 * step,
        "update/skipped": 1,
        "time/generate": 30.0,
        "time/update": 20.0,
        "time/total": 60.0,
    }
    return row | columns


def make_run(run_dir: Path, *, steps: int = 3, asked: int = 3) -> Path:
    """A folder as a run leaves it, its last policy exported."""
    (run_dir / "checkpoints" / "final").mkdir(parents=True)
    settings = f'[run]\ndir = "{run_dir.name}"\n\n[training]\nsteps = {asked}\n'
    (run_dir / "config.toml").write_text(settings, encoding="utf-8")
    each = range(1, steps + 1)
    write_rows(run_dir / "metrics.jsonl", [metrics_row(step) for step in each])
    scores = [{"step": s, "eval/accuracy": 0.1 + 0.2 * s, "eval/samples": 64} for s in (0, steps)]
    write_rows(run_dir / "eval.jsonl", scores)
    write_rows(run_dir / "forking_tokens.jsonl", [token_row(step, f"so{step}") for step in each])
    write_rows(run_dir / "entropy_histogram.jsonl", [histogram_row(step) for step in each])
    kept = [response(s, 8 * s + i, ["a", "b", "c"]) for s in sorted({1, steps}) for i in (0, 1)]
    write_rows(run_dir / "samples.jsonl", kept)
    return run_dir
