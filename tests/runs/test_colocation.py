"""Trainer and servers in turns on the same devices: the order, the memory, whole runs."""

from __future__ import annotations

import re
import signal
import time

import pytest
from safetensors.torch import load_file

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.system.signals import INTERRUPTED
from megafork.trainer.clock import Clock
from megafork.trainer.push import WeightSync
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART, Moment, left_over, lines, megafork, tiny_run
from tests.helpers.controllers import PushingTo, controller
from tests.helpers.live_runs import middle_of
from tests.helpers.ppo import make_critic, save_critic
from tests.helpers.step import make_policy
from tools.benchmarks.configs import learner_config
from tools.benchmarks.ranks import run_ranks

COLOCATED = "rollout.placement=colocated"


# ---- the order, which a server on the CPU does not notice ----


class Recorder:
    """A controller whose answers are a list; it notes what of the trainer is on the device then."""

    def __init__(self, policy, critic, answers):
        self.policy, self.critic = policy, critic
        self.answers, self.events = answers, []

    def ask(self, kind, /, arrays=None, **said):
        self.note(kind if not said.get("left") else f"{kind} left")
        return self.answers.pop(0), {}

    def note_stop(self, answer):
        self.note("stop")

    def note(self, what):
        parts = {
            "weights": self.policy.has_weights,
            "optimizer": self.policy.has_optimizer,
            "critic": self.critic.has_weights or self.critic.has_optimizer,
        }
        self.events.append((what, [name for name, there in parts.items() if there]))


ALL = ["weights", "optimizer", "critic"]
SEND, DONE, AGAIN, LEAVE = ({"kind": kind} for kind in ("send", "done", "again", "leave"))
STOP = {"kind": "stop", "signal": "SIGTERM"}
PUSHED = [("push_begins", ["weights"]), ("push_ended", [])]
CASES = {
    "done": (SEND, DONE),
    "a server was lost": (SEND, AGAIN, SEND, DONE),
    "one is started again": (LEAVE, AGAIN, SEND, DONE),
    "stopped": (STOP,),
    "stopped in its middle": (SEND, STOP),
}


def orders(folder, critic_folder):
    policy = make_policy(folder, {})
    critic = make_critic(critic_folder, {}, policy.mesh)
    colocated = learner_config(folder, rollout={"placement": "colocated"})
    found = {}
    for name, answers in CASES.items():
        record = Recorder(policy, critic, list(answers))
        sync = WeightSync(colocated, policy, policy.mesh, record, [policy, critic])
        record.note(sync.push(1))
        sync.take_back()
        record.note("train")
        assert record.answers == []
        found[name] = record.events
    record = Recorder(policy, critic, [SEND, DONE])
    sync.controller = record
    sync.push(1)
    with pytest.raises(AssertionError, match=r"onload\(\) comes first"):
        policy.export_shards()
    sync.take_back()
    apart = WeightSync(learner_config(folder), policy, policy.mesh, record, [policy, critic])
    record.answers, record.events = [SEND, DONE], []
    apart.push(1)
    found["disaggregated"] = record.events
    return found


def test_who_is_on_the_device_when(tmp_path):
    folder = reference.save_model(tmp_path / "model", tied=True, layers=2)
    critic = save_critic(tmp_path / "critic", tied=True)
    [found] = run_ranks(1, orders, folder, critic)
    end = [(True, []), ("train", ALL)]
    assert found["done"] == [*PUSHED, *end]
    assert found["a server was lost"] == [*PUSHED, *PUSHED, *end]
    left = [("push_begins", ["weights"]), ("push_begins left", [])]
    assert found["one is started again"] == [*left, *PUSHED, *end]
    stopped = [("push_begins", ["weights"]), ("stop", ["weights"]), (False, ["weights"])]
    assert found["stopped"] == [*stopped, ("train", ALL)]
    assert found["stopped in its middle"] == [*PUSHED, ("stop", []), (False, []), ("train", ALL)]
    assert found["disaggregated"] == [("push_begins", ALL), ("push_ended", ALL)]


class Servers:
    """What a fleet does for a push, of which only the time of waking up is kept."""

    def __init__(self):
        self.wakings = []

    async def wake_up(self, part):
        self.wakings.append(time.monotonic())

    async def members(self):
        return []

    async def start_weight_update(self): ...
    async def update_weights(self, buckets): ...
    async def finish_weight_update(self, version):
        self.version = version

    async def weight_version(self):
        return self.version


def times_of_a_late_rank(folder):
    """When this rank's memory was away, and when rank 0 woke the servers; one clock for both."""
    policy = make_policy(folder, {"tp": 2})
    colocated = learner_config(folder, rollout={"placement": "colocated"})
    offload, away, servers = policy.offload, [], Servers()

    def late(**parts):
        time.sleep(0.5 * policy.mesh.rank)
        offload(**parts)
        away.append(time.monotonic())

    policy.offload = late
    with controller(policy.mesh, PushingTo(servers, colocated=True)) as handle:
        sync = WeightSync(colocated, policy, policy.mesh, handle, [policy])
        assert sync.push(1)
    return away, servers.wakings


def test_servers_wake_when_the_last_rank_has_left(tmp_path):
    folder = reference.save_model(tmp_path / "model", tied=True, layers=2)
    (_, wakings), (away, _) = run_ranks(2, times_of_a_late_rank, folder)
    assert len(away) == len(wakings) == 2
    assert away[0] < wakings[0] < away[1] < wakings[1]


def test_a_phase_within_another_is_counted_once(monkeypatch):
    clock, now = Clock(), [0.0]
    monkeypatch.setattr("megafork.trainer.clock.time.monotonic", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    with clock.measure("generate"):
        take(1)
        with clock.measure("offload"):
            take(2)
        take(4)
        with clock.measure("sync"):
            take(8)
            with clock.measure("offload"):
                take(16)
    with clock.measure("score"):
        take(32)
        with pytest.raises(ZeroDivisionError), clock.measure("sync"):
            take(64)
            _ = 1 / 0
    assert clock.seconds == {"generate": 5, "offload": 18, "sync": 8, "score": 96}


# ---- settings ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.url=http://there:1"], r"rollout\.url=http://there:1 names one.*: unset url"),
        (["rollout.max_policy_lag=2"], r"rollout\.max_policy_lag=2 generates while.*lag=0, or"),
        (
            ["rollout.tail=carry", "rollout.max_policy_lag=1"],
            r"rollout\.tail=carry lets.*the server sleeps then: use tail=wait",
        ),
    ],
)
def test_what_a_sleeping_server_cannot_do_is_refused(overrides, message):
    settings = ["run.dir=unused", *overrides]
    load_config(TrainConfig, QUICKSTART / "config.toml", settings)
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, QUICKSTART / "config.toml", [*settings, COLOCATED])


def test_local_memory_reaches_no_other_machine():
    settings = ["run.dir=unused", "sync.transport=local", "rollout.url=http://there:1"]
    with pytest.raises(UserError, match=r"sync\.transport=local is for servers that the trainer"):
        load_config(TrainConfig, QUICKSTART / "config.toml", settings)


# ---- whole runs ----

EVERYTHING = (  # each step a check, an evaluation, a checkpoint; and a server that repeats itself
    "rollout.seeded=true", "sync.check_every=1", "eval.every=1", "checkpoint.every=1",
)  # fmt: skip
RUNS = {
    "tp2": ["parallel.tp=2"],
    "pp2-critic-broadcast": [
        "parallel.tp=1",
        "parallel.pp=2",
        "algorithm.advantages=gae",
        "sync.transport=broadcast",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tp2", pytest.param("pp2-critic-broadcast", marks=pytest.mark.exhaustive)]
)
def test_a_run_learns_the_same_in_turns(tmp_path, name):
    rows, weights = {}, {}
    for placement in ("colocated", "disaggregated"):
        run_dir = tmp_path / placement
        settings = [*RUNS[name], *EVERYTHING, f"rollout.placement={placement}"]
        done = megafork(*tiny_run(run_dir, *settings), mark=tmp_path)
        assert done.returncode == 0, done.stderr
        assert left_over(tmp_path) == []
        rows[placement] = lines(run_dir / "metrics.jsonl")
        files = (run_dir / "checkpoints" / "final").glob("*.safetensors")
        weights[placement] = {n: t for path in files for n, t in load_file(path).items()}
    for colocated, apart in zip(rows["colocated"], rows["disaggregated"], strict=True):
        moved = {"time/offload", "time/onload"}
        assert colocated.keys() - apart.keys() == moved
        assert all(colocated[key] > 0 for key in moved)
        phases = sum(colocated[f"time/{p}"] for p in ("generate", "score", "update", "sync"))
        assert phases < colocated["time/total"]
        times = ("time/", "throughput/", "overlap/", "eval/")  # evaluations are not seeded
        for key in apart:
            if not key.startswith(times):
                assert colocated[key] == apart[key], key
    ours, theirs = weights.values()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


@pytest.mark.slow
def test_a_server_that_dies_in_its_turn_is_replaced_and_a_signal_in_its_turn_saves(tmp_path):
    """The signal comes to every process: the server may be gone before it is missed."""
    run_dir = tmp_path / "run"
    settings = ("training.steps=50", "parallel.tp=2", "sync.check_every=1", "checkpoint.every=0")
    with middle_of(2, run_dir, *tiny_run(run_dir, COLOCATED, *settings)) as (run, second):
        run.wait_for(run.journal(2).exists)
        fourth = Moment(second.folder, 4)
        run.kill_server()
        second.go_on()
        run.wait_for(fourth.has_come)
        assert [row["step"] for row in run.rows] == [1, 2, 3]
        run.signal_all(signal.SIGUSR1)
        assert run.end(100) == INTERRUPTED, run.told
    assert left_over(run_dir) == []
    assert len(re.findall("the rollout server at .* is back", run.told)) == 1
    assert [row["policy_version"] for row in run.rows] == [2, 3, 4]
    assert max(row["mismatch/kl"] for row in run.rows) < 1e-6
    [saved] = (run_dir / "checkpoints").glob("step_*/manifest.json")
    assert saved.parent.name == "step_000003"
    assert "Traceback" not in run.told and "error" not in run.told
