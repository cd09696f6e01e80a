"""Every tool starts as its documentation says: `python tools/NAME.py`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT, environment

HOOKS = {"site_links.py"}  # mkdocs calls them
TOOLS = sorted(path.name for path in ROOT.glob("tools/*.py") if path.name not in HOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_says_what_it_does(name):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", f"tools/{name}", "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout.lower()
