"""`megafork generate` and `megafork eval` with one real server, on the quickstart's model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal

import pytest

from megafork.config import EvaluateConfig, GenerateConfig
from megafork.errors import Interrupted, UserError
from megafork.evaluation.benchmark import evaluate
from megafork.evaluation.generation import Job, check_input, digest, generate_file, row_of, run_jobs
from megafork.evaluation.sample_file import SampleFile
from megafork.evaluation.source import find_model
from megafork.model.hf_folder import SafetensorsFolder
from megafork.verifiers.countdown import verify
from tests.helpers.commands import QUICKSTART, executed_megafork, left_over, lines, megafork
from tests.helpers.evaluations import MODEL, SETTINGS, config
from tests.helpers.shared_servers import ON_QUICKSTART, quickstart_server

LOGPROB_TOL = 1e-4  # float32 kernels of vLLM against ours
COUNTDOWN = "reward.verifier=megafork.verifiers.countdown:verify"


@pytest.fixture
def url(tmp_path_factory, monkeypatch):
    """The setting that names a running server, whose key is in the environment."""
    with quickstart_server(tmp_path_factory) as server:
        monkeypatch.setenv("MEGAFORK_API_KEY", server.api_key)
        yield f"rollout.url={server.url}"


@pytest.fixture
def bench(tmp_path):
    rows = (QUICKSTART / "data" / "heldout.jsonl").read_text().splitlines()[:12]
    path = tmp_path / "held.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def is_right(row):
    return bool(verify(row["prompt"], row["response"], row["answer"]))


@ON_QUICKSTART
def test_what_generate_writes_is_scored(url, bench, tmp_path):
    output = tmp_path / "out.jsonl"
    generate_file(config(GenerateConfig, url), str(bench), output)
    rows = lines(output)
    asked = lines(bench)
    assert [(r["id"], r["sample"]) for r in rows] == [(a["id"], i) for a in asked for i in range(4)]
    assert [r["prompt"] for r in rows[::4]] == [a["prompt"] for a in asked]
    assert len({r["response"] for r in rows}) > 12  # samples, not copies
    assert {p.name for p in tmp_path.iterdir()} == {
        bench.name,
        "out.jsonl",
        "out.jsonl.settings.json",
    }

    scored = tmp_path / "scored.jsonl"
    done = megafork("score", "--model", MODEL, "--input", output, "--output", scored)
    assert done.returncode == 0, done.stderr
    for row, before in zip(lines(scored), rows, strict=True):
        assert row["rollout_logprobs"] == before["rollout_logprobs"]
        assert row["logprobs"] == pytest.approx(row["rollout_logprobs"], abs=LOGPROB_TOL)
        assert len(row["entropies"]) == len(row["response_ids"])


@ON_QUICKSTART
def test_an_interrupted_generation_goes_on_where_it_was(url, bench, tmp_path):
    """A signal in the middle of it: what was finished stays as it is, and the rest is added."""
    output = tmp_path / "out.jsonl"
    settings = config(GenerateConfig, url, "rollout.max_num_seqs=8")  # four groups at a time
    given = check_input(settings, [str(bench)])
    prompts = given.prompts(str(bench))
    file = SampleFile(output, given.settings() | digest(prompts), len(prompts))
    finished = []

    async def make_rows(prompt, completions):
        finished.append(prompt.index)
        if len(finished) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()  # until it is cancelled
        rows = [row_of(prompt, i, c, given.tokenizer) for i, c in enumerate(completions)]
        return [row | {"response": "of the first attempt"} for row in rows]

    with pytest.raises(Interrupted, match=r"stopped by SIGTERM: the samples of \d+ of 12 prompts"):
        run_jobs(given, [Job(prompts, file)], make_rows, log_path=tmp_path / "vllm.log")
    assert not output.exists()
    kept = [json.loads(line) for line in file.partial.read_text().splitlines()]
    assert 2 <= len(kept) < 12
    with file.partial.open("a") as partial:
        partial.write('{"group": 11, "rows": [')  # torn by a crash

    with pytest.raises(
        UserError, match=r"other settings \(rollout.temperature: 1.0 then, 0.5 now\)"
    ):
        generate_file(config(GenerateConfig, url, "rollout.temperature=0.5"), str(bench), output)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(bench.read_text().splitlines()[1:]))
    with pytest.raises(UserError, match=r"other settings \(prompts: "):
        generate_file(settings, str(other), output)

    generate_file(settings, str(bench), output)
    rows = lines(output)
    assert [row["id"] for row in rows[::4]] == [row["id"] for row in lines(bench)]
    for group in range(12):
        is_kept = group in {each["group"] for each in kept}
        assert all(
            (r["response"] == "of the first attempt") == is_kept for r in rows[4 * group :][:4]
        )
    assert not file.partial.exists()
    before = output.read_bytes()
    generate_file(settings, str(bench), output)  # complete: nothing is done
    assert output.read_bytes() == before


@ON_QUICKSTART
def test_eval_reports_what_the_samples_say(url, bench, tmp_path, capsys):
    half = tmp_path / "half.jsonl"
    half.write_text("".join(line + "\n" for line in bench.read_text().splitlines()[:6]))
    output = tmp_path / "eval"
    settings = config(EvaluateConfig, url, COUNTDOWN)
    results = evaluate(settings, [str(bench), str(half)], output)
    assert json.loads((output / "results.json").read_text()) == results
    assert set(results["benchmarks"]) == {"held", "half"}
    for name, count in (("held", 12), ("half", 6)):
        rows = lines(output / "samples" / f"{name}.jsonl")
        assert len(rows) == 4 * count
        for row in rows:
            assert row["accuracy"] == row["reward"] == is_right(row)
            assert row["length"] == len(row["response_ids"])
            whole = row["response"].strip() if row["finish_reason"] == "stop" else ""
            assert row["extracted"] == (whole or None)  # a response of blanks votes for nothing
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        found = results["benchmarks"][name]
        right = [[is_right(row) for row in group] for group in groups]
        assert found["avg@4"]["value"] == pytest.approx(sum(map(sum, right)) / len(rows))
        assert found["pass@k"]["4"]["value"] == pytest.approx(sum(map(any, right)) / count)
        assert set(found["pass@k"]) == set(found["maj@k"]) == {"1", "2", "4"}
        assert found["length_mean"]["value"] == pytest.approx(
            sum(len(row["response_ids"]) for row in rows) / len(rows)
        )
    told = capsys.readouterr().out
    assert f"{100 * results['benchmarks']['held']['avg@4']['value']:.1f}" in told
    assert str(output / "results.json") in told


@ON_QUICKSTART
def test_an_interrupted_evaluation_keeps_its_samples(url, bench, tmp_path):
    output = tmp_path / "eval"
    settings = config(EvaluateConfig, url, COUNTDOWN)
    evaluate(settings, [str(bench)], output)
    samples = output / "samples" / "held.jsonl"
    rows = lines(samples)
    # As a crash leaves it: eight groups, the fourth torn off, one of them with a mark.
    for row in rows[:4]:
        row |= {"accuracy": 1.0, "response": "marked"}
    groups = [(i, rows[4 * i : 4 * i + 4]) for i in (7, 0, 2, 5)]
    text = "".join(json.dumps({"group": i, "rows": group}) + "\n" for i, group in groups)
    (output / "samples" / "held.jsonl.partial").write_text(text[:-9])
    for path in (samples, output / "results.json"):
        path.unlink()

    with pytest.raises(UserError, match=r"rollout.samples: 4 then, 8 now"):
        evaluate(config(EvaluateConfig, url, COUNTDOWN, "rollout.samples=8"), [str(bench)], output)
    results = evaluate(settings, [str(bench)], output)
    again = lines(samples)
    assert again[:4] == rows[:4]
    for group in (2, 7):
        assert again[4 * group : 4 * group + 4] == rows[4 * group : 4 * group + 4]
    accuracy = sum(row["accuracy"] for row in again) / 48
    assert results["benchmarks"]["held"]["avg@4"]["value"] == pytest.approx(accuracy)

    other = tmp_path / "other.jsonl"
    shutil.copyfile(bench, other)
    with pytest.raises(UserError, match=r"held.jsonl.settings.json holds .*rollout.temperature"):
        hot = config(EvaluateConfig, url, COUNTDOWN, "rollout.temperature=2.0")
        evaluate(hot, [str(other)], output)  # results.json would mix the two
    results = evaluate(settings, [str(other)], output)
    assert set(results["benchmarks"]) == {"held", "other"}


@ON_QUICKSTART
def test_a_seed_repeats_the_samples(url, bench, tmp_path):
    for name in "ab":
        generate_file(config(GenerateConfig, url, "rollout.seed=3"), str(bench), tmp_path / name)
    rows = [[row["response_ids"] for row in lines(tmp_path / name)] for name in "ab"]
    assert rows[0] == rows[1]
    assert len(set(map(tuple, rows[0]))) > 12


@ON_QUICKSTART
def test_top_k_of_one_is_greedy(url, bench, tmp_path):
    generate_file(config(GenerateConfig, url, "rollout.top_k=1"), str(bench), tmp_path / "a")
    rows = lines(tmp_path / "a")
    for first in range(0, 48, 4):
        assert len({row["response"] for row in rows[first : first + 4]}) == 1
    assert all(p == 0 for row in rows for p in row["rollout_logprobs"])  # of what is left


@ON_QUICKSTART
def test_a_server_of_another_model_is_refused(url, bench, tmp_path):
    copy = shutil.copytree(MODEL, tmp_path / "copy")
    with pytest.raises(UserError, match=r"serves .*quickstart/model, not .*copy"):
        generate_file(config(GenerateConfig, url, model=copy), str(bench), tmp_path / "out.jsonl")


# ------------------------------------------------------------------------- which model

ON_CHECKPOINT = pytest.mark.xdist_group("checkpoint of the quickstart")  # made once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_000010"
    done = megafork("convert", "hf-to-megatron", "--hf", MODEL, "--megatron", folder)
    assert done.returncode == 0, done.stderr
    return folder


@ON_CHECKPOINT
def test_a_checkpoint_becomes_the_model_that_it_was(checkpoint, tmp_path):
    source = find_model(checkpoint)
    assert source.dtype() == "float32"
    with source.as_hf(tmp_path / "scratch") as folder:
        found, expected = SafetensorsFolder(folder), SafetensorsFolder(MODEL)
        assert found.names == expected.names
        for name in found.names:
            assert found.slice(name, None, 0, 0).equal(expected.slice(name, None, 0, 0))
    assert not (tmp_path / "scratch").exists()


@ON_CHECKPOINT
def test_a_run_stands_for_its_final_checkpoint(checkpoint):
    run = checkpoint.parent.parent
    with pytest.raises(UserError, match=r"has no final checkpoint; .*checkpoints/step_000010$"):
        find_model(run)
    final = shutil.copytree(MODEL, run / "checkpoints" / "final")
    assert find_model(run).folder == final


@pytest.mark.slow
@ON_CHECKPOINT
def test_the_command_evaluates_a_checkpoint_with_a_server_of_its_own(checkpoint, bench, tmp_path):
    output = tmp_path / "eval"
    arguments = ["eval", "--model", checkpoint, "--output", output, bench, *SETTINGS, COUNTDOWN]
    done = executed_megafork(*arguments, mark=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "results.json").read_text())["benchmarks"]["held"]
    rows = lines(output / "samples" / "held.jsonl")
    assert found["avg@4"]["value"] == pytest.approx(sum(map(is_right, rows)) / len(rows))
    assert {p.name for p in output.iterdir()} == {"results.json", "samples", "vllm.log"}
    assert left_over(tmp_path) == []


# ---------------------------------------------------------------------------- mistakes

BENCH = str(QUICKSTART / "data" / "heldout.jsonl")
MISTAKES = {
    "no model": ("model.path=none", "--model none is not a folder"),
    "no column": ("data.prompt_key=question", "line 1: no column 'question'"),
    "too long": ("rollout.max_response_tokens=500", "exceeds the model's max_position_embeddings="),
    "unknown key": ("rollout.sample=4", "did you mean rollout.samples?"),
    "no verifier": ("reward.verifier=nowhere:f", "nowhere"),
    "no placeholder": ("data.template=Solve it", "must contain {problem}"),
    "thinking alone": ("data.enable_thinking=true", "set data.chat_template=true too"),
    "no chat template": ("data.chat_template=true", "has no chat template"),
    "no answers": ("data.answer_key=", "data.answer_key is empty"),
    "overlong": ("reward.overlong_buffer_tokens=4", "reward.overlong_buffer_tokens=4"),
    "no Python": ("rollout.python=/no/python", "/no/python is not an executable"),
    "no key": ("rollout.url=http://127.0.0.1:9", "variable NO_SUCH_KEY"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(tmp_path, case):
    override, message = MISTAKES[case]
    with pytest.raises(UserError) as told:
        settings = (COUNTDOWN, "rollout.api_key_env=NO_SUCH_KEY", override)
        evaluate(config(EvaluateConfig, *settings), [BENCH], tmp_path / "eval")
    assert message in str(told.value)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("benchmarks", "message"),
    [
        ([], "name a benchmark"),
        ([BENCH, BENCH], "would both be called heldout"),
        (["none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_benchmarks_are_checked_first(tmp_path, benchmarks, message):
    with pytest.raises(UserError, match=message):
        evaluate(config(EvaluateConfig, COUNTDOWN), benchmarks, tmp_path / "eval")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: give a folder"):
        evaluate(config(EvaluateConfig, COUNTDOWN), [BENCH], tmp_path / "file")


def test_the_command_tells_a_mistake_as_one_message(tmp_path):
    """Files and settings come in one list, in any order."""
    output = tmp_path / "eval"
    arguments = ["--model", MODEL, "--output", output, COUNTDOWN, "none.jsonl", *SETTINGS]
    done = megafork("eval", *arguments, mark=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data file none.jsonl does not exist")
    assert not output.exists()


def test_generate_needs_a_folder_for_its_output(tmp_path):
    with pytest.raises(UserError, match=r"the folder .*none does not exist"):
        generate_file(config(GenerateConfig), str(BENCH), tmp_path / "none" / "out.jsonl")


def test_a_file_of_unknown_origin_is_left_alone(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"out.jsonl exists, without the out.jsonl.settings.json"):
        generate_file(config(GenerateConfig), str(BENCH), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("command", ["generate", "eval", "temperatures"])
def test_keys_lists_the_settings_of_the_command(command):
    done = megafork("keys", command)
    assert done.returncode == 0
    assert ("rollout.samples" in done.stdout, "forking.rho" in done.stdout) == (True, False)
    assert ("reward.verifier" in done.stdout) == (command != "generate")
    assert ("sweep.threshold" in done.stdout) == (command == "temperatures")
