"""The house: who may import whom, and how large a room may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megafork"
# A module may import from its own floor and from the floors before it.
FLOORS = [
    {
        "errors",
        "disk",
        "config",
        "types",
        "interruption",
        "last_words",
        "launch",
        "rank_logs",
        "__init__",
    },
    {"parallel"},
    {"ops"},
    {"data"},
    {"model", "algorithms"},
    {"rewards", "rollout", "weight_sync", "checkpoint", "logging"},
    {"evaluation", "report"},
    {"training"},
    {"planning"},
    {"scoring", "doctor", "nodes"},
    {"analysis"},
    {"cli"},
    {"__main__"},
]
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> int:
    name = module.split(".")[0] or "__init__"
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


def imported(tree: ast.AST) -> list[str]:
    """Modules of the package that a file imports, without the package's name."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megafork"):
            names.append((node.module or "").removeprefix("megafork").lstrip("."))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downstairs(path):
    own = room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for module in imported(ast.parse(path.read_text())):
        assert room(module) <= own, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_room_is_too_large(path):
    source = path.read_text()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{path.name}: {node.name}"
