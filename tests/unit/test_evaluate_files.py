"""What `megafork eval` finds in its folder, without a server: complete samples need none."""

from __future__ import annotations

import json
import sys

import pytest

from megafork.config import EvaluateConfig, GenerateConfig, TrainConfig
from megafork.config.load import load_config, save_config
from megafork.errors import UserError
from megafork.evaluation.benchmark import evaluate
from megafork.evaluation.generation import check_input, digest, generate_file
from megafork.evaluation.sample_file import SampleFile
from megafork.evaluation.source import find_model
from tests.helpers.commands import QUICKSTART, lines
from tests.helpers.evaluations import config

MINE = "reward.verifier=mine:f"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's verifier, in the folder that the command starts in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    path = tmp_path / "mine.py"
    path.write_text("def f(prompt, response, answer):\n    return 0.0\n")
    return path


def bench_of(tmp_path, name, count=3):
    path = tmp_path / f"{name}.jsonl"
    rows = (QUICKSTART / "data" / "heldout.jsonl").read_text().splitlines()[:count]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def sample_file(bench, output, *settings):
    given = check_input(config(EvaluateConfig, MINE, *settings), [bench])
    prompts = given.prompts(bench)
    path = output / "samples" / f"{bench.split('/')[-1]}"
    return SampleFile(path, given.settings() | digest(prompts), len(prompts)), prompts


def write_samples(bench, output, failure):
    """Four samples of each problem; only the first of them has a verdict, right, if `failure`."""
    file, prompts = sample_file(bench, output)
    file.open()
    for prompt in prompts:
        rows = [
            {
                "id": prompt.id, "sample": i, "prompt": prompt.text, "prompt_ids": prompt.ids,
                "response": f"{i}.", "response_ids": [5, 6], "finish_reason": "stop",
                "answer": prompt.answer, "extracted": f"{i}.", "reward": float(i == 0),
                "accuracy": float(i == 0), "failure": failure if i else None, "length": 2,
            }
            for i in range(4)
        ]  # fmt: skip
        file.append(prompt.index, rows)
    file.close()
    return file.path


def test_samples_without_verdicts_are_judged_again_and_not_generated_again(mine, tmp_path):
    bench, output = bench_of(tmp_path, "held"), tmp_path / "eval"
    path = write_samples(bench, output, "error")
    before = lines(path)
    mine.write_text("def f(prompt, response, answer):\n    raise ValueError('still broken')\n")
    with pytest.raises(UserError, match=r"failed on 9 of 12 .* the same command judges"):
        evaluate(config(EvaluateConfig, MINE), [bench], output)
    assert lines(path) == before
    mine.write_text("def f(prompt, response, answer):\n    return float(response == '3.')\n")
    results = evaluate(config(EvaluateConfig, MINE), [bench], output)
    verdicts = {"reward": 1.0, "accuracy": 1.0, "failure": None}
    for row, old in zip(lines(path), before, strict=True):
        right = old["sample"] in (0, 3)  # the first keeps the verdict that it had
        assert row == old | verdicts | {"reward": float(right), "accuracy": float(right)}
    assert results["benchmarks"]["held"]["avg@4"]["value"] == 0.5
    assert results["benchmarks"]["held"]["verifier_failures"] == {}


def test_few_samples_without_verdicts_stay_as_they_are(mine, tmp_path):
    bench, output = bench_of(tmp_path, "held"), tmp_path / "eval"
    path = write_samples(bench, output, "timeout")
    before = path.read_bytes()
    results = evaluate(
        config(EvaluateConfig, MINE, "reward.max_failed_fraction=0.8"), [bench], output
    )
    assert path.read_bytes() == before
    assert results["benchmarks"]["held"]["verifier_failures"] == {"timeout": 9}


def test_a_start_that_came_to_nothing_binds_nobody_to_its_settings(mine, tmp_path):
    """As a server leaves it that does not come up: settings, and no sample."""
    bench, output = bench_of(tmp_path, "held"), tmp_path / "eval"
    begun, _ = sample_file(bench, output, "rollout.temperature=0.5")
    begun.open()
    begun.close()
    assert begun.partial.exists() and begun.settings_path.exists()
    other = bench_of(tmp_path, "other")
    write_samples(other, output, None)
    evaluate(config(EvaluateConfig, MINE), [other], output)
    file, _ = sample_file(bench, output)
    file.open()
    file.close()
    assert json.loads(file.settings_path.read_text())["rollout.temperature"] == 1.0


def test_results_are_not_mixed_with_those_of_other_settings(mine, tmp_path):
    held, output = bench_of(tmp_path, "held"), tmp_path / "eval"
    path = write_samples(held, output, None)
    results = evaluate(config(EvaluateConfig, MINE), [held], output)
    path.unlink()
    with pytest.raises(UserError, match=r"results.json holds .*rollout.temperature: 1.0 then"):
        evaluate(config(EvaluateConfig, MINE, "rollout.temperature=0.5"), [held], output)
    assert json.loads((output / "results.json").read_text()) == results
    (output / "results.json").write_text("[]")
    with pytest.raises(UserError, match=r"results.json is not what eval wrote"):
        evaluate(config(EvaluateConfig, MINE), [held], output)


def test_an_output_that_cannot_be_written_is_told(mine, tmp_path):
    bench = bench_of(tmp_path, "held")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"held.jsonl.partial cannot be written \(Not a dir"):
        evaluate(config(EvaluateConfig, MINE), [bench], tmp_path / "file" / "eval")
    with pytest.raises(UserError, match=r"is a folder: name the file to write"):
        generate_file(config(GenerateConfig), bench, tmp_path)


def test_names_with_brackets_are_shown(mine, tmp_path, capsys):
    bench, output = bench_of(tmp_path, "a[bold]b"), tmp_path / "x[" / "y]"
    write_samples(bench, output, None)
    evaluate(config(EvaluateConfig, MINE), [bench], output)
    told = capsys.readouterr().out
    assert "a[bold]b" in told and str(output / "results.json") in told


def test_a_run_that_was_made_longer_has_no_final_policy_yet(tmp_path):
    run, final = tmp_path / "run", tmp_path / "run" / "checkpoints" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text((QUICKSTART / "model" / "config.json").read_text())
    settings = [f"run.dir={run}", f"model.path={QUICKSTART / 'model'}", "training.steps=2"]
    save_config(load_config(TrainConfig, QUICKSTART / "config.toml", settings), run / "config.toml")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"has done 1 of training\.steps=2.* or name .*final"):
        find_model(run)
    assert find_model(final).folder == final
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert find_model(run).folder == final
