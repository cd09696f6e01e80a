"""Packaging. Pins that were installed together live in requirements/; the bounds here are loose."""

import re
from pathlib import Path

from setuptools import find_packages, setup

init = Path(__file__).parent.joinpath("megafork", "__init__.py").read_text(encoding="utf-8")
match = re.search(r'^__version__ = "([^"]+)"$', init, re.MULTILINE)
if match is None:
    raise RuntimeError('megafork/__init__.py must hold a line __version__ = "X.Y.Z"')

setup(
    name="megafork",
    version=match[1],
    description="RLVR training of language models on their forking tokens, at any parallel layout",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megafork", "megafork.*"]),
    package_data={"megafork.report": ["*.jinja"]},
    entry_points={"console_scripts": ["megafork=megafork.cli:main"]},
    install_requires=[
        "aiohttp",
        "datasets",
        "jinja2",
        "matplotlib",
        "megatron-core>=0.16.1",
        "mpmath",
        "msgspec",
        "numpy",
        "psutil",
        "pydantic>=2",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "tomli_w",
        "torch>=2.6",
        "transformers>=5",
        "typer",
        "wordcloud",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.20", "vllm>=0.33"],
        "reasoning-gym": ["reasoning-gym"],
        "test": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "requests",
            "ruff",
        ],
    },
)
