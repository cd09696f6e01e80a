"""Every tool starts as its documentation says: `python tools/NAME.py`."""

from __future__ import annotations

import contextlib
import multiprocessing
import runpy
import sys

import pytest

from tests.helpers.commands import ROOT

HOOKS = {"site_links.py"}  # mkdocs calls them
TOOLS = sorted(path.name for path in ROOT.glob("tools/*.py") if path.name not in HOOKS)
OF_THE_REPOSITORY = ("benchmarks", "examples", "tests", "tools")
"""Found in the folder that Python starts in, or in a script's, but not installed"""


def run_as_a_script(name, output):
    """What `python tools/NAME.py --help` does, but for the imports that this process has."""
    path = ROOT / "tools" / name
    sys.path = [str(path.parent), *(p for p in sys.path if p not in ("", str(ROOT)))]
    for module in [m for m in sys.modules if m.partition(".")[0] in OF_THE_REPOSITORY]:
        del sys.modules[module]
    sys.argv = [str(path), "--help"]
    with output.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_says_what_it_does(tmp_path, name):
    output = tmp_path / "output"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_as_a_script, args=(name, output))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "usage: " in output.read_text().lower()


@pytest.mark.slow
def test_a_script_finds_nothing_beside_itself(tmp_path):
    """Or the test above would hold for a tool that starts under pytest alone."""
    fork = multiprocessing.get_context("fork")
    script = tmp_path / "script.py"
    script.write_text("import tests.helpers\n")
    process = fork.Process(target=run_as_a_script, args=(script, tmp_path / "output"))
    process.start()
    process.join()
    assert process.exitcode == 1
