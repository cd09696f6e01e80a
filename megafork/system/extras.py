"""The optional parts of megafork's installation, as its own metadata names them."""

from __future__ import annotations

import re
from importlib import metadata

_NAME, _EXTRA = re.compile(r"[\w.-]+"), re.compile(r"extra == ['\"]([\w-]+)['\"]")


def missing(module: str | None) -> str | None:
    """Say that a module is not installed and which extra brings it, or None if no extra does.

    A package has its distribution's name, or the beginning of it (megatron: megatron-core).
    """
    package = (module or "").partition(".")[0]
    try:
        requirements = metadata.requires("megafork") or []
    except metadata.PackageNotFoundError:  # a checkout that nobody installed
        return None
    for requirement in requirements:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name is None or extra is None:
            continue
        distribution = name[0].replace("-", "_").lower()
        if distribution == package or distribution.startswith(f"{package}_"):
            return f"{package}, which is not installed: pip install 'megafork[{extra[1]}]'"
    return None
