"""Jobs on a real Slurm of virtual nodes: power cuts, a cut link, pre-emption, arrays, chains."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
import tomllib

import psutil
import pytest

from tests.helpers.cluster import Cluster, why_not
from tests.helpers.commands import (
    MARK,
    QUICKSTART,
    ROOT,
    left_over,
    lines,
    processes_of,
    tiny_engine,
)
from tests.helpers.replays import assert_kept, comparable, journalled, replayed_in_one_go

LOST_AFTER_S = 12  # long enough for a machine that is busy with something else
REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(900),
    # In continuous integration tests/run.sh installs what is missing: there is no excuse.
    pytest.mark.skipif(REASON is not None and os.environ.get("CI") != "true", reason=str(REASON)),
]
SMALL = (
    "rollout.prompts_per_step=8",
    "rollout.group_size=8",
    "training.prompts_per_minibatch=4",
    "eval.prompts=8",
    "sync.check_prompts=2",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "lab", 4) as lab:
        yield lab


def until(found, told, seconds=90):
    """Wait for `found`; what `told` returns is the words of the failure."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


class Job:
    """What was submitted, its output, and the folder of its run, which its processes carry."""

    def __init__(self, cluster, folder, *options, settings=(), variables=()):
        self.cluster, self.run_dir = cluster, folder / "run"
        self.output = folder / "output"
        self.id = cluster.run(
            "env", f"{MARK}={self.run_dir}", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}", *variables,
            "sbatch", "--parsable", f"--output={self.output}", *options,
            "slurm/train.sbatch", str(QUICKSTART / "config.toml"), f"run.dir={self.run_dir}",
            *SMALL, f"rollout.python={tiny_engine(folder)}", *settings,
        ).strip()  # fmt: skip

    def told(self):
        return self.output.read_text() if self.output.exists() else ""

    def rows(self):
        path = self.run_dir / "metrics.jsonl"
        return lines(path) if path.exists() else []

    def state(self):
        return self.cluster.state_of(self.id)

    def nodes(self):
        listed = self.cluster.run("scontrol", "show", "hostnames", self.state()["NodeList"])
        return listed.split()

    def wait(self, found, seconds=200):
        def found_alive():
            assert self.state()["JobState"] not in ("FAILED", "TIMEOUT", "CANCELLED"), self.told()
            return found()

        until(found_alive, self.told, seconds)

    def wait_for_step(self, step):
        self.wait(lambda: (rows := self.rows()) and rows[-1]["step"] >= step)

    def wait_for_restart(self, restarts):
        self.wait(lambda: (s := self.state())["Restarts"] == str(restarts)
                  and s["JobState"] == "RUNNING")  # fmt: skip

    def wait_for_end(self):
        self.wait(lambda: self.state()["JobState"] == "COMPLETED")


def steps_of(path):
    return [row["step"] for row in lines(path)]


def test_a_job_outlives_its_nodes(cluster, tmp_path):
    """TP2 on two nodes, a server on a third: power cuts, a cut link, and it is complete."""
    settings = ("training.steps=7", "checkpoint.every=1", "parallel.tp=2")
    variables = ["SERVE_NODES=1", f"LOST_AFTER_S={LOST_AFTER_S}"]
    job = Job(cluster, tmp_path, "--nodes=3", settings=settings, variables=variables)

    # A training node loses power; the spare one takes its place.
    job.wait_for_step(2)
    first, trains, serves = job.nodes()
    kept = journalled(job.run_dir)
    cluster.power_off(trains)
    job.wait_for_restart(1)
    assert trains not in job.nodes()
    cluster.boot(trains)

    # The link of the node that trains beside the first is cut, and Slurm has not noticed.
    job.wait_for_step(4)
    assert_kept(job.run_dir, kept)
    first, trains, serves = job.nodes()
    cluster.miss_nodes_after(300)
    cluster.cut(trains)
    assert left_over(job.run_dir, 60) == []
    cause = f"error: nothing was heard of {trains} for {LOST_AFTER_S} s"
    assert cause in job.told().split("attempt 1")[-1]
    assert f"{trains} lost touch with {first}" in guard_log(job, 1, trains)
    cluster.heal(trains)
    job.wait_for_restart(2)
    cluster.miss_nodes_after(10)

    # The serving node loses power.
    job.wait_for_step(6)
    *_, serves = job.nodes()
    cluster.power_off(serves)
    job.wait_for_restart(3)
    assert serves not in job.nodes()
    cluster.boot(serves)

    job.wait_for_end()
    assert left_over(job.run_dir, 10) == []
    assert steps_of(job.run_dir / "metrics.jsonl") == list(range(1, 8))
    assert steps_of(job.run_dir / "eval.jsonl") == [0, 7]
    assert_kept(job.run_dir, kept)
    resumed = re.findall(r"resuming from \S+/step_(\d+)", job.told())
    assert len(resumed) == 3
    # The last step's checkpoint may have been being written; no other step is done again.
    for step, seen in zip(resumed, (2, 4, 6), strict=True):
        assert int(step) >= seen - 1
    logs = {path.name for path in (job.run_dir / "logs" / f"job-{job.id}-attempt-3").iterdir()}
    assert {"rank-0.log", "rank-1.log", f"serve-{job.nodes()[2]}-0.log"} <= logs


def guard_log(job, attempt, node):
    folder = job.run_dir / "logs" / f"job-{job.id}-attempt-{attempt}"
    return (folder / f"launcher-{node}.log").read_text()


def test_a_pre_empted_chain(cluster, tmp_path):
    """train -> convert -> eval; the trainer is pre-empted, and it ends as if it had not been."""
    run_dir, output = tmp_path / "run", tmp_path / "output"
    steps = 12  # more than it gets through before Slurm's scheduler looks
    settings = [
        *SMALL,
        f"training.steps={steps}",
        "checkpoint.every=0",
        "parallel.tp=2",
        f"rollout.python={tiny_engine(tmp_path)}",
    ]
    benchmark = tmp_path / "benchmark.jsonl"
    heldout = (QUICKSTART / "data" / "heldout.jsonl").read_text().splitlines(keepends=True)
    benchmark.write_text("".join(heldout[:8]))
    told = cluster.run(
        "env", f"{MARK}={run_dir}", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}", "RANKS_PER_NODE=2",
        f"TRAIN_ARGS=--nodes=1 --nodelist=node0 --output={output}",
        f"CONVERT_ARGS=--output={tmp_path}/convert", f"EVAL_ARGS=--output={tmp_path}/eval",
        "slurm/chain.sh", str(run_dir), str(QUICKSTART / "config.toml"), *settings, "--",
        str(benchmark), "reward.verifier=countdown", "rollout.samples=2",
        "data.prompt_key=prompt", "data.max_prompt_tokens=24",
        "rollout.max_response_tokens=24", f"rollout.python={tiny_engine(tmp_path)}",
    )  # fmt: skip
    train, convert, evaluate = re.findall(r"\d+", told)

    def state(job):
        return cluster.state_of(job)["JobState"]

    def texts():
        return [path.read_text() for path in tmp_path.iterdir() if path.is_file()]

    def wait(found):
        def found_alive():
            states = {state(job) for job in (train, convert, evaluate)}
            assert not states & {"FAILED", "CANCELLED"}, texts()
            return found()

        until(found_alive, texts, 240)

    wait(lambda: (m := run_dir / "metrics.jsonl").exists() and m.stat().st_size)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodelist=node0", "--exclusive",
        "--output=/dev/null", "--wrap=true",
    ).strip()  # fmt: skip
    wait(lambda: state(urgent) == "COMPLETED")
    assert cluster.state_of(train)["Restarts"] == "1"
    assert state(convert) == state(evaluate) == "PENDING"
    saved = re.search(r"stopped by SIGUSR1 after step (\d+), which is saved", output.read_text())
    assert saved is not None
    before = journalled(run_dir)
    wait(lambda: state(train) == "COMPLETED")
    assert f"resuming from {run_dir}/checkpoints/step_{int(saved[1]):06d}" in output.read_text()
    assert_kept(run_dir, before)
    wait(lambda: state(evaluate) == "COMPLETED")
    assert state(convert) == "COMPLETED"
    assert (run_dir / "hf" / "config.json").exists()
    assert (run_dir / "eval" / "results.json").exists()
    assert_as_if_undisturbed(run_dir, tmp_path / "replayed", steps)


def assert_as_if_undisturbed(run_dir, folder, steps):
    rows, weights = comparable(run_dir)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    other_rows, other_weights = replayed_in_one_go(run_dir, folder)
    assert rows == other_rows
    assert weights == other_weights


def test_an_array_of_seeds(cluster, tmp_path):
    """Each task has a seed and a folder of its own."""
    settings = ("training.steps=1", "parallel.tp=1")
    job = Job(cluster, tmp_path, "--nodes=1", "--array=3,4", settings=settings)
    for seed in (3, 4):
        run_dir = tmp_path / f"run-seed{seed}"
        job.wait((run_dir / "report.html").exists)
        config = tomllib.loads((run_dir / "config.toml").read_text())
        assert config["training"]["seed"] == config["data"]["seed"] == seed
    job.wait(lambda: not processes_of(job.run_dir))
    first, second = (lines(tmp_path / f"run-seed{s}" / "metrics.jsonl") for s in (3, 4))
    assert first[0]["reward/mean"] != second[0]["reward/mean"]


ASKS = """#!/bin/bash
#SBATCH --requeue --open-mode=append
source slurm/common.sh
echo start >> "$1/starts-$SLURM_ARRAY_TASK_ID"
if [[ $SLURM_ARRAY_TASK_ID == 2 ]]; then
  hostname > "$1/host.new" && mv "$1/host.new" "$1/host"
  if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    until [[ -e $1/cut ]]; do sleep 0.2; done
    requeue "asked"
  fi
  touch "$1/done"
fi
until [[ -e $1/done ]]; do sleep 0.2; done
"""


def test_a_task_alone_goes_back_and_waits_for_the_controller(cluster, tmp_path):
    """The last task of an array, whose id is the array's, on a node that is cut off for a while."""
    script, output = tmp_path / "asks.sh", tmp_path / "output-2"
    script.write_text(ASKS)
    cluster.miss_nodes_after(300)
    job = cluster.run(
        "env", f"MEGAFORK_HOME={ROOT}", "sbatch", "--parsable", "--nodes=1", "--exclusive",
        f"--output={tmp_path}/output-%a", "--array=1,2", script, str(tmp_path),
    ).strip()  # fmt: skip

    def told():
        return output.read_text() if output.exists() else job

    until(lambda: (tmp_path / "host").exists() and (tmp_path / "starts-1").exists(), told)
    host = (tmp_path / "host").read_text().strip()
    cluster.cut(host)
    (tmp_path / "cut").touch()
    until(lambda: "Unable to contact" in output.read_text(), told)
    cluster.heal(host)
    until((tmp_path / "done").exists, told)
    cluster.miss_nodes_after(10)
    starts = [len((tmp_path / f"starts-{task}").read_text().split()) for task in (1, 2)]
    assert starts == [1, 2]
    assert "not requeued" not in output.read_text()


ASKS_LATE = """#!/bin/bash
#SBATCH --requeue --open-mode=append
source slurm/common.sh
if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
  hostname > "$1/host.new" && mv "$1/host.new" "$1/host"
  until [[ -e $1/second ]]; do sleep 0.2; done
  requeue "asked"
fi
touch "$1/second"
until [[ -e $1/done ]]; do sleep 0.2; done
"""


def test_what_slurm_has_requeued_is_left_alone(cluster, tmp_path):
    """The script on a node that was cut off asks late: the job runs elsewhere by then."""
    script = tmp_path / "asks.sh"
    script.write_text(ASKS_LATE)
    job = cluster.run(
        "env", f"MEGAFORK_HOME={ROOT}", "sbatch", "--parsable", "--nodes=1", "--exclusive",
        f"--output={tmp_path}/output", script, str(tmp_path),
    ).strip()  # fmt: skip

    def state():
        return cluster.state_of(job)

    until((tmp_path / "host").exists, state)
    host = (tmp_path / "host").read_text().strip()
    cluster.cut(host)
    until((tmp_path / "second").exists, state)
    until(lambda: "Unable to contact" in (tmp_path / "output").read_text(), state)
    cluster.heal(host)
    cluster.wait_until_idle([host])  # its script has asked, or was ended
    assert state()["JobState"] == "RUNNING"
    (tmp_path / "done").touch()
    until(lambda: state()["JobState"] == "COMPLETED", state)
    assert state()["Restarts"] == "1"


@pytest.mark.exhaustive
def test_nodes_of_two_kinds(cluster, tmp_path):
    """The second component serves. Asked to stop before it has a folder, the job is requeued."""
    kinds = ("--nodes=1", ":", "--nodes=1", "--exclusive", "--ntasks-per-node=1")
    job = Job(cluster, tmp_path, *kinds, settings=("training.steps=1", "parallel.tp=1"))
    job.wait(lambda: job.state()["JobState"] == "RUNNING")
    asked = 0.0

    def is_asked():
        """Slurm says nothing of a signal that comes before the script has been started."""
        nonlocal asked
        if time.monotonic() > asked + 5:
            asked = time.monotonic()
            cluster.run("scancel", "--batch", "--signal=USR1", job.id)
        return "asked to stop" in job.told()

    job.wait(is_asked)
    job.wait_for_restart(1)
    told = job.told().split("attempt 1")[0]
    assert "asked to stop: the trainer saves" in told and "stopped by SIGUSR1" in told
    job.wait_for_end()
    trains, serves = re.search(
        r"attempt 1: ranks on (node\d), servers on (node\d)", job.told()
    ).groups()
    assert trains != serves
    assert steps_of(job.run_dir / "metrics.jsonl") == [1]
    assert (job.run_dir / "logs" / f"job-{job.id}-attempt-1" / f"serve-{serves}-0.log").exists()


def rank_of(job, rank):
    """The process, where it runs."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            if variables.get(MARK) == str(job.run_dir) and variables.get("RANK") == str(rank):
                return process
    return None


def test_the_first_cause_is_on_the_last_line(cluster, tmp_path):
    """One of two data-parallel ranks is killed; its fellow on the other node fails after it."""
    job = Job(cluster, tmp_path, "--nodes=2", settings=("training.steps=1", "parallel.tp=1"))
    job.wait(lambda: list(job.run_dir.glob("vllm*.log")))  # the ranks have met
    job.nodes()
    rank_of(job, 1).kill()
    until(lambda: job.state()["JobState"] == "FAILED", job.told, 60)
    assert left_over(job.run_dir, 10) == []
    told = re.escape(f"rank 1 was killed by signal 9 (see {job.run_dir}/logs/job-{job.id}")
    assert re.fullmatch(rf"error: node\d: {told}\S+/rank-1\.log\)", job.told().splitlines()[-1])


def test_scripts_are_clean():
    if shutil.which("shellcheck") is None and os.environ.get("CI") != "true":
        pytest.skip("shellcheck missing: apt-get install shellcheck")
    scripts = [*(ROOT / "slurm").iterdir(), ROOT / "tests" / "run.sh"]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
