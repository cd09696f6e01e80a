"""`megafork score`: the same numbers at every layout, in input order."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from pyarrow import parquet

import megafork.evaluation.scoring
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART, lines, megafork


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=1"],
        ["parallel.tp=2", "parallel.pp=2"],
        ["parallel.dp=2"],
        ["parallel.cp=2", "parallel.pp=2", "parallel.vpp=2"],
    ],
    ids=str,
)
def test_score_is_the_same_at_every_layout(tmp_path, layout):
    folder = reference.save_model(tmp_path / "model", tied=False)
    groups = reference.make_groups(7, 1, seed=2)
    rows = [
        {
            "prompt_ids": g.prompt_ids,
            "response_ids": g.samples[0].token_ids.tolist(),
            "id": g.prompt_index,
        }
        for g in groups
    ]
    rows.insert(3, {"prompt_ids": [4, 5], "response_ids": [], "id": "no response"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = megafork(
        *("score", "--model", folder, "--input", tmp_path / "in.jsonl"),
        *("--output", tmp_path / "out.jsonl", "model.dtype=float32"),
        *("batch_sequences=3", "micro_batch_tokens=32", *layout),
    )
    assert done.returncode == 0, done.stderr
    scored = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in scored] == [row["id"] for row in rows]
    model = reference.load_model(folder, torch.float64)
    for row in scored:
        if not row["response_ids"]:
            assert row["logprobs"] == row["entropies"] == []
            continue
        with torch.no_grad():
            z = reference.response_logits(model, row["prompt_ids"], row["response_ids"])
        logprobs, entropies = reference.logprobs_and_entropies(z, row["response_ids"])
        assert row["logprobs"] == pytest.approx(logprobs.tolist(), abs=2e-5)
        assert row["entropies"] == pytest.approx(entropies.tolist(), abs=2e-5)


def test_score_takes_text(tmp_path):
    """As jsonl and as parquet, which has the tokens too: the same numbers."""
    given = {"prompt": "6 2 4>48:", "response": "6*4=24;2*24=48.", "id": "\u00e9"}
    (tmp_path / "in.jsonl").write_text(json.dumps(given) + "\n")
    for name in ("out.jsonl", "out.parquet"):
        done = megafork(
            *("score", "--model", QUICKSTART / "model", "--input", tmp_path / "in.jsonl"),
            *("--output", tmp_path / name, "model.dtype=float32"),
        )
        assert done.returncode == 0, done.stderr
    [row] = lines(tmp_path / "out.jsonl")
    assert len(row["entropies"]) == len("6*4=24;2*24=48.")
    assert row["response"] == "6*4=24;2*24=48."
    [stored] = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert json.loads(stored["input"]) == given
    assert len(stored["response_ids"]) == len(row["entropies"])
    assert (stored["logprobs"], stored["entropies"]) == (row["logprobs"], row["entropies"])


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_full_disk_is_told_and_leaves_the_former_output(tmp_path, name):
    """A limit on the size of files stands for the disk."""
    folder = reference.save_model(tmp_path / "model", tied=False)
    row = json.dumps({"prompt_ids": [4, 5], "response_ids": [6, 7, 8, 9]}) + "\n"
    (tmp_path / "in.jsonl").write_text(row * 300)
    (tmp_path / name).write_text("former")
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / name]
    done = megafork(
        *("score", "--model", folder, *files, "batch_sequences=8"),
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14)),
    )
    assert done.returncode == 2
    assert "error: [Errno 27] " in done.stderr and "ile too large" in done.stderr
    assert f"'{tmp_path / name}.partial': make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / name).read_text() == "former"
    assert not list(tmp_path.glob("*.partial"))
