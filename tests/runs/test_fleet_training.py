"""Runs with two servers: one of them dies, both come late, one dies of a push."""

from __future__ import annotations

import signal

import pytest

from megafork.errors import PeerError, UserError
from megafork.parallel.ports import free_port
from megafork.rollout.client import RolloutClient
from megafork.rollout.fleet import Fleet
from megafork.rollout.journal import Journal
from megafork.rollout.vllm_server import VllmServer
from megafork.weights import mismatch_check
from tests.helpers import reference
from tests.helpers.blocking import Blocking, BlockingFleet
from tests.helpers.commands import (
    QUICKSTART,
    left_over,
    lines,
    megafork,
    serving,
    small_run,
    tiny_engine,
    tiny_run,
)
from tests.helpers.controllers import probe
from tests.helpers.live_runs import LiveRun, middle_of
from tests.helpers.pushes import OPTIONS, PROMPTS, SAMPLING, kill_in_the_middle, make_sync
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow

CHECKED = ("sync.check_every=1", "sync.check_prompts=4", "eval.prompts=16", "parallel.tp=1")


def samples(run_dir, step):
    groups = Journal.read(run_dir / "rollouts" / f"step_{step:06d}.journal")
    assert len({group.prompt_index for group in groups}) == len(groups)
    return {
        group.prompt_index: sorted(tuple(sample.token_ids) for sample in group.samples)
        for group in groups
    }


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("rollout.seeded=true",), marks=pytest.mark.exhaustive, id="on-policy"),
        pytest.param(("rollout.max_policy_lag=2", "rollout.tail=carry"), id="asynchronous"),
    ],
)
def test_a_server_that_dies_is_replaced_while_the_other_goes_on(tmp_path, how):
    run_dir = tmp_path / "run"
    size = ("rollout.prompts_per_step=16", "rollout.group_size=16")
    settings = (*CHECKED, *size, *how)
    servers = ("rollout.servers=2", "training.steps=400")
    arguments = tiny_run(run_dir, *settings, *servers)
    with middle_of(2, run_dir, *arguments, servers=2) as (run, moment):
        before = len(run.rows)
        moment.hold_starts()
        run.kill_server(1)
        moment.go_on()
        run.wait_for(lambda: any(row["rollout/servers"] == 1 for row in run.rows))
        moment.let_start()
        run.wait_for(lambda: any(row["rollout/servers_replaced"] for row in run.rows))
        reached = len(run.rows)
        run.wait_for(lambda: len(run.rows) > reached)
        run.signal(signal.SIGTERM)
        assert run.end(60) == 75
    assert left_over(run_dir) == []
    assert "is lost, and 1 others go on" in run.told and "is back" in run.told
    assert "the rollout server died" not in run.told and "Traceback" not in run.told
    live = [row["rollout/servers"] for row in run.rows]
    assert set(live[:before]) == {2} and live[-1] == 2 and 1 in live
    assert sum(row["rollout/servers_lost"] for row in run.rows) == 1
    assert sum(row["rollout/servers_replaced"] for row in run.rows) == 1
    assert [row["policy_version"] for row in run.rows] == list(range(2, len(live) + 2))
    fresh = [row["mismatch/kl"] for row in run.rows if row["mismatch/kl"] is not None]
    assert fresh and max(fresh) < 1e-6  # all servers have the current weights, always
    [_] = run_dir.glob("vllm-?.1.log")
    if "rollout.seeded=true" not in how:
        assert 1 <= max(row["lag/max"] for row in run.rows) <= 2  # how far it gets ahead is luck
        return
    other = tmp_path / "other"
    done = megafork(*tiny_run(other, *settings, "training.steps=4"), mark=tmp_path)
    assert done.returncode == 0, done.stderr
    for step in range(1, 5):
        assert samples(run_dir, step) == samples(other, step)


def test_two_servers_that_are_started_after_the_run(tmp_path):
    ports = free_port(), free_port()
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    url = "rollout.url=" + str(urls).replace("'", '"')
    python = f"rollout.python={tiny_engine(tmp_path)}"
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    run_dir = tmp_path / "run"
    arguments = small_run(run_dir, *CHECKED, url)
    told = f"waiting for the rollout server at {urls[0]}, {urls[1]} (rollout.startup_timeout_s="
    with LiveRun(run_dir, *arguments, MEGAFORK_API_KEY="shared") as run:
        run.wait_for(lambda: told in run.told)
        with serving(folders[0], ports[0], python), serving(folders[1], ports[1], python):
            assert run.end() == 0, run.told
            assert [row["rollout/servers"] for row in run.rows] == [2, 2]
            assert all(row["mismatch/kl"] < 1e-6 for row in run.rows)
            clients = [Blocking(RolloutClient(url, "shared")) for url in urls]
            assert [client.weight_version() for client in clients] == [3, 3]  # both were pushed to


@pytest.mark.exhaustive
def test_generate_with_two_servers(tmp_path):
    """The same samples as with one, where they are seeded."""
    data = tmp_path / "data.jsonl"
    rows = (QUICKSTART / "data" / "heldout.jsonl").read_text().splitlines()[:40]
    data.write_text("\n".join(rows) + "\n")
    settings = ["data.prompt_key=prompt", "data.max_prompt_tokens=24", "rollout.samples=4"]
    settings += ["rollout.max_response_tokens=24", "rollout.seed=1", "rollout.max_num_seqs=8"]
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        model = ["--model", QUICKSTART / "model", "--data", data, "--output", folder / "out.jsonl"]
        servers = [f"rollout.servers={count}", f"rollout.python={tiny_engine(tmp_path)}"]
        done = megafork("generate", *model, *settings, *servers, mark=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [path.suffix for path in folder.glob("*.log")] == []
    one, two = (
        [(row["id"], row["sample"], row["response_ids"]) for row in lines(path)]
        for path in (tmp_path / "1" / "out.jsonl", tmp_path / "2" / "out.jsonl")
    )
    assert one == two
    assert left_over(tmp_path) == []


def push_while_one_dies(places, process_group, folder):
    """What the server that is left has, after a push in whose middle the other one died."""
    clients = [RolloutClient(*place) for place in places]
    with (
        BlockingFleet(Fleet(clients, max_num_seqs=32)) as fleet,
        make_sync(fleet.wrapped, folder, {"pp": 2}, loop=fleet) as (sync, pushing),
    ):
        fleet.wait_until_up(30.0, "KEY")
        mesh = sync.mesh
        sync.push(1)
        groups = mesh.on_rank_zero(lambda: generated(fleet))
        of_both = mismatch_check.measure(groups, sync.policy, mesh)
        pushing.pushes._members = []  # the next push makes new senders
        kill_in_the_middle(sync, process_group)
        with pytest.raises(UserError) as caught:
            sync.push(2)
        assert mesh.on_rank_zero(fleet.mark_lost) == 1
        sync.push(2)
        groups = mesh.on_rank_zero(lambda: generated(fleet))
        of_one = mismatch_check.measure(groups, sync.policy, mesh)
        num_live = mesh.on_rank_zero(lambda: fleet.num_live)
    return caught.type, of_both, of_one, num_live


def generated(fleet):
    return fleet.run(probe(fleet.wrapped, PROMPTS, SAMPLING))


def test_a_server_that_dies_of_a_push_leaves_the_other_with_whole_weights(tmp_path):
    served = reference.save_model(tmp_path / "served", tied=True, seed=1)
    trained = reference.save_model(tmp_path / "trained", tied=True, seed=2)
    options = OPTIONS | {"python": str(tiny_engine(tmp_path))}
    with (
        VllmServer(served, log_path=tmp_path / "left.log", **options) as left,
        VllmServer(served, log_path=tmp_path / "dying.log", **options) as dying,
    ):
        places = [(server.url, server.api_key) for server in (left, dying)]
        first, second = run_ranks(
            2, push_while_one_dies, places, dying.process_group, trained, timeout=200
        )
        assert Blocking(left.client()).weight_version() == 2
    assert (first[0], second[0]) == (UserError, PeerError)
    for _, of_both, of_one, num_live in (first, second):
        assert num_live == 1
        assert max(of_both.max_difference, of_one.max_difference) <= 1e-4
