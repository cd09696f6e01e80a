"""The examples that show one thing each, in a short form."""

from __future__ import annotations

import os

import pytest
from transformers import AutoTokenizer

from examples.own_verifier.partial_credit import verify
from megafork.rollout.journal import Journal
from tests.helpers.commands import QUICKSTART, ROOT, left_over, lines, megafork, tiny_engine

OWN_VERIFIER = ROOT / "examples" / "own_verifier"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("6*4=24;2*24=48.", 1.0),
        ("6+4=10;2*10=20.", 0.2),
        ("6*4=24;2*24=46.", 0.1),
        ("6*4=25;", 0.0),
        ("__import__('os')", 0.0),
        ("", 0.0),
    ],
)
def test_partial_credit(response, reward):
    assert verify("6 2 4>48:", response, "48") == reward


@pytest.mark.slow
def test_a_verifier_of_one_s_own_in_its_own_folder(tmp_path):
    settings = [
        *(f"run.dir={tmp_path / 'run'}", f"rollout.python={tiny_engine(tmp_path)}"),
        *("training.steps=2", "rollout.prompts_per_step=8", "training.prompts_per_minibatch=4"),
    ]
    done = megafork(
        *("train", "config.toml", *settings),
        mark=tmp_path,
        prepare=lambda: os.chdir(OWN_VERIFIER),
    )
    assert done.returncode == 0, done.stderr
    assert left_over(tmp_path) == []
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    answers = {row["puzzle"]: str(row["target"]) for row in lines(OWN_VERIFIER / "train.jsonl")}
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    rewards = []
    for row in rows:
        journal = tmp_path / "run" / "rollouts" / f"step_{row['step']:06d}.journal"
        for group in Journal.read(journal):
            prompt = tokenizer.decode(list(group.prompt_ids))
            for sample in group.samples:
                response = tokenizer.decode(sample.token_ids.tolist(), skip_special_tokens=True)
                rewards.append(sample.reward)
                assert sample.reward == verify(prompt, response, answers[prompt])
                assert sample.accuracy == (sample.reward == 1.0)
    assert len(set(rewards)) > 2  # partial credit is among them
    card = (tmp_path / "run" / "checkpoints" / "final" / "README.md").read_text()
    assert "| verifier | `partial_credit:verify` |" in card
