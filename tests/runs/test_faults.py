"""What goes wrong around a run: its server dies or is not the right one, a rank hangs, a reward is
no number. test_resume.py has what ends a run that can go on."""

from __future__ import annotations

import contextlib
import re
import signal

import pytest

from megafork.parallel.ports import free_port
from megafork.rollout.journal import Journal
from tests.helpers.commands import (
    Moment,
    left_over,
    lines,
    megafork,
    serving,
    small_run,
    tiny_engine,
    tiny_run,
)
from tests.helpers.forks import variable
from tests.helpers.live_runs import LiveRun, middle_of


@pytest.mark.slow
def test_a_server_that_runs_already_dies_and_comes_back(tmp_path):
    """And a reward that is no number costs the first mini-batch its update."""
    port, run_dir = free_port(), tmp_path / "run"
    url = f"http://127.0.0.1:{port}"
    verifier = "reward.verifier=tests.helpers.verifiers:nan_at_the_first"
    settings = (f"rollout.url={url}", "parallel.tp=1", "training.steps=3", verifier)
    moment = Moment(tmp_path, version=2)
    python = f"rollout.python={tiny_engine(tmp_path)}"
    with contextlib.ExitStack() as stack:
        with serving(tmp_path, port, python, **moment.variables):
            arguments = small_run(run_dir, *settings)
            run = stack.enter_context(LiveRun(run_dir, *arguments, MEGAFORK_API_KEY="shared"))
            run.wait_for(moment.has_come)
        assert left_over(tmp_path, seconds=20) == []
        moment.go_on()
        with serving(tmp_path, port, python) as server:
            assert run.end() == 0, run.told
            refused = small_run(tmp_path / "wrong", *settings)
            with LiveRun(tmp_path / "wrong", *refused, MEGAFORK_API_KEY="wrong") as wrong:
                assert wrong.end() == 2
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
    assert f"no rollout server answers at rollout.url={url}" in wrong.told
    assert run.told.count("the rollout server died and is replaced") == 1
    rows = run.rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["update/skipped"] for row in rows] == [1, 0, 0]
    assert [row["reward/nonfinite"] for row in rows] == [8, 0, 0]
    assert all(row["grad_norm"] > 0 and 0 < row["reward/mean"] < 1 for row in rows)
    [path] = (run_dir / "skipped").iterdir()
    assert str(path) in run.told
    assert "no update, for a reward of response" in run.told
    groups = Journal.read(path)
    assert len(groups) == 4  # the mini-batch
    assert sum(not group.is_finite for group in groups) == 1
    for mark in (tmp_path, run_dir, tmp_path / "wrong"):
        assert left_over(mark) == []


@pytest.mark.slow
def test_nothing_but_such_rewards_ends_the_run(tmp_path):
    arguments = ["parallel.tp=2", "training.max_skipped=4"]
    verifier = "reward.verifier=tests.helpers.verifiers:infinite"
    run_dir = tmp_path / "run"
    done = megafork(*tiny_run(run_dir, verifier, *arguments), mark=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "error: step 2: training.max_skipped=4 updates in a row were skipped, the last for" in (
        done.stderr
    )
    assert len(list((run_dir / "skipped").iterdir())) == 4
    [row] = lines(run_dir / "metrics.jsonl")
    assert row["update/skipped"] == 2
    assert row["entropy/mean"] is None and row["grad_norm"] is None and row["reward/mean"] is None
    assert left_over(tmp_path) == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_server_that_dies_is_replaced_and_nothing_is_generated_twice(tmp_path):
    """On-policy: nobody trains meanwhile. test_resume.py has one that dies beside a training."""
    run_dir = tmp_path / "run"
    settings = ("training.steps=3", "sync.check_every=1", "sync.check_prompts=4")
    with middle_of(2, run_dir, *tiny_run(run_dir, *settings)) as (run, moment):
        run.wait_for(run.journal(2).exists)
        before = run.journal(2).read_bytes()
        run.kill_server()
        moment.go_on()
        assert run.end() == 0, run.told
    assert run.told.count("the rollout server died and is replaced") == 1
    # The cause; what is told first depends on how soon the new one is up.
    assert re.search("does not answer|was started again", run.told)
    assert (run_dir / "vllm.1.log").exists()
    assert run.journal(2).read_bytes().startswith(before)
    prompts = [group.prompt_index for group in Journal.read(run.journal(2))]
    assert len(set(prompts)) == len(prompts)
    assert [row["policy_version"] for row in run.rows] == [2, 3, 4]
    assert max(row["mismatch/kl"] for row in run.rows) < 1e-6  # it has the current weights
    assert max(row["lag/max"] for row in run.rows) == 0
    assert left_over(run_dir) == []


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    """Stopped, it answers nothing and keeps its connections: the others' time-out has to end it.

    The server is there before: the ranks would wait for its start in a collective too.
    """
    port, run_dir, seconds = free_port(), tmp_path / "run", 30
    settings = (
        f"rollout.url=http://127.0.0.1:{port}",
        "parallel.tp=1",
        "parallel.dp=3",
        f"parallel.timeout_minutes={seconds / 60}",
    )
    moment = Moment(tmp_path, version=2)
    python = f"rollout.python={tiny_engine(tmp_path)}"
    with (
        serving(tmp_path, port, python, **moment.variables),
        LiveRun(run_dir, *small_run(run_dir, *settings), MEGAFORK_API_KEY="shared") as run,
    ):
        run.wait_for(moment.has_come)
        [hung] = [rank for rank in run.find("megafork") if variable(rank, "RANK") == "1"]
        hung.suspend()
        moment.go_on()
        assert run.end() == 2
    assert run.told.count("error") == 1
    found = re.search(
        r"error(?: \(rank \d\))?: in \w+ of step \d+ a collective failed "
        r"\(parallel\.timeout_minutes=0\.5\)\. "
        r"(?:Rank 0 did not come; [^;]+; )?"  # where it waits for rank 1's responses
        r"Rank 1 did not come; it has been in \w+ of step \d+ for (\d+) s\. Look at ",
        run.told,
    )
    assert found is not None, run.told
    assert seconds <= int(found[1]) <= 4 * seconds
    assert "Traceback" not in run.told
    assert left_over(run_dir, seconds=20) == []


@pytest.mark.slow
def test_a_server_of_another_precision_is_stopped_at_the_first_push(tmp_path):
    arguments = ["parallel.tp=1", "rollout.dtype=bfloat16"]
    done = megafork(*tiny_run(tmp_path / "run", *arguments), mark=tmp_path)
    assert done.returncode == 2
    assert "trainer and rollout server disagree after a weight push" in done.stderr
    assert "Is rollout.dtype the policy's" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert left_over(tmp_path) == []
