"""Many servers that look like one: small HTTP servers, which die, hang and come back at will."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from megafork.config import RolloutConfig
from megafork.errors import UserError
from megafork.parallel.ports import free_port
from megafork.rollout import client as client_module
from megafork.rollout import fleet as fleet_module
from megafork.rollout.assignment import Assignment, Request
from megafork.rollout.client import RolloutClient, ServerLost, ServerSlow
from megafork.rollout.engine import check_server
from megafork.rollout.fleet import Fleet
from megafork.rollout.placement import gpus_of_servers, with_trainers
from megafork.rollout.sampling import CONNECT_PATH, GENERATE_PATH, UPDATE_PATH
from tests.helpers.blocking import BlockingFleet
from tests.helpers.fleets import ask, asking, fleet_of, up
from tests.helpers.rollout_servers import SmallServer, running, wait_for


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client_module, "_ATTEMPTS", 2)
    monkeypatch.setattr(fleet_module, "_WATCH_S", 0.1)
    monkeypatch.setattr(fleet_module, "_CHECKS", 2)
    monkeypatch.setattr(fleet_module, "_AGAIN_S", 0.1)
    monkeypatch.setattr(client_module, "_CONNECT_S", 1.0)
    monkeypatch.setattr(client_module, "_HEALTH_S", 1.0)


# ----------------------------------------------------------------------- assignment


def test_assignment_against_brute_force():
    """Every decision again, from the list of all that happened."""
    draw = random.Random(5)
    for _ in range(200):
        num_servers, most = draw.randint(1, 5), draw.randint(1, 12)
        assignment, live = Assignment(num_servers, most), set()
        running_, queue = [], []  # of a plain model: (request, server), and what waits
        for _ in range(60):
            what = draw.choice(["enter", "enter", "leave", "open", "close"])
            if what == "enter":
                request = Request(draw.randint(1, 30), draw.randint(1, 8))
                queue.append(request)
                placed = assignment.enter(request)
            elif what == "leave" and (running_ or queue):
                request = draw.choice([r for r, _ in running_] + queue)
                running_ = [(r, s) for r, s in running_ if r is not request]
                queue = [r for r in queue if r is not request]
                placed = assignment.leave(request)
            elif what == "open":
                server = draw.randrange(num_servers)
                live.add(server)
                placed = assignment.open(server)
            else:
                server = draw.randrange(num_servers)
                live.discard(server)
                assignment.close(server)
                placed = []
            expected = []
            while queue:
                best = None
                for server in sorted(live):
                    own = [r for r, s in running_ if s == server]
                    if own and sum(r.num_responses for r in [*own, queue[0]]) > most:
                        continue
                    outstanding = sum(r.tokens for r in own)
                    if best is None or outstanding < best[0]:
                        best = outstanding, server
                if best is None or what == "close":
                    break
                running_.append((queue[0], best[1]))
                expected.append(queue.pop(0))
            assert placed == expected
            assert [r.server for r in placed] == [s for r, s in running_ if r in placed]


def test_gpus_of_servers():
    def of(visible, servers=1, tp=1, **options):
        rollout = RolloutConfig(servers=servers, tensor_parallel=tp)
        options = {"num_trainers": 4, "shared": False} | options
        return gpus_of_servers(rollout, visible, **options)

    eight = [str(i) for i in range(8)]
    assert of(eight, servers=2, tp=2) == [["4", "5"], ["6", "7"]]
    assert of(eight, servers=4, tp=2, shared=True) == [
        ["0", "1"],
        ["2", "3"],
        ["4", "5"],
        ["6", "7"],
    ]
    assert of(["GPU-b", "GPU-a", "7"], num_trainers=1, tp=2) == [["GPU-a", "7"]]
    assert of(["3"], num_trainers=1) == [["3"]]  # one GPU for both, at the same time
    assert of(["3"], num_trainers=0) == [["3"]]  # an evaluation
    assert with_trainers(["2", "3"], eight[:5]) == ["2", "3", "0", "1", "4"]
    for visible, options in (
        (eight, {"servers": 3, "tp": 2}),
        (eight, {"servers": 5, "tp": 2, "shared": True}),
        (eight[:4], {"servers": 5}),
        ([], {"num_trainers": 0}),
    ):
        with pytest.raises(UserError, match=r"need \d+ GPUs.* this node has"):
            of(visible, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "rollout.url=127.0.0.1:8000 is not the address"),
        ({"url": ["http://a:1", "http://b:x"]}, "rollout.url=http://b:x is not the address"),
        ({"url": "http://a:1/v1"}, "http://HOST:PORT"),
        ({"url": "http://u:p@a:1"}, "http://HOST:PORT"),
        ({"url": ["http://a:1", "http://a:1/"]}, "names http://a:1 2 times"),
        ({"url": "http://a:1", "servers": 2}, "rollout.servers=2 are to be started"),
        ({"servers": 9, "prompts_per_step": 8}, "rollout.servers=9 .*prompts_per_step=8"),
    ],
)
def test_bad_settings(settings, message, monkeypatch):
    monkeypatch.setenv("MEGAFORK_API_KEY", "key")
    with pytest.raises(UserError, match=message):
        check_server(RolloutConfig(**settings))
    check_server(RolloutConfig(url=["http://a:1", "https://b"]))


# ---------------------------------------------------------------------- generation


def push(fleet, version, num_workers=1):
    """What WeightSync does with a client."""
    members = fleet.members()
    fleet.init_transfer([{"host": "h", "port": 1}], num_workers * len(members), 5.0)
    fleet.pause("keep")
    fleet.start_weight_update()
    fleet.update_weights([])
    fleet.finish_weight_update(version)
    fleet.reset_prefix_cache(running=True)
    assert fleet.weight_version() == version
    fleet.resume()


def answers(prompts, n=2):
    return [[[p, 100 * p + i] for i in range(n)] for p in prompts]


def ids(found):
    return [[completion.token_ids.tolist() for completion in group] for group in found]


def test_the_quick_server_gets_more():
    """One holds what it has; the other answers at once."""
    with running(2) as (slow, quick), fleet_of([slow, quick], max_num_seqs=4) as fleet:
        up(fleet)
        slow.held = True
        job = asking(fleet, range(40))
        wait_for(lambda: len(quick.asked) == 36)
        assert sorted(slow.asked) == [0, 2, 4, 6]  # two times max_num_seqs responses
        slow.held = False
        for prompt in list(slow.asked):
            slow.release(prompt)
        assert ids(job.result()) == answers(range(40))


def test_a_server_that_dies_in_the_middle_and_comes_back():
    with running(3) as servers, fleet_of(servers) as fleet:
        push(up(fleet), 1, num_workers=2)
        assert [s.bodies[CONNECT_PATH]["first_worker"] for s in servers] == [0, 2, 4]
        assert {s.bodies[CONNECT_PATH]["num_workers"] for s in servers} == {6}
        dying = servers[1]
        dying.held = True
        job = asking(fleet, range(12))
        wait_for(lambda: len(dying.waiting) == 4)
        dying.kill()
        assert ids(job.result()) == answers(range(12))
        assert fleet.num_live == 2
        assert [n for n in fleet.notes if "2 others go on" in n and dying.url in n]
        again = SmallServer(dying.port)
        again.start()
        wait_for(lambda: not fleet.silent())
        ask(fleet, range(12))
        assert again.asked == []  # it has none of our weights
        before = len(fleet.notes)
        push(fleet, 2)
        assert again.bodies[CONNECT_PATH]["first_worker"] == 1
        assert again.version == 2 and not again.paused
        assert len(fleet.notes) == before + 1
        ask(fleet, range(12))
        assert len(again.asked) == 4
        assert fleet.counts() == {
            "rollout/servers": 3,
            "rollout/servers_lost": 1,
            "rollout/servers_replaced": 1,
        }
        assert fleet.counts()["rollout/servers_lost"] == 0
        again.kill()


def test_a_server_started_again_unnoticed_answers_nothing():
    """It had no request when it died, so no connection broke."""
    with running(2) as servers, fleet_of(servers) as fleet:
        push(up(fleet), 3)
        servers[0].version = 0
        assert ids(ask(fleet, range(6))) == answers(range(6))
        assert fleet.num_live == 1
        assert sorted(servers[1].asked) == sorted([1, 3, 5, 0, 2, 4])
        wait_for(lambda: not fleet.silent())
        push(fleet, 4)
        assert [s.version for s in servers] == [4, 4] and fleet.num_live == 2


def test_a_hung_server_is_drained():
    with running(2) as servers, fleet_of(servers) as fleet:
        push(up(fleet), 1)
        servers[0].held = True
        job = asking(fleet, range(4))
        wait_for(lambda: len(servers[0].waiting) == 2)
        servers[0].silent = True  # keeps its connections
        assert ids(job.result()) == answers(range(4))
        assert "health does not answer" in fleet.notes[0]


def test_a_slow_server_is_drained_and_a_slow_request_is_told():
    with running(2) as servers, fleet_of(servers, timeout_s=1.0) as fleet:
        up(fleet)
        servers[0].held = True
        assert ids(ask(fleet, [0, 1])) == answers([0, 1])
        assert "request_timeout_s=1:" in fleet.notes[0]
        for server in servers:
            server.held = True
        with pytest.raises(ServerSlow, match=r"rollout\.request_timeout_s=1:"):
            ask(fleet, [0])


def test_watching_goes_on_whatever_a_look_meets(monkeypatch):
    with running(2) as servers, fleet_of(servers) as fleet:
        push(up(fleet), 1)
        looks = []

        async def fail():
            looks.append(1)
            raise FileNotFoundError("the log is another's now")

        with monkeypatch.context() as patched:
            patched.setattr(fleet.clients[0], "is_alive", fail)
            wait_for(lambda: len(looks) > 2)
        servers[0].silent = True
        wait_for(lambda: fleet.silent() == [servers[0].url])
        assert "could not be watched: FileNotFoundError" in fleet.notes[0]


def test_what_a_server_aborts_by_itself_is_asked_of_another():
    with running(2) as servers, fleet_of(servers) as fleet:
        push(up(fleet), 1)
        servers[0].held = True
        job = asking(fleet, [0, 1])
        wait_for(lambda: len(servers[0].waiting) == 1)
        servers[0].release(0, "abort")
        found = job.result()
        assert ids(found) == answers([0, 1])
        assert not any(completion.aborted for group in found for completion in group)


def test_an_abort_reaches_servers_and_what_waits():
    with running(2) as servers, fleet_of(servers, max_num_seqs=1) as fleet:
        up(fleet)
        for server in servers:
            server.held = True

        job = asking(fleet, range(6))
        wait_for(lambda: all(len(server.waiting) == 1 for server in servers))
        fleet.abort([f"r{p}" for p in range(6)] + ["unknown"])
        found = job.result()
        assert all(c.aborted for group in found for c in group)
        assert [len(group) for group in found] == [2] * 6
        assert sum(len(group[0].token_ids) > 0 for group in found) == 2
        assert sum(len(server.asked) for server in servers) == 2


def test_no_server_is_left():
    with running(2) as servers, fleet_of(servers) as fleet:
        up(fleet)
        for server in servers:
            server.kill()
        with pytest.raises(ServerLost, match=r"no rollout server is left.*does not answer"):
            ask(fleet, range(3))
        assert not fleet.health()
        with pytest.raises(UserError, match="no rollout server came back"):
            fleet.wait_for_one(0.5)


def test_a_server_that_comes_back_during_the_question_who_was_given_up():
    """The agents are asked over the network, and the watch goes on meanwhile."""
    again = []

    async def given_up():
        if not again:
            again.append(SmallServer(servers[0].port))
            again[0].start()
        while fleet.silent():
            await asyncio.sleep(0.01)
        return {}

    with running(1) as servers, fleet_of(servers, given_up=given_up) as fleet:
        up(fleet)
        servers[0].kill()
        wait_for(fleet.silent)
        fleet.wait_for_one(10.0)
        assert fleet.silent() == []
        again[0].kill()


def test_an_error_of_the_request_is_not_the_servers():
    with running(2) as servers, fleet_of(servers) as fleet:
        up(fleet)
        servers[0].fail_next = GENERATE_PATH
        with pytest.raises(UserError, match="told to fail"):
            ask(fleet, [0])
        assert fleet.num_live == 2


# ------------------------------------------------------------------------ membership


def test_a_push_that_a_server_does_not_survive():
    with running(3) as servers, fleet_of(servers, max_restarts=1) as fleet:
        push(up(fleet), 1)
        members = fleet.members()
        fleet.pause("keep")
        servers[2].kill()
        with pytest.raises(ServerLost, match="does not answer"):
            fleet.update_weights([])
        assert fleet.mark_lost() == 1
        assert fleet.members() == members[:2]
        push(fleet, 2)
        assert [s.version for s in servers] == [2, 2, 1]
        assert fleet.num_live == 2
        # An update that fails although all servers are well is nobody's loss.
        servers[0].fail_next = UPDATE_PATH
        with pytest.raises(UserError, match="told to fail"):
            push(fleet, 3)
        assert fleet.mark_lost() == 0


def test_servers_that_come_up_after_the_run_has_begun():
    port = free_port()
    with running(1) as [first]:
        late = SmallServer(port)
        with fleet_of([first, late]) as fleet:
            waiting = threading.Thread(target=fleet.wait_until_up, args=(20.0, "KEY"))
            waiting.start()
            wait_for(lambda: len(fleet.notes) == 1)
            assert f"waiting for the rollout server at {late.url} (" in fleet.notes[0]
            late.start()
            waiting.join(20)
            assert fleet.num_live == 2
        late.kill()


def test_servers_that_never_come_are_named():
    with running(1) as [first], fleet_of([first, SmallServer(free_port())]) as fleet:
        missing = fleet.clients[1].url
        started = time.monotonic()
        with pytest.raises(UserError, match=f"rollout.url={missing} within rollout.startup_time"):
            fleet.wait_until_up(1.0, "KEY")
        assert time.monotonic() - started < 20


def test_a_wrong_key_is_told_at_once():
    with running(1) as [server]:
        fleet = BlockingFleet(Fleet([RolloutClient(server.url, "wrong")], max_num_seqs=4))
        with fleet, pytest.raises(UserError, match=r"with the key of NAME: .*401"):
            fleet.wait_until_up(600.0, "NAME")
