"""Write docs/reference/: the settings from the config, the metrics from the catalogue.

    .venv/bin/python tools/write_reference.py

tests/unit/test_docs.py holds the two pages equal to what this writes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from megafork.config import (
    EvaluateConfig,
    GenerateConfig,
    ScoreConfig,
    Section,
    TrainConfig,
)
from megafork.config.rollouts import TemperaturesConfig
from megafork.config.settings import Setting, known_settings
from megafork.metrics.catalogue import CHARTS, METRICS

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
_SETTINGS = """# Settings

Made from the config by `tools/write_reference.py`; `megafork keys` prints the same, and
`megafork keys forking` those that are named so. A setting stands in the TOML file under its
section, or follows the command as `section.key=value`. One whose default is "unset" may be left
out. [Methods](../methods.md) says how the settings belong together.
"""
_OTHERS = (
    ("score", ScoreConfig, TrainConfig),
    ("generate", GenerateConfig, TrainConfig),
    ("eval", EvaluateConfig, TrainConfig),
    ("temperatures", TemperaturesConfig, EvaluateConfig),
)
"""a command, its config, and the one above it of which equal settings are not repeated"""
_METRICS = """# Metrics

Made from the catalogue (`megafork/metrics/catalogue.py`) by `tools/write_reference.py`.
metrics.jsonl has one object a step, and eval.jsonl those of `eval/`. A value that is not known at a
step is null, and one that a run has no use for is left out. A plug-in's objective adds metrics
under names of its own. The last column is the chart of report.html.
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the text of each page by its file's name."""
    return {"settings.md": settings_page(), "metrics.md": metrics_page()}


def settings_page() -> str:
    parts = [_SETTINGS, "## train\n", *_sections(list(known_settings(TrainConfig)))]
    for command, kind, above in _OTHERS:
        own = _without(kind, above)
        of = "eval" if above is EvaluateConfig else "train"
        parts.append(
            f"## {command}\n\nAs in `{of}` where they have the same name, but for these:\n"
        )
        parts.append(_settings_table(own))
    return "\n".join(parts)


def _sections(settings: Sequence[Setting]) -> Iterator[str]:
    for section, members in itertools.groupby(settings, lambda s: s.key.split(".")[0]):
        yield f"### {section}\n"
        yield _settings_table(list(members))


def _without(kind: type[Section], above: type[Section]) -> list[Setting]:
    """The settings of `kind` that `above` has not, or has otherwise."""
    known = set(known_settings(above))
    return [setting for setting in known_settings(kind) if setting not in known]


def _settings_table(settings: Sequence[Setting]) -> str:
    rows = [(f"`{s.key}`", f"`{s.default}`", s.values, s.meaning) for s in settings]
    return _table(("setting", "default", "type, choices, bounds", "meaning"), rows)


def metrics_page() -> str:
    charts = {metric: chart.title for chart in CHARTS for metric, _ in chart.curves}
    parts = [_METRICS]
    by_group = itertools.groupby(METRICS, lambda metric: metric.name.rpartition("/")[0])
    for group, metrics in by_group:
        rows = [(f"`{m.name}`", m.unit, m.meaning, charts.get(m.name, "")) for m in metrics]
        parts.append(f"## {group or 'of the step'}\n")
        parts.append(_table(("metric", "unit", "meaning", "chart"), rows))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"


if __name__ == "__main__":
    main()
