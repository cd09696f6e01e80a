"""The wheel in an environment that has torch and numpy and nothing else that megafork asks for."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def run(*command, status=0, cwd="/"):  # where there is no megafork to import instead
    done = subprocess.run(
        [str(part) for part in command], env=ENVIRONMENT, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done


def with_what_it_needs(*names: str) -> set[str]:
    """The installed distributions of these names, and those that they require."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop().lower()
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        if name not in found:
            found.add(name)
            todo += [re.match(r"[\w.-]+", text)[0] for text in required if "extra ==" not in text]
    return found


def link(distribution: str, folder: Path) -> None:
    """Put the files of an installed distribution into another site-packages, as links."""
    files = metadata.distribution(distribution).files
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        place = folder / top
        if not place.exists():
            place.symlink_to(metadata.distribution(distribution).locate_file(top))


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes beside what it builds
    shutil.copytree(ROOT / "megafork", source / "megafork")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    (site_packages,) = environment.glob("lib/python3*/site-packages")
    for distribution in with_what_it_needs("torch", "numpy"):
        link(distribution, site_packages)
    (wheel,) = folder.glob("*.whl")
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    return environment / "bin"


def test_the_wheel_without_its_extras(bin_folder, tmp_path):
    python = bin_folder / "python"
    for absent in ("megatron", "vllm", "pydantic", "transformers"):
        assert "ModuleNotFoundError" in run(python, "-c", f"import {absent}", status=1).stderr
    where = run(python, "-c", "import megafork; print(megafork.__file__)").stdout
    assert where.startswith(str(bin_folder.parent))

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(python, "-c", "import megafork")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3

    told = run(python, ROOT / "examples" / "own_trainer" / "plain_loop.py").stdout
    rewards = [float(reward) for reward in re.findall(r"reward (\d\.\d+)", told)]
    assert rewards[0] < 0.2 and rewards[-1] > 0.9, told

    (tmp_path / "x.toml").write_text("[run]\n")
    error = run(bin_folder / "megafork", "train", "x.toml", status=2, cwd=tmp_path).stderr
    needs = "needs {}, which is not installed: pip install 'megafork[train]'\n"
    assert error == "error: this command " + needs.format("typer")
    error = run(python, "-c", "from megafork import TrainConfig", status=1).stderr
    assert error.endswith("megafork.TrainConfig " + needs.format("pydantic"))
