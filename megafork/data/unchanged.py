"""Checks that a run which goes on still has the data that it was trained on.

Prompt i of a run follows from the rows, their order and the seed. With a row more or less the same
position means another permutation: rows would be trained on twice, and others never.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megafork.config.rollouts import DataConfig
from megafork.data.row_reader import Row
from megafork.errors import UserError
from megafork.system.parsing import parse_json

Identity = dict[str, Any]
"""What a checkpoint keeps of the data: JSON can hold it."""


def identity(data: DataConfig, train: Sequence[Row], heldout: Sequence[Row]) -> Identity:
    return {
        "data.train": _digest(train),
        "data.eval": _digest(heldout) if data.eval is not None else None,
        "data.seed": data.seed,
    }


def _digest(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the number of rows, and a hash of prompts and answers in their order, before any
    template."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.answer]).encode() + b"\n")
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def check_unchanged(run_dir: Path, data: DataConfig, now: Identity) -> None:
    """Raise UserError where the newest checkpoint of the run is of other data."""
    if data.allow_changed:
        return
    steps = [p for p in (run_dir / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    newest = max(steps, key=lambda path: int(path.name[5:]), default=None)
    state = newest / "state.json" if newest is not None else None
    if state is None or not state.is_file():  # the search for a whole checkpoint tells of damage
        return
    try:
        raw = parse_json(state.read_text())
    except ValueError:
        return
    before = raw.get("data", {}) if isinstance(raw, dict) else {}
    changed = [
        f"{name}={_value(data, name)} has {_told(now[name])}, the run had {_told(was)}"
        for name, was in before.items()
        if was is not None and name in now and now[name] != was
    ]
    if changed:
        raise UserError(
            f"{newest} was trained on other data: {'; '.join(changed)}. Bring the run's own back, "
            "or set data.allow_changed=true: the new rows are then taken from their own order at "
            "the run's position, so that some are trained on twice and others not in this epoch"
        )


def _value(data: DataConfig, name: str) -> Any:
    return getattr(data, name.removeprefix("data."))


def _told(what: Any) -> str:
    if what is None:
        return "no rows"
    if isinstance(what, dict):
        return f"{what['rows']} rows of digest {what['sha256'][:8]}"
    return f"the value {what}"
