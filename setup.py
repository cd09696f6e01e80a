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
    package_data={"megafork.metrics": ["*.jinja"]},
    entry_points={"console_scripts": ["megafork=megafork.__main__:main"]},
    # For the functions of `from megafork import ...`; the commands need an extra.
    install_requires=["numpy", "torch>=2.6"],
    extras_require={
        "train": [
            "aiohttp",
            "datasets",
            "jinja2",
            "matplotlib",
            "megatron-core>=0.16.1",
            "mpmath",
            "msgspec",
            "psutil",
            "pyarrow",
            "pydantic>=2",
            "rich",
            "safetensors",
            "scipy",
            "sentencepiece",
            "tensorboard",
            "tokenizers",
            "tomli_w",
            "transformers>=5",
            "typer",
        ],
        "vllm": ["vllm>=0.33"],
        "gpu": ["transformer-engine[pytorch]>=2.20"],
        "analysis": ["megafork[train]", "wordcloud"],
        "reasoning-gym": ["reasoning-gym"],
        "test": [
            "httpx",
            "hypothesis",
            "mkdocs-material>=9.7",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
    },
)
