"""A run whose every plug-in is one of examples/plugins."""

from __future__ import annotations

import json
import math

import pytest

from tests.helpers.commands import QUICKSTART, left_over, lines, megafork, tiny_run

PLUGINS = "examples.plugins."


@pytest.mark.slow
def test_a_run_of_plugins_alone(tmp_path):
    data = QUICKSTART / "data"
    for part in ("train", "heldout"):
        rows = [json.loads(row) for row in (data / f"{part}.jsonl").read_text().splitlines()]
        columns = "\n".join(f"{row['prompt']}\t{row['answer']}" for row in rows)
        (tmp_path / f"{part}.tsv").write_text(f"prompt\tanswer\n{columns}\n")
    done = megafork(
        *tiny_run(
            tmp_path / "run", "parallel.tp=2",
            f"data.train={tmp_path / 'train.tsv'}", f"data.eval={tmp_path / 'heldout.tsv'}",
            f"data.reader={PLUGINS}reader:rows",
            f"algorithm.objective={PLUGINS}objective:penalized",
            f"algorithm.advantages={PLUGINS}advantages:leave_one_out",
            f"forking.select={PLUGINS}selection:surprisal",
            f'algorithm.credit=["{PLUGINS}credit:by_entropy", "{PLUGINS}credit:early"]',
            f'logging.writers=["{PLUGINS}writer:Table"]',
        ),
        mark=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert left_over(tmp_path) == []
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    table = (tmp_path / "run" / "metrics.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in table] == [str(row["step"]) for row in rows]
    for row in rows:
        assert 0 <= row["penalized/far_fraction"] <= 1
        assert row["ratio/first_update_max_offset"] == 0.0
        assert 0.2 <= row["forking/kept_fraction"] < 0.3
        assert row["entropy/threshold"] is None  # the scores are no entropies
        assert math.isfinite(row["loss/policy"])
        assert "ratio/clip_low_fraction" not in row
