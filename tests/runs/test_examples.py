"""The examples that show one thing each, in a short form."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from examples.own_verifier.partial_credit import verify
from megafork.rollout.journal import Journal
from megafork.verifiers.names import load_verifier
from tests.helpers.byte_model import save_byte_model
from tests.helpers.commands import (
    QUICKSTART,
    ROOT,
    environment,
    left_over,
    lines,
    megafork,
    tiny_engine,
)
from tests.helpers.conversion import assert_same, read_all

OWN_VERIFIER = ROOT / "examples" / "own_verifier"
REASONING_GYM = ROOT / "examples" / "reasoning_gym"


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
        "checkpoint.final_dtype=bfloat16",
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
    checkpoints = tmp_path / "run" / "checkpoints"
    card = (checkpoints / "final" / "README.md").read_text()
    assert "| verifier | `partial_credit:verify` |" in card
    rounded = tmp_path / "rounded"
    folders = ("--megatron", checkpoints / "step_000002", "--hf", rounded)
    done = megafork("convert", "megatron-to-hf", *folders, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert_same(read_all(rounded), read_all(checkpoints / "final"))


@pytest.mark.slow
def test_a_task_of_reasoning_gym(tmp_path):
    random_model = save_byte_model(tmp_path / "model", max_position_embeddings=1024)
    tool = (sys.executable, ROOT / "tools" / "make_reasoning_gym.py", "letter_counting")
    for name, count, seed in (("train", 16, 0), ("heldout", 4, 1)):
        command = [*tool, "--count", str(count), "--seed", str(seed)]
        made = subprocess.run(command, env=environment(), capture_output=True, check=True)
        (tmp_path / f"{name}.jsonl").write_bytes(made.stdout)
    rows = {row["prompt"]: row["answer"] for row in lines(tmp_path / "train.jsonl")}
    is_right = load_verifier("reasoning-gym:letter_counting")
    for prompt, answer in rows.items():
        assert is_right(prompt, f"I count.\n<answer>{answer}</answer>", answer) == 1.0
        assert is_right(prompt, f"<answer>{answer}1</answer>", answer) == 0.0

    done = megafork(
        *("train", REASONING_GYM / "config.toml", f"run.dir={tmp_path / 'run'}"),
        *(f"data.train={tmp_path / 'train.jsonl'}", f"data.eval={tmp_path / 'heldout.jsonl'}"),
        *(f"model.path={random_model}", "model.dtype=float32", "data.max_prompt_tokens=900"),
        *("rollout.placement=disaggregated", f"rollout.python={tiny_engine(tmp_path)}"),
        *("rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.max_response_tokens=16"),
        *("rollout.dynamic_sampling=false", "algorithm.overlong_filtering=false"),
        *("training.prompts_per_minibatch=2", "training.steps=2"),
        mark=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert left_over(tmp_path) == []
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["reward/mean"]) for row in metrics] == [(1, 0.0), (2, 0.0)]
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    for group in Journal.read(tmp_path / "run" / "rollouts" / "step_000001.journal"):
        shown = tokenizer.decode(list(group.prompt_ids))
        assert shown.startswith("<|im_start|>user\n") and shown.endswith("</think>\n\n")
        assert any(prompt in shown for prompt in rows)
    card = (tmp_path / "run" / "checkpoints" / "final" / "README.md").read_text()
    assert "| verifier | `reasoning-gym:letter_counting` |" in card
