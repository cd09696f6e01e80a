"""Models by their name on the hub, from a cache that is laid out as huggingface_hub lays it out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.hub import hub_name, with_local_models
from tests.helpers.commands import QUICKSTART, ROOT, lines, megafork

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = QUICKSTART / "model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The quickstart's model in a cache as owner/tiny; no network is asked."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(MODEL.iterdir())):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("hf:Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-8B-Base@main", "Qwen/Qwen3-8B-Base@main"),
        ("/models/Qwen3", None),
        ("./Qwen/Qwen3", None),
        ("../Qwen3", None),
        ("model", None),
        ("runs/one/checkpoints", None),
        ("tests/none", None),  # below a folder that is here: a mistake in the rest of a path
        ("hf:tests/none", "tests/none"),
    ],
)
def test_names_are_told_from_folders(path, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hub_name(path) == name


def test_every_setting_that_names_a_model_gets_its_folder(cache, capsys):
    named = ["model.path=owner/tiny", "tokenizer.path=hf:owner/tiny", f"critic.path={MODEL}"]
    named += ["kl.reference=owner/tiny@main", "kl.coefficient=0.1", "algorithm.advantages=gae"]
    config = load_config(TrainConfig, QUICKSTART / "config.toml", [*named, "run.dir=r"])
    found = with_local_models(config)
    assert {found.model.path, found.tokenizer.path, found.kl.reference} == {str(cache)}
    assert found.critic.path == str(MODEL)
    assert f"note: model.path=owner/tiny is in {cache}" in capsys.readouterr().err
    assert config.model.path == "owner/tiny"


def test_a_model_that_cannot_be_had_is_told(cache):
    settings = ["model.path=owner/other", "run.dir=r"]
    config = load_config(TrainConfig, QUICKSTART / "config.toml", settings)
    with pytest.raises(
        UserError, match=r"model.path=owner/other is no folder here, .*Offline.*give a"
    ):
        with_local_models(config)


def test_commands_take_a_name(cache, tmp_path):
    """A dry run, the ranks of a scoring, and a mistake that is told in one line."""
    dry = megafork("train", QUICKSTART / "config.toml", "model.path=owner/tiny", "--dry-run",
                   f"run.dir={tmp_path / 'run'}", "parallel.tp=1")  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    assert f'path = "{cache}"' in dry.stdout
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": [3, 4], "response_ids": [5, 6]}\n')
    done = megafork("score", "--model", "owner/tiny", "--input", rows,
                    "--output", tmp_path / "scored.jsonl", "parallel.tp=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    [row] = lines(tmp_path / "scored.jsonl")
    assert len(row["entropies"]) == 2
    assert done.stderr.count("note: model.path=owner/tiny is in") == 1  # its ranks ask no hub
    wrong = megafork("generate", "--model", "owner/none", "--data", rows, "--output", "out.jsonl")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: model.path=owner/none is no folder here")


def test_a_folder_needs_no_hub():
    """huggingface_hub is not even imported."""
    code = "import sys, megafork.cli, megafork.model.hub as hub; "
    code += "assert hub.hub_name('/a') is None; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
