"""What the package asks for, against the versions that were tested; what it asks to be cited as."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [
    requirement
    for text in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    if (requirement := Requirement(text)).name != PROJECT["name"]
]


def pinned_versions() -> dict[str, list[Version]]:
    """{package: every version that a file of requirements/ pins}."""
    pinned: dict[str, list[Version]] = {}
    for file in ("cpu.txt", "gpu.txt", "mcore-0.19.txt", "test.txt"):
        for line in (ROOT / "requirements" / file).read_text().splitlines():
            if line and not line.startswith(("#", "-")):
                requirement = Requirement(line)
                (pin,) = requirement.specifier
                pinned.setdefault(canonicalize_name(requirement.name), []).append(
                    Version(pin.version)
                )
    return pinned


def next_breaking(version: Version) -> Version:
    """The next release that may break users: 3 after 2.4, 0.5 after 0.4.1."""
    major, minor = version.major, version.minor
    return Version(f"{major + 1}" if major else f"0.{minor + 1}")


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=str)
def test_each_bound_takes_what_was_tested_and_no_further_release(dependency):
    tested = pinned_versions()[canonicalize_name(dependency.name)]
    assert all(version in dependency.specifier for version in tested)
    (upper,) = [bound for bound in dependency.specifier if bound.operator == "<"]
    assert Version(upper.version) <= next_breaking(max(tested))


def test_the_python_that_is_asked_for():
    asked = SpecifierSet(PROJECT["requires-python"])
    assert [text for text in ("3.10", "3.11", "3.12") if text in asked] == ["3.11", "3.12"]


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["authors"][0] == {"given-names": "Shenzhi", "family-names": "Wang"}
