"""Layouts that tests go through: which of them the default run takes, and how deep a model is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def default_run(cases: Iterable[Any], taken: Collection[Any]) -> list[Any]:
    """`cases` for parametrize; those that are not in `taken` are slow, so CI alone runs them."""
    params = [pytest.param(c, marks=() if c in taken else (pytest.mark.slow,)) for c in cases]
    assert sum(not param.marks for param in params) == len(taken), "taken names an unknown case"
    return params


def depth_for(layout: dict[str, Any]) -> int:
    """Layers of a model that is no deeper than the layout needs: one a virtual stage, at least 2.

    Depth adds to the time of a case and, beyond that, nothing to what it shows.
    """
    stages = layout.get("pp", 1) * layout.get("vpp", 1)
    return max(2, stages, sum(layout.get("pipeline_layers", ())))
