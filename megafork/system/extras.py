"""The optional parts of megafork's installation, as its own metadata names them."""

from __future__ import annotations

import re
from importlib import metadata

_NAME, _EXTRA = re.compile(r"[\w.-]+"), re.compile(r"extra == ['\"]([\w-]+)['\"]")


def extra_with(module: str) -> str | None:
    """Return the extra that brings an importable module, or None if none does.

    A module has its distribution's name, or the beginning of it (megatron: megatron-core).
    """
    for requirement in metadata.requires("megafork") or []:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name is None or extra is None:
            continue
        distribution = name[0].replace("-", "_").lower()
        if distribution == module or distribution.startswith(f"{module}_"):
            return extra[1]
    return None
