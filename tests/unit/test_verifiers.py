"""Verifiers by name, and the torture set through the workers that run them."""

from __future__ import annotations

import asyncio
import time

import pytest
import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset

from megafork.config import RewardConfig
from megafork.errors import UserError
from megafork.verifiers.exact import verify as exact
from megafork.verifiers.names import load_verifier
from megafork.verifiers.reasoning_gym import TASKS, tagged_answer, task_verifier
from megafork.verifiers.verifier import Judge
from tests.helpers.hostile import hostile_texts

DEADLINE = 1.0
SLACK = 8.0
"""Seconds until a worker is killed and another has been started beside other processes"""
PUZZLE = ("6 2 4>48:", "48")
SHAPES = {
    "maths": ("\\boxed{", "}", "", "42"),
    "countdown": ("", "", *PUZZLE),
    "exact": ("", "", "", "42"),
    "reasoning-gym:countdown": ("<answer>", "</answer>", "", "6*4*2"),
    "reasoning-gym:products": ("<answer>", "</answer>", "", "42"),
}


def test_there_are_at_least_forty_hostile_texts():
    assert len(set(hostile_texts("probe"))) >= 60


@pytest.mark.parametrize("name", SHAPES)
def test_no_hostile_text_stops_outlasts_or_runs(name, tmp_path):
    before, after, prompt, answer = SHAPES[name]
    probe = tmp_path / "probe"
    texts = hostile_texts(str(probe))
    config = RewardConfig(verifier=name, timeout_s=DEADLINE, workers=2, memory_mib=1024)

    async def judge_all(judge):
        verdicts = []
        for text in texts:
            started = time.monotonic()
            verdicts.append(await judge(prompt, before + text + after, answer))
            assert time.monotonic() - started < DEADLINE + SLACK, text[:80]
        return verdicts

    with Judge(config) as judge:
        verdicts = asyncio.run(judge_all(judge))
    assert [text[:80] for text, v in zip(texts, verdicts, strict=True) if v.reward] == []
    failed = [(t[:40], v.failure) for t, v in zip(texts, verdicts, strict=True) if v.failure]
    assert failed == []
    assert not probe.exists()


def test_the_probe_would_have_been_found(tmp_path):
    """Two of the texts do what they say when they are evaluated."""
    for number, text in enumerate(hostile_texts(str(tmp_path / "probe"))[:2]):
        assert not (tmp_path / "probe").exists()
        eval(text) if number == 0 else exec(text)
        (tmp_path / "probe").unlink()


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("42", "42", True),
        (" 42\n", "\t42", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("Cafe", "cafe", False),
        ("4 2", "42", False),
        ("", "42", False),
        ("42.", "42", False),
        ("\uff14\uff12", "42", False),
    ],
)
def test_exact(response, answer, right):
    assert exact("", response, answer) == float(right)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math", r"'math' is unknown: did you mean maths\?"),
        ("Countdow", r"did you mean countdown\?"),
        ("zzzzz", r"There are maths, countdown, exact, reasoning-gym:TASK, and any function"),
        ("nowhere:f", r"'nowhere:f' cannot be imported: No module named 'nowhere'"),
        ("json:loud", r"cannot be imported: module 'json' has no attribute 'loud'"),
        ("tests.helpers.verifiers:__doc__", "is a str, no function"),
        ("reasoning-gym", "The tasks that can be scored without evaluating"),
        ("reasoning-gym:n_queens", "'reasoning-gym:n_queens': .*The tasks that can be scored"),
        ("reasoning-gym:countdwn", r"did you mean countdown\?"),
    ],
)
def test_a_name_that_is_none_is_told(name, message):
    with pytest.raises(UserError, match=message):
        load_verifier(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": ["maths", "exact"]}, r"names 2 .*unset: .*reward.weights=\[1.0, 0.5\]"),
        ({"verifier": ["maths", "exact"], "weights": [1.0]}, r"has 1 weights for the 2 of"),
        ({"verifier": "maths", "weights": [1.0, 2.0]}, r"has 2 weights for the 1 of"),
    ],
)
def test_weights_are_those_of_the_verifiers(settings, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**settings).check()


@pytest.mark.parametrize("task", TASKS)
def test_a_reasoning_gym_task_is_scored_as_the_library_does(task):
    """Its own answers, those of other rows, and ones that are nearly right."""
    rows = list(data := reasoning_gym.create_dataset(task, size=4, seed=3))
    verify = task_verifier(task)
    for row in rows:
        found = [other["answer"] for other in rows] + [row["answer"] + "1", row["answer"][:-1], ""]
        found += [row["answer"].upper(), row["answer"].replace(" ", "  ")]
        for answer in found:
            ours = verify("", f"so <answer>{answer}</answer>", row["answer"])
            assert ours == float(data.score_answer(answer.strip(), row) == 1.0), (answer, row)


def test_what_the_library_compares_itself_is_what_we_compare():
    for task in TASKS:
        scorer = type(reasoning_gym.create_dataset(task, size=1, seed=0)).score_answer
        if TASKS[task].__name__ == "_same" and task not in ("circuit_logic", "emoji_mystery"):
            assert scorer is ProceduralDataset.score_answer, task


def test_reasoning_gyms_countdown_is_read_and_never_run():
    verify = task_verifier("countdown")
    right = ["2*4*6", "(6 * 4) * 2", "4*6*2", "-(-6)*4*2"]
    wrong = [
        "48",
        "6*4*2*1",
        "6*4",
        "6*8",
        "2**4*6",
        "6*4*2.0",
        "6*4*True",
        "6*4*2;",
        "6/0*4*2",
        "a",
    ]
    assert [verify("", f"<answer>{text}</answer>", "6*4*2") for text in right] == [1.0] * len(right)
    assert [verify("", f"<answer>{text}</answer>", "6*4*2") for text in wrong] == [0.0] * len(wrong)


def test_the_last_pair_of_tags_counts():
    assert tagged_answer("<answer>1</answer> no: <answer>\n2 </answer> ...") == "2"
    for text in ("2", "<answer>2", "2</answer>", "</answer>2<answer>"):
        assert tagged_answer(text) is None
