"""The model card of a run: what it tells, what it leaves out, whether someone has changed it."""

from __future__ import annotations

import json
import subprocess
import tomllib

import pytest
from huggingface_hub import ModelCard

import megafork
from megafork.checkpoint import model_card as module
from megafork.checkpoint.model_card import commit, is_unchanged, model_card
from megafork.config import TrainConfig
from megafork.config.load import load_config
from tests.helpers.commands import QUICKSTART, ROOT


def card_of(run_dir, *settings, evaluations=()):
    told = [f"run.dir={json.dumps(str(run_dir))}", *settings]
    return model_card(load_config(TrainConfig, QUICKSTART / "config.toml", told), evaluations)


def evaluation(step, value):
    ends = {"": value, "_low": value - 0.02, "_high": value + 0.03}
    accuracy = {f"eval/accuracy{end}": number for end, number in ends.items()}
    return {"step": step, **accuracy, "eval/problems": 512, "eval/samples": 1024}


def test_what_a_card_tells(tmp_path):
    evaluations = [evaluation(0, 0.1), evaluation(25, 0.3), evaluation(50, 0.625)]
    text = card_of(
        tmp_path / "countdown", "eval.samples=2", "forking.rho=0.125", evaluations=evaluations
    )
    assert "# countdown\n" in text
    assert f"megafork {megafork.__version__} (commit " in text
    assert "the 12.5% of the response tokens with the highest entropy" in text
    assert "| verifier | `countdown` |" in text
    assert "| training data | `train.jsonl` |" in text
    assert "512 problems and 1024 responses at temperature 1" in text
    assert "| before training | 10.0% | 8.0% to 13.0% |" in text
    assert "| after step 50 | 62.5% | 60.5% to 65.5% |" in text
    assert "step 25" not in text
    settings = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    assert settings["forking"]["rho"] == 0.125
    assert settings["training"]["lr"] == 5e-4
    assert str(tmp_path) not in text and str(ROOT) not in text  # it may be published
    assert ModelCard(text).data.library_name == "transformers"


def test_a_run_without_evaluations_has_no_results(tmp_path):
    assert "Results" not in card_of(tmp_path / "run")
    text = card_of(tmp_path / "begun", evaluations=[evaluation(0, 0.5)])
    assert text.count("| 50.0% |") == 1


@pytest.mark.parametrize(
    ("select", "told"),
    [("all", "All response tokens carried"), ("random", "20% of the response tokens, selected by")],
)
def test_other_selections_are_said(tmp_path, select, told):
    assert told in card_of(tmp_path / "run", f"forking.select={select}")


def test_names_of_the_hub_are_linked(tmp_path):
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-8B-Base" / "snapshots" / "0123abc"
    settings = [f"model.path={snapshot}", "data.train=hf:owner/math:train"]
    text = card_of(tmp_path / "run", *settings)
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == ("Qwen/Qwen3-8B-Base", ["owner/math"])
    assert "[Qwen/Qwen3-8B-Base](https://huggingface.co/Qwen/Qwen3-8B-Base)" in text
    assert "`hf:owner/math:train`" in text


def test_a_folder_of_two_names_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert ModelCard(card_of(tmp_path / "a", "model.path=models/mine")).data.base_model is None
    assert ModelCard(card_of(tmp_path / "b", "model.path=Qwen/Q3")).data.base_model == "Qwen/Q3"


def test_names_cannot_break_out_of_the_table(tmp_path):
    name = json.dumps("/d/a`b|c\nd.jsonl")
    text = card_of(tmp_path / "run", f"data.train={name}")
    assert "| training data | `a'b\\|c d.jsonl` |" in text


def test_whether_someone_has_changed_a_card(tmp_path):
    text = card_of(tmp_path / "run")
    assert is_unchanged(text)
    for changed in ("", "# mine\n", text + "more\n", text.replace("20%", "30%"), "x" + text):
        assert not is_unchanged(changed)


def test_the_commit_is_that_of_a_checkout_and_of_nothing_else(tmp_path, monkeypatch):
    found = commit()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert found is not None and found.removesuffix("-dirty") == head.stdout.strip()
    site_packages = tmp_path / "project" / "megafork"  # installed into another program's checkout
    site_packages.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path / "project"], check=True)
    monkeypatch.setattr(module.megafork, "__file__", str(site_packages / "__init__.py"))
    assert commit() is None
