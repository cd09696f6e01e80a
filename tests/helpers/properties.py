"""Cases that hypothesis thinks of, for a world of ranks to go through together."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy


def examples(strategy: SearchStrategy[Any], count: int) -> list[Any]:
    """`count` examples at most, the same in every run.

    Ranks that drew for themselves would part at the first failure, and a world for each example
    would cost a fork a rank.
    """
    found: list[Any] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found
