"""Every promise of SECURITY.md names a test that there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()


def test_every_promise_has_its_test():
    rows = PAGE.split("## Promises")[1].split("## What listens")[0].splitlines()
    promises = [row for row in rows if row.startswith("| ") and "| test |" not in row]
    assert len(promises) > 15
    for promise in promises:
        [(path, name)] = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
        tree = ast.parse((ROOT / path).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in names, promise
