"""Workers that hang, die, eat and print: the responses are counted, and the next one is judged."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError

import psutil
import pytest

from megafork.config import RewardConfig
from megafork.errors import UserError
from megafork.verifiers.verifier import Judge, Verdict
from tests.helpers.background import BackgroundLoop
from tests.helpers.commands import MARK, ROOT, environment, gone_within, left_over, processes_of
from tests.helpers.rollout_servers import wait_for

DEADLINE = 60.0
"""Seconds for what does come, however busy the machine is"""
SHORT = 1.0
"""Seconds for what does not"""
SLACK = 8.0
"""Seconds that a worker may take to be started and ended beside five other processes"""


def judge_of(verifier, **settings):
    settings = {"workers": 1, "timeout_s": DEADLINE, "memory_mib": 512} | settings
    return Judge(RewardConfig(verifier=verifier, **settings))


@pytest.fixture(scope="module")
def acting():
    """A judge whose verifier has time for whatever it does."""
    with judge_of("tests.helpers.verifiers:acts") as judge:
        yield judge


@pytest.fixture(scope="module")
def impatient():
    with judge_of("tests.helpers.verifiers:acts", timeout_s=SHORT) as judge:
        yield judge


def verdict(judge, response, prompt="p", answer="a"):
    return asyncio.run(judge(prompt, response, answer))


HANGING = {
    "hang": "no answer within 1 s",
    "hang in C": "no answer",
    "hang in a child": "no answer",
    "drip": "no answer within 1 s",
}


@pytest.mark.parametrize("response", HANGING)
def test_a_deadline_scores_nothing_and_the_next_response_is_judged(impatient, response):
    impatient.causes.clear()
    started = time.monotonic()
    assert verdict(impatient, response) == Verdict(0.0, 0.0, "timeout")
    assert time.monotonic() - started < SHORT + SLACK
    cause = impatient.causes["timeout"]
    assert HANGING[response] in cause and repr(response) in cause
    assert verdict(impatient, "right") == Verdict(1.0, 1.0)


def test_further_columns_of_the_row_reach_the_verifier():
    with judge_of("tests.helpers.verifiers:by_column") as judge:
        columns = {"level": 0.5, "other": ["not taken"]}
        assert asyncio.run(judge("p", "r", "a", columns)).reward == 0.5
        assert asyncio.run(judge("p", "r", "a")).reward == 0.0


FAILING = {
    "eat": ("memory", "MemoryError"),
    "eat slowly": ("memory", "MemoryError"),
    "segfault": ("death", "SIGSEGV"),
    "leave": ("death", "with status 0"),
    "kill itself": ("death", "SIGKILL"),
    "close everything": ("death", "ended"),
    "exit": ("error", "SystemExit: 3"),
    "interrupt": ("error", "KeyboardInterrupt"),
    "text": ("error", "could not convert string to float: 'no number'"),
    "nothing of the kind": ("error", "KeyError"),
    "flood": ("death", "ended"),
    "flood of blanks": ("death", "ended"),
    "flood of lines": ("death", "ended"),
    "forge half": ("death", "ended"),
    "forge depth": ("death", "ended"),
    "forge a list": ("death", "ended"),
}


@pytest.mark.parametrize("response", FAILING)
def test_a_failure_scores_nothing_and_the_next_response_is_judged(acting, response):
    kind, cause = FAILING[response]
    acting.causes.clear()
    started = time.monotonic()
    assert verdict(acting, response) == Verdict(0.0, 0.0, kind)
    assert time.monotonic() - started < DEADLINE / 2
    assert cause in acting.causes[kind] and repr(response) in acting.causes[kind]
    assert verdict(acting, "right") == Verdict(1.0, 1.0)


@pytest.mark.parametrize(
    "response",
    ["print", "close stdin", "fork", "limit itself", "plain surroundings", "survive signals"],
)
def test_what_does_no_harm_is_judged(acting, response, capfd, monkeypatch):
    assert verdict(acting, response) == Verdict(1.0, 1.0)
    assert verdict(acting, "right") == Verdict(1.0, 1.0)
    assert capfd.readouterr() == ("", "")


def test_a_worker_takes_nothing_of_torchruns_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with judge_of("tests.helpers.verifiers:acts") as judge:
        assert verdict(judge, "plain surroundings") == Verdict(1.0, 1.0)


@pytest.mark.parametrize("response", ["right", "leave a child"])
def test_an_idle_worker_that_is_killed_is_replaced(acting, response):
    """Also where another process still has its end of the socket."""
    assert verdict(acting, response) == Verdict(1.0, 1.0)
    [worker] = acting._pool._running
    pid = worker._process.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # the pool reaps it
    assert verdict(acting, "right") == Verdict(1.0, 1.0)
    assert gone_within(pid, 5)


def test_a_line_too_much_shifts_no_verdict(acting):
    """Neither one before the answer, which is the worker's last, nor one after it."""
    assert verdict(acting, "right").failure is None  # so that it is not question number 1
    assert verdict(acting, "forge") == Verdict(0.0, 0.0, "death")
    assert verdict(acting, "say more later") == Verdict(1.0, 1.0)
    [worker] = acting._pool._running
    assert select.select([worker._socket], [], [], 30)[0]
    for response in ("wrong", "right", "wrong"):
        assert verdict(acting, response).reward == (response == "right")


def test_a_flood_costs_no_memory(acting):
    before = psutil.Process().memory_info().rss
    assert verdict(acting, "flood").failure == "death"
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_workers_get_no_secret(monkeypatch):
    for name in (
        *("MEGAFORK_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_PAT"),
        *("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DATABASE_URL", "http_proxy", "MY_SANDBOX"),
        *("SSH_AUTH_SOCK", "OPENAI_KEY", "HF_HOME_TOKEN", "MEGAFORK_LOCK", "A"),
    ):
        monkeypatch.setenv(name, "s3cret")
    with judge_of("tests.helpers.verifiers:acts") as judge:
        assert verdict(judge, "no secret") == Verdict(1.0, 1.0)
    with judge_of("tests.helpers.verifiers:acts", environment=["MY_SANDBOX"]) as judge:
        assert verdict(judge, "what is named") == Verdict(1.0, 1.0)
        assert verdict(judge, "no secret").failure == "error"


def test_waiting_does_not_count_against_the_deadline():
    """Three responses in a row: the last one waits for twice its deadline."""

    async def all_of(judge):
        return await asyncio.gather(*(judge("p", r, "a") for r in ["hang"] * 2 + ["right"]))

    with judge_of("tests.helpers.verifiers:acts", timeout_s=SHORT) as judge:
        verdicts = asyncio.run(all_of(judge))
    assert [v.failure for v in verdicts] == ["timeout", "timeout", None]
    assert verdicts[2].reward == 1.0


def test_megabytes_and_odd_text_go_through():
    with judge_of("tests.helpers.verifiers:length", timeout_s=60.0) as judge:
        assert verdict(judge, "é" * 5_000_000).reward == 5_000_000
        assert verdict(judge, "\ud800\n\0\u2028").reward == 4


def test_cancelled_judgements_cost_nothing_and_harm_nobody():
    """From two loops in two threads, one of which gives up."""

    async def give_up(judge):
        waiting = [asyncio.create_task(judge("p", "hang", "a")) for _ in range(200)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def right(judge):
        return await asyncio.gather(*(judge("p", "right", "a") for _ in range(50)))

    with (
        judge_of("tests.helpers.verifiers:acts", timeout_s=0.5) as judge,
        BackgroundLoop() as background,
    ):
        given_up = background.submit(give_up(judge))
        started = time.monotonic()
        verdicts = asyncio.run(right(judge))
        given_up.result()
        assert {v.failure for v in verdicts} == {None}
        assert time.monotonic() - started < 0.5 + SLACK  # one may have begun, 200 have not


def test_closing_does_not_wait_for_a_hung_verifier(tmp_path):
    judge = judge_of("tests.helpers.verifiers:hangs", timeout_s=600, workers=2)
    with BackgroundLoop() as background:
        waiting = background.submit(judge(str(tmp_path), "r", "a"))
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        started = time.monotonic()
        judge.close()
        assert time.monotonic() - started < SLACK
        with pytest.raises(CancelledError):
            waiting.result()
    [hung] = tmp_path.iterdir()
    assert not psutil.pid_exists(int(hung.name))


KILLED = """
import asyncio, sys
from megafork.config import RewardConfig
from megafork.verifiers.verifier import Judge
async def main():
    judge = Judge(RewardConfig(verifier="tests.helpers.verifiers:hangs", workers=2, timeout_s=600))
    await asyncio.gather(*(judge(sys.argv[1], "r", "a") for _ in range(2)))
asyncio.run(main())
"""


def test_no_worker_outlives_a_killed_trainer(tmp_path):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path)]
    trainer = subprocess.Popen(arguments, cwd=ROOT, env=environment(tmp_path))
    while len(list(tmp_path.iterdir())) < 2:
        assert trainer.poll() is None
        time.sleep(0.05)
    assert len(processes_of(tmp_path)) == 3
    trainer.kill()
    trainer.wait()
    assert left_over(tmp_path, seconds=5) == []


def test_what_a_verifier_started_ends_with_its_worker(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    with judge_of("tests.helpers.verifiers:acts", timeout_s=3.0) as judge:
        assert verdict(judge, "right").reward == 1.0
        assert len(processes_of(tmp_path)) == 1
        assert verdict(judge, "hang in a child").failure == "timeout"
        wait_for(lambda: not any("pause" in command for command in processes_of(tmp_path)), 5)
    assert left_over(tmp_path) == []


def test_a_users_module_is_found_in_the_folder_that_the_command_starts_in(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(prompt, response, answer):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("somewhere")  # sys.path is the test's own
    with judge_of("mine:f") as judge:
        assert verdict(judge, "r").reward == 0.25


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; os._exit(7)", r"ended with status 7 while it started, 3 times"),
        ("x = bytearray(4 << 30)", r"MemoryError .*reward.memory_mib=512"),
        ("raise RuntimeError('why')", r"'badly:f' cannot be imported: why"),
    ],
)
def test_a_verifier_that_cannot_start_is_told(tmp_path, monkeypatch, source, message):
    (tmp_path / "badly.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("somewhere")
    with judge_of("badly:f") as judge, pytest.raises(UserError, match=message):
        verdict(judge, "r")


def test_a_worker_that_the_system_refuses_to_start_ends_the_run(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with (
        judge_of("exact") as judge,
        pytest.raises(UserError, match=r"cannot be started: .*No such"),
    ):
        asyncio.run(asyncio.wait_for(judge("p", "r", "a"), SLACK))


def test_weights_sum_and_the_first_alone_decides_accuracy():
    names = ["tests.helpers.verifiers:is_first_letter", "tests.helpers.verifiers:length"]
    with judge_of(names, weights=[2.0, -0.1], accuracy_at=0.5) as judge:
        assert verdict(judge, "abc", answer="a") == Verdict(2.0 - 0.1 * 3, 1.0)
        assert verdict(judge, "x" * 50, answer="a") == Verdict(-0.1 * 50, 0.0)


def test_too_many_failures_end_the_run(acting):
    acting.causes.clear()
    verdict(acting, "text")
    fine = [None] * 6 + ["error"] * 5 + ["timeout"]
    acting.check_failures(fine)
    acting.check_failures([])
    message = (
        r"failed on 7 of 13 responses \(6 error, 1 timeout\).*max_failed_fraction=0.5.*"
        r"The first: ValueError: could not convert string to float: 'no number', on the prompt 'p'"
    )
    with pytest.raises(UserError, match=message):
        acting.check_failures([*fine, "error"])
    with judge_of("tests.helpers.verifiers:acts", max_failed_fraction=1.0) as patient:
        patient.check_failures([None] + ["error"] * 99)
        with pytest.raises(UserError, match="failed on 99 of 99"):
            patient.check_failures(["error"] * 99)
