"""The source archive, the wheel made of it, and that wheel where there is but torch and numpy."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import megafork
from tests.helpers.commands import ROOT

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


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


def files_of_the_package() -> set[str]:
    """Every file of megafork/ but compiled ones, relative to the repository."""
    paths = (ROOT / "megafork").rglob("*")
    files = [path for path in paths if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source archive, wheel), the wheel made of the archive alone."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"  # setuptools writes beside what it builds
    for name in ("megafork", "tests/unit", "requirements"):
        shutil.copytree(ROOT / name, source / name)
    for name in (
        *("pyproject.toml", "MANIFEST.in", "README.md"),
        *("CHANGELOG.md", "CITATION.cff", "LICENSE"),
    ):
        shutil.copy(ROOT / name, source)
    make = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", make, folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, archive)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def bin_folder(built, tmp_path_factory):
    environment = tmp_path_factory.mktemp("wheel") / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    (site_packages,) = environment.glob("lib/python3*/site-packages")
    for distribution in with_what_it_needs("torch", "numpy"):
        link(distribution, site_packages)
    python = environment / "bin" / "python"
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", built[1])
    return environment / "bin"


def test_source_archive_and_wheel_hold_the_package_and_nothing_else(built):
    archive, wheel = built
    package = files_of_the_package()
    assert package >= {"megafork/py.typed", "megafork/metrics/page.html.jinja"}
    assert package >= {"megafork/verifiers/maths.py", "megafork/vllm_plugin/serve.py"}

    with zipfile.ZipFile(wheel) as zipped:
        info = f"megafork-{megafork.__version__}.dist-info/"
        names = set(zipped.namelist())
        described = zipped.read(info + "METADATA")
    assert {name for name in names if not name.startswith(info)} == package
    assert info + "licenses/LICENSE" in names

    with tarfile.open(archive) as tarred:
        members = [name.partition("/")[2] for name in tarred.getnames()]
    assert {name for name in members if name.startswith("megafork/") and "." in name} == package
    assert set(members) >= {"CHANGELOG.md", "CITATION.cff", "LICENSE", "requirements/cpu.txt"}
    assert not [name for name in members if "tests" in name or "__pycache__" in name]

    about = Metadata.from_email(described, validate=True)
    assert str(about.version) == megafork.__version__
    assert about.license_expression == "Apache-2.0"
    assert about.description_content_type == "text/markdown"
    assert about.description == (ROOT / "README.md").read_text()


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
