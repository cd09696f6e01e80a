"""A writer of one's own: the metrics of each step as a line of tab-separated values.

megafork train config.toml 'logging.writers=["writer:Table"]'
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("reward/mean", "entropy/mean", "forking/kept_fraction")


class Table:
    def __init__(self, run_dir: Path, config: dict[str, Any], steps_done: int) -> None:
        self._file = (run_dir / "metrics.tsv").open("a" if steps_done else "w")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        print(step, *(f"{metrics[name]:.4g}" for name in COLUMNS), sep="\t", file=self._file)
        self._file.flush()

    def close(self) -> None:
        self._file.close()
