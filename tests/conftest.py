"""The order of the tests, the groups that stay together, and how many vLLM servers were started."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.nodeid import coerce_node_id

LONGEST_FIRST = ("cluster", "runs", "servers", "worlds", "unit")
"""So that at the end no process is left with a long test while the others are done."""
SAYS_VLLM = b"(APIServer pid="
"""At the beginning of its log's lines"""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests and, with --dist loadgroup, add each one's xdist_group to its id.

    There the scheduler looks for it. pytest-xdist 3.8 does it by an attribute that pytest 9.2 no
    longer reads, and its groups are then taken apart without a word.
    """
    items.sort(key=_place)
    if not config.getoption("loadgroup", default=False):  # of xdist's workers alone
        return
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if group is not None and not item.nodeid.endswith(f"@{group.args[0]}"):
            item._id = coerce_node_id(f"{item.nodeid}@{group.args[0]}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """How many logs are of a real vLLM server, of whichever process started it."""
    logs = Path(config._tmp_path_factory.getbasetemp()).rglob("*.log")
    count = sum(SAYS_VLLM in log.read_bytes() for log in logs if log.is_file())
    terminalreporter.write_line(f"vLLM servers started: {count}")


def _place(item: pytest.Item) -> int:
    """The index of the test's folder in LONGEST_FIRST; tests that lie elsewhere come first."""
    tests = Path(__file__).parent
    if not item.path.is_relative_to(tests):
        return 0
    return LONGEST_FIRST.index(item.path.relative_to(tests).parts[0])
