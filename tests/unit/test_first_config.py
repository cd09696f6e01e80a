"""`megafork init`: what it writes is accepted by `megafork train --dry-run`."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest
from typer.testing import CliRunner

from megafork.cli import app
from megafork.errors import UserError
from tests.helpers.commands import QUICKSTART

MODEL = QUICKSTART / "model"
GSM8K = [
    {"question": f"{n} and {n}, less 1?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n - 1}"}
    for n in range(1, 6)
]
TURNS = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": name}],
        "reward_model": {"style": "rule", "ground_truth": name.lower()},
    }
    for name in ("Ada", "Bob", "Eve")
]


def rows_in(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def init(folder, data, *more, model=MODEL):
    arguments = ["init", folder, "--model", model, "--data", data, *more]
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def model_with_positions(folder, positions, **tokenizer):
    shutil.copytree(MODEL, folder)
    for name, change in (
        ("config.json", {"max_position_embeddings": positions}),
        ("tokenizer_config.json", tokenizer),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def accepted(folder, monkeypatch):
    """The config that was written, which a dry run accepts as it is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = folder / "config.toml"
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0 and "# layout" in done.output
    return tomllib.loads(path.read_text())


def test_the_quickstarts_task_is_found(tmp_path, monkeypatch):
    data = QUICKSTART / "data" / "train.jsonl"
    done = init(tmp_path / "a b", data)
    assert done.output.endswith(f"then: megafork train '{tmp_path}/a b/config.toml' --dry-run\n")
    found = accepted(tmp_path / "a b", monkeypatch)
    assert found["reward"] == {"verifier": "countdown"}
    assert found["run"]["dir"] == f"{tmp_path}/a b/run"
    assert found["model"] == {"path": str(MODEL), "dtype": "float32"}
    lengths = found["data"]["max_prompt_tokens"], found["rollout"]["max_response_tokens"]
    assert lengths == (12, 128 - 12)
    assert "template" not in found["data"]
    lines = (tmp_path / "a b" / "config.toml").read_text().splitlines()
    commented = [lines[i - 1].startswith("# ") for i, line in enumerate(lines) if " = " in line]
    assert len(commented) > 10 and all(commented)


def test_gsm8k_is_maths_in_a_box(tmp_path, monkeypatch):
    data = rows_in(tmp_path / "gsm8k.jsonl", GSM8K)
    model = model_with_positions(tmp_path / "model", 4096)
    done = init(tmp_path, data, "training.steps=7", "rollout.group_size=4", model=model)
    assert 'reward.verifier = "maths": 100% of the answers hold a number' in done.output
    found = accepted(tmp_path, monkeypatch)
    columns = found["data"]["prompt_key"], found["data"]["answer_key"]
    assert columns == ("question", "answer")
    assert found["data"]["template"].endswith("final answer within \\boxed{}.\n")
    assert (found["training"]["steps"], found["rollout"]["group_size"]) == (7, 4)
    assert found["rollout"]["prompts_per_step"] == 4  # of five rows


def test_chat_turns_take_the_chat_template(tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    model = model_with_positions(tmp_path / "model", 128, chat_template=template)
    init(tmp_path, rows_in(tmp_path / "turns.jsonl", TURNS), model=model)
    found = accepted(tmp_path, monkeypatch)
    assert found["data"]["chat_template"] is True
    assert found["data"]["answer_key"] == "reward_model.ground_truth"
    assert found["reward"] == {"verifier": "exact"}  # the answers hold no number


@pytest.mark.parametrize(("name", "chat"), [("Toy-Base", False), ("Toy", True)])
def test_text_takes_the_chat_template_of_what_is_no_base_model(tmp_path, monkeypatch, name, chat):
    template = "{% for m in messages %}{{ m.content }}>{% endfor %}"
    model = model_with_positions(tmp_path / name, 128, chat_template=template)
    data = QUICKSTART / "data" / "heldout.jsonl"
    init(tmp_path, data, "--verifier", "exact", model=model)
    found = accepted(tmp_path, monkeypatch)
    assert (found["data"]["chat_template"], found["reward"]["verifier"]) == (chat, "exact")


MISTAKES = {
    "wrong folder": (lambda p: {"model": p}, "--model=.* holds no config.json"),
    "no folder": (lambda p: {"model": p / "none"}, "--model=.*none is not a folder"),
    "no file": (lambda p: {"data": p / "none.jsonl"}, "none.jsonl does not exist"),
    "not text": (lambda p: {"data": p / "model.jsonl"}, "model.jsonl is not UTF-8"),
    "unreadable": (lambda _: {"data": "/proc/self/mem"}, "--data /proc/self/mem .* be read"),
    "no rows": (lambda p: {"data": rows_in(p / "d.jsonl", [])}, "holds no rows with columns"),
    "no objects": (lambda p: {"data": rows_in(p / "d.jsonl", [3])}, "holds no rows with columns"),
    "columns": (
        lambda p: {"data": rows_in(p / "d.jsonl", [{"text": "x", "answer": "1"}])},
        r"no column 'prompt', nor another of .*'text', 'answer'\): set data.prompt_key",
    ),
    "an answer": (
        lambda p: {"data": rows_in(p / "d.jsonl", [*GSM8K, {"question": "x", "answer": None}])},
        "d.jsonl, line 6: 'answer' is null",
    ),
    "too long": (
        lambda p: {"data": rows_in(p / "d.jsonl", [{"prompt": "9 " * 99, "answer": "1"}])},
        "the longest prompt has .* tokens, but the model has 128 positions",
    ),
    "turns": (
        lambda p: {"data": rows_in(p / "d.jsonl", TURNS)},
        "chat_template=true, but the tokenizer of .* has no chat template",
    ),
    "verifier": (lambda _: {"more": ["--verifier", "math"]}, "did you mean maths"),
    "override": (lambda _: {"more": ["forking.roh=1"]}, "did you mean forking.rho"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_nothing_is_written(tmp_path, mistake):
    (tmp_path / "model.jsonl").write_bytes((MODEL / "model.safetensors").read_bytes()[-99:])
    changes, message = MISTAKES[mistake][0](tmp_path), MISTAKES[mistake][1]
    settings = {"data": QUICKSTART / "data" / "heldout.jsonl", "model": MODEL, "more": []} | changes
    with pytest.raises(UserError, match=message):
        init(tmp_path / "out", settings["data"], *settings["more"], model=settings["model"])
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_there_is_kept(tmp_path):
    (tmp_path / "config.toml").write_text("mine")
    with pytest.raises(UserError, match=r"config.toml is there already: choose another folder"):
        init(tmp_path, QUICKSTART / "data" / "heldout.jsonl")
    assert (tmp_path / "config.toml").read_text() == "mine"


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/config.toml cannot be written|is no folder"):
        init(tmp_path / "file", QUICKSTART / "data" / "heldout.jsonl")
