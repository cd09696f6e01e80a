"""The order of the tests: those that take long first, so that no process is left with one alone."""

from __future__ import annotations

from pathlib import Path

ORDER = ("cluster", "runs", "servers", "worlds", "unit")


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(tests).parts[0]))
