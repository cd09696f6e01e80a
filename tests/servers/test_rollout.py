"""The rollout server, its client and the weight transfer: real processes, against transformers.

A contract of two engines: vLLM, and the tiny engine that stands in for it where a test is about
something else. Both have to pass, so that the one says of a run what the other would.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from megafork.data.sample import Sample
from megafork.rollout.client import RolloutClient, ServerError
from megafork.rollout.sampling import (
    Sampling,
    TwoTemperatures,
)
from megafork.weights.transports import plan_buckets
from tests.helpers.blocking import Blocking
from tests.helpers.commands import members
from tests.helpers.pushes import connect, push, push_buckets, state_dict
from tests.helpers.reference import (
    VOCAB,
    load_model,
    logprobs_and_entropies,
    response_logits,
)
from tests.helpers.rollout_servers import wait_for
from tests.helpers.shared_servers import (
    ONE_OF_EACH_ENGINE,
    RANDOM_SERVERS,
    WITH_A_TIED_HEAD,
    SharedServer,
    random_server,
)

LOGPROB_TOL = 1e-4  # float32 kernels of vLLM against transformers; 4e-6 is usual
OTHER_POLICY = 0.5  # log-probabilities of two random models differ by nats
EOS = 1
# Longer than vLLM's cache block of 128 tokens on the CPU, so that a stale prefix would be used.
LONG_PROMPT = [2 + (7 * i) % (VOCAB - 2) for i in range(180)]
SHORT_PROMPT = [5, 9, 13]


policy, weights_of = functools.cache(load_model), functools.cache(state_dict)


PUSHED: dict[tuple[str, int], Path] = {}
"""What these tests have given to servers: (address, version) -> the model's folder."""


@dataclass
class Running:
    """A server that others have used, and two models: the one that it loaded, and another one."""

    server: SharedServer
    client: RolloutClient
    folders: tuple[Path, Path]
    tied: bool

    def push(self, folder: Path, **how) -> int:
        """Give the server the weights of `folder` under the next version, which is returned."""
        version = self.plain.weight_version() + 1
        push(self.plain, self.weights(folder), version, **how)
        PUSHED[self.server.url, version] = folder
        return version

    @property
    def plain(self) -> Blocking:
        """The client for plain code."""
        return Blocking(self.client)

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        return weights_of(folder, self.tied)

    def serve_first(self) -> None:
        """Push the first model's weights, unless the server has them."""
        version, first = self.plain.weight_version(), self.folders[0]
        if version != 0 and PUSHED.get((self.server.url, version)) != first:
            self.push(first)

    def generate(self, prompt: list[int], n: int, sampling: Sampling, seed: int | None = None):
        return self.generate_all([prompt], n, sampling, seed)[0]

    def generate_all(self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int | None):
        async def gather():
            return await asyncio.gather(
                *(self.client.generate(p, n, sampling, seed) for p in prompts)
            )

        return asyncio.run(gather())

    def error_against(self, folder: Path) -> float:
        """Largest difference to the log-probabilities of the model in `folder`."""
        responses = self.generate(LONG_PROMPT, 4, Sampling(max_tokens=30))
        return max_logprob_error(folder, LONG_PROMPT, responses, temperature=1.0)


@torch.no_grad()
def max_logprob_error(
    folder: Path, prompt: list[int], responses: list[Sample], temperature: float
) -> float:
    model = policy(folder)
    worst = 0.0
    for response in responses:
        logits = response_logits(model, prompt, response.token_ids) / temperature
        expected, _ = logprobs_and_entropies(logits, response.token_ids)
        worst = max(worst, (expected - torch.tensor(response.logprobs)).abs().max().item())
    return worst


@pytest.fixture(params=ONE_OF_EACH_ENGINE)
def running(request, tmp_path_factory) -> Iterator[Running]:
    """With the first model's weights."""
    torch.set_num_threads(1)  # the reference's threads would spin where the server runs
    with random_server(tmp_path_factory, request.param) as (server, folders):
        found = Running(server, server.client(), folders, tied=request.param.endswith("-tied"))
        found.serve_first()
        yield found


WITH_EITHER_HEAD = pytest.mark.parametrize("running", RANDOM_SERVERS, indirect=True)
"""Of each engine a server whose head is its embedding, and one whose head is not: for weights."""


# ------------------------------------------------------------------------- sampling


@WITH_EITHER_HEAD
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(running, temperature):
    sampling = Sampling(temperature=temperature, max_tokens=40)
    responses = running.generate(LONG_PROMPT, 8, sampling)
    assert max_logprob_error(running.folders[0], LONG_PROMPT, responses, temperature) < LOGPROB_TOL


@torch.no_grad()
def test_responses_follow_the_whole_distribution(running):
    """The folder's top_k=1 and temperature=0.1 would give the same token every time."""
    count = 4096
    responses = running.generate(SHORT_PROMPT, count, Sampling(max_tokens=1), seed=0)
    tokens = torch.tensor([response.token_ids[0] for response in responses])
    drawn = torch.bincount(tokens, minlength=VOCAB) / count
    expected = response_logits(policy(running.folders[0]), SHORT_PROMPT, [0])[0].softmax(-1)
    distance = 0.5 * (drawn - expected).abs().sum()
    noise = 0.4 * (expected * (1 - expected) / count).sqrt().sum()  # its expectation
    assert distance < 1.3 * noise


def test_stop_tokens_end_a_response_and_stay_in_it(running):
    stops = tuple(range(40))
    responses = running.generate(
        LONG_PROMPT, 24, Sampling(max_tokens=8, stop_token_ids=stops), seed=3
    )
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response in responses:
        assert len(response.logprobs) == len(response.token_ids)
        assert not any(token in stops for token in response.token_ids[:-1])
        assert (response.token_ids[-1] in stops) == (not response.truncated)
        assert not response.truncated or len(response.token_ids) == 8
    assert max_logprob_error(running.folders[0], LONG_PROMPT, responses[:6], 1.0) < LOGPROB_TOL


def test_only_stated_stop_tokens_count(running):
    """The folder's EOS token is one among others until the caller says so."""
    with torch.no_grad():
        logits = load_model(running.folders[0])(torch.arange(VOCAB)[:, None]).logits[:, -1]
    first = int(logits.softmax(-1)[:, EOS].argmax())  # which EOS follows most often
    responses = running.generate([first], 256, Sampling(max_tokens=20), seed=1)
    assert all(len(response.token_ids) == 20 for response in responses)
    assert any(EOS in response.token_ids[:-1] for response in responses)


def test_seeds_reproduce_a_full_batch(running):
    """512 requests fill the prefill budget several times; seeds and chunked prefill would crash."""
    prompts = [LONG_PROMPT[i : i + 100] for i in range(64)]
    first, second = (
        running.generate_all(prompts, 8, Sampling(max_tokens=5), seed=11) for _ in range(2)
    )
    ids, again = (
        [[response.token_ids.tolist() for response in group] for group in batch]
        for batch in (first, second)
    )
    assert ids == again
    assert len({tuple(i) for i in ids[0]}) > 1


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        ([VOCAB], "not in the vocabulary"),
        ([-1], "greater than or equal to 0, not -1"),
        ([], "at least 1 item"),
        ([5] * 300, "256"),
    ],
)
def test_bad_prompts_are_refused_and_the_server_lives(running, prompt, cause):
    with pytest.raises(ServerError, match=cause) as refused:
        running.generate(prompt, 1, Sampling(max_tokens=1))
    assert refused.value.status == 400
    assert running.generate(SHORT_PROMPT, 1, Sampling(max_tokens=1))


def test_a_server_without_two_temperatures_refuses_them(running):
    """It would sample at a temperature of 1 and say nothing."""
    asked = Sampling(max_tokens=1, forking_temperatures=TwoTemperatures(0.672, above=2.0))
    with pytest.raises(ServerError, match="without two_temperatures") as refused:
        running.generate(SHORT_PROMPT, 1, asked)
    assert refused.value.status == 400


def test_every_route_but_health_demands_the_key(running):
    url = running.server.url
    assert httpx.get(f"{url}/health", timeout=5).status_code == 200
    routes = ["/v1/models", "/v1/completions", "/megafork/generate", "/weight_info", "/pause"]
    routes += ["/megafork/update", "/megafork/connect", "/collective_rpc", "/metrics"]
    routes += ["/server_info", "/openapi.json", "/reset_prefix_cache", "/health/", "//health"]
    for route in routes:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
            for method in ("GET", "POST", "OPTIONS"):
                reply = httpx.request(method, url + route, headers=headers, json={}, timeout=5)
                assert reply.status_code == 401, (method, route)
    assert not Blocking(RolloutClient(url, "wrong")).health()
    assert running.plain.health()
    processes = members(running.server.process_group)
    assert running.server.api_key not in str([process.cmdline() for process in processes])
    sockets = [s for process in processes for s in process.net_connections("inet")]
    listening = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_a_server_listens_on_this_machine_alone(running):
    """All of its processes, on whatever port."""
    processes = members(running.server.process_group)
    sockets = [s for process in processes for s in process.net_connections("inet")]
    assert {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_a_malformed_request_is_refused_and_the_engine_goes_on(running):
    """Before the engine sees it: a token of 1.5 would stop it for good."""
    url, key = running.server.url, {"Authorization": f"Bearer {running.server.api_key}"}
    good = Sampling(max_tokens=3).request_body(SHORT_PROMPT, 1, None, request_id="malformed")
    params = good["sampling_params"]
    for wrong in (
        *({"prompt_ids": prompt} for prompt in ([1.5], [True], ["5"], [[5]], [None], [-1], [])),
        *({"prompt_ids": prompt} for prompt in ([VOCAB], [2**40], {"0": 5}, "5", 5, None)),
        *({"request_id": name} for name in (1, None, [], "")),
        *({"sampling_params": params | {"max_tokens": value}} for value in (1.5, "3", 0, None)),
        *({"sampling_params": params | {"n": value}} for value in (0, 1.5, True, 10**9)),
        {"sampling_params": params | {"seed": 2**70}},
        {"sampling_params": params | {"stop_token_ids": [1.5]}},
        {"sampling_params": params | {"unknown": 1}},
        {"sampling_params": []},
        {"unknown": 1},
    ):
        reply = httpx.post(f"{url}/megafork/generate", json=good | wrong, headers=key, timeout=30)
        assert reply.status_code == 400, (wrong, reply.text)
    for content in (b"", b"[", b"null", b"[" * 50_000):
        reply = httpx.post(f"{url}/megafork/generate", content=content, headers=key, timeout=30)
        assert reply.status_code == 400, content[:9]
    for route in ("/collective_rpc", "/v1/completions", "/server_info", "/metrics", "/docs"):
        reply = httpx.post(url + route, json={"method": "x"}, headers=key, timeout=30)
        assert reply.status_code == 404, route
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200
    [response] = running.generate(SHORT_PROMPT, 1, Sampling(max_tokens=3))
    assert len(response.token_ids) == 3


# -------------------------------------------------------------------- in the middle

LONG = Sampling(max_tokens=250)


def in_the_middle(attempt):
    """What `attempt` returns once it has acted on responses that were half done; None: it has not.

    How far responses are cannot be seen from outside. A short request beside them tells roughly,
    and on a busy machine it may tell too early or too late.
    """
    for tokens in (20, 60, 10, 120, 40):
        if (found := attempt(tokens)) is not None:
            return found
    raise AssertionError("the responses were never half done")


def half_done(responses) -> bool:
    return all(0 < len(response.token_ids) < LONG.max_tokens for response in responses)


async def ended_meanwhile(group: asyncio.Task) -> bool:
    """Of a server that lets nothing begin: responses of the group that had not begun now wait."""
    return bool((await asyncio.wait([group], timeout=20))[0])


# -------------------------------------------------------------------- weight transfer


@WITH_EITHER_HEAD
def test_pushed_weights_are_sampled_from(running):
    """Log-probabilities become the new model's, head and cached prefix included, and go back."""
    first, second = running.folders
    assert running.error_against(first) < LOGPROB_TOL
    assert running.error_against(second) > OTHER_POLICY
    for folder in (second, first, second):
        version = running.push(folder)
        assert running.plain.weight_version() == version
        assert running.error_against(folder) < LOGPROB_TOL
    assert running.error_against(first) > OTHER_POLICY


@WITH_EITHER_HEAD
@torch.no_grad()
def test_weights_that_change_in_the_middle_of_responses(running):
    """Every token is of the policy version it names, given all tokens before it."""
    first, second = running.folders
    of_version = {running.plain.weight_version(): policy(first)}

    def push_meanwhile(_):
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(running.generate, SHORT_PROMPT, 48, LONG)
            for folder in (second, first) * 4:
                of_version[running.push(folder, mode="keep")] = policy(folder)
        responses = generating.result()
        in_flight = [r for r in responses if any(first > 0 for _, first in r.versions)]
        return (responses, in_flight) if len(in_flight) >= 24 else None

    responses, in_flight = in_the_middle(push_meanwhile)
    for response in responses:
        versions, starts = zip(*response.versions, strict=True)
        assert list(versions) == sorted(versions) and starts[0] == 0
    for response in in_flight[:8]:
        ends = [*(first for _, first in response.versions[1:]), len(response.token_ids)]
        for (version, first), end in zip(response.versions, ends, strict=True):
            logits = response_logits(of_version[version], SHORT_PROMPT, response.token_ids)
            expected, _ = logprobs_and_entropies(logits, response.token_ids)
            error = expected[first:end] - torch.tensor(response.logprobs[first:end])
            assert error.abs().max() < LOGPROB_TOL


@WITH_EITHER_HEAD
def test_a_server_that_sleeps_is_pushed_to_and_lets_requests_wait(running):
    """What is in flight is aborted; what comes is sampled later, from the new weights."""
    client, plain, folder = running.client, running.plain, running.folders[1]
    weights = running.weights(folder)
    manifest = [(name, tuple(t.shape), t.dtype) for name, t in weights.items()]
    plan = plan_buckets(0, manifest, 100_000)

    async def sleep_after(tokens):
        long = asyncio.create_task(
            client.generate(SHORT_PROMPT, 48, LONG, request_id=f"cut-{tokens}")
        )
        await client.generate(LONG_PROMPT, 1, Sampling(max_tokens=tokens))
        await client.sleep()
        if await ended_meanwhile(long) and half_done(long.result()):
            return long.result()
        await asyncio.to_thread(wake)
        await long
        return None

    def give_weights():
        version = plain.weight_version() + 1
        plain.wake_up("weights")
        [sender] = connect(plain, 1, 20.0)
        plain.start_weight_update()
        push_buckets(plain, sender, plan, iter(weights.items()))
        plain.finish_weight_update(version)
        return version

    def wake():
        give_weights()
        plain.wake_up("kv_cache")

    cut = in_the_middle(lambda tokens: asyncio.run(sleep_after(tokens)))
    assert all(response.aborted for response in cut)
    plain.sleep()  # it does already
    assert plain.health()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.generate, LONG_PROMPT, 4, Sampling(max_tokens=30))
        version = give_weights()
        assert not waiting.done()
        plain.wake_up("kv_cache")
        responses = waiting.result()
    assert max_logprob_error(folder, LONG_PROMPT, responses, 1.0) < LOGPROB_TOL
    assert all(r.versions == ((version, 0),) for r in responses)
    plain.sleep()
    with pytest.raises(ServerError, match="still sleeping; wake its weights first"):
        plain.wake_up("kv_cache")
    plain.wake_up("weights")  # with nothing in them
    push(plain, weights, version + 1)


def test_aborted_requests_give_what_they_have(running):
    async def abort_after(tokens):
        client, name = running.client, f"long-{tokens}"
        long = asyncio.create_task(client.generate(SHORT_PROMPT, 48, LONG, request_id=name))
        other = asyncio.create_task(client.generate(SHORT_PROMPT, 2, Sampling(max_tokens=60)))
        await client.generate(LONG_PROMPT, 1, Sampling(max_tokens=tokens))
        await client.abort([name, "no such request"])
        return await long, await other

    def abort_in_the_middle(tokens):
        found = asyncio.run(abort_after(tokens))
        return found if half_done(found[0]) else None

    cut, other = in_the_middle(abort_in_the_middle)
    assert all(response.aborted for response in cut)
    assert all(len(r.token_ids) == len(r.logprobs) for r in cut)
    assert [len(r.token_ids) for r in other] == [60, 60]
    assert running.generate(SHORT_PROMPT, 1, Sampling(max_tokens=4), seed=None)[0].truncated


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_each_way_to_pause(running, mode):
    """What runs is frozen, finished or cut; what comes waits; what is frozen holds the cache."""
    client = running.client

    async def pause_after(tokens):
        name = f"{mode}-{tokens}"
        long = asyncio.create_task(client.generate(SHORT_PROMPT, 48, LONG, request_id=name))
        await client.generate(LONG_PROMPT, 1, Sampling(max_tokens=tokens))
        await client.pause(mode)
        late = asyncio.create_task(client.generate(SHORT_PROMPT, 1, Sampling(max_tokens=1)))
        if mode == "keep":
            reset = running.plain.reset_prefix_cache
            in_time = await asyncio.to_thread(refuses, reset, "hold the cache")
            assert not (in_time and long.done())
        elif in_time := await ended_meanwhile(long):
            await client.reset_prefix_cache()
        assert not late.done()
        await client.resume()
        await late
        responses = await long
        return responses if in_time and (mode != "abort" or half_done(responses)) else None

    responses = in_the_middle(lambda tokens: asyncio.run(pause_after(tokens)))
    assert all(response.aborted == (mode == "abort") for response in responses)
    if mode != "abort":
        assert all(len(response.token_ids) == LONG.max_tokens for response in responses)


def test_who_hangs_up_is_forgotten(running):
    """These responses would take many times as long as the server gets here to be idle."""

    async def hang_up():
        client = running.client
        long = asyncio.create_task(
            client.generate(SHORT_PROMPT, 2048, Sampling(max_tokens=250), request_id="long")
        )
        await client.generate(LONG_PROMPT, 1, Sampling(max_tokens=1), request_id="short")
        long.cancel()

    asyncio.run(hang_up())
    wait_for(lambda: not refuses(running.plain.reset_prefix_cache), seconds=10)


def refuses(call, cause: str = "") -> bool:
    try:
        call()
    except ServerError as error:
        return cause in str(error)
    return False


def failing_updates(weights: dict[str, torch.Tensor]) -> dict[str, tuple[dict, dict, str]]:
    """Name -> (weights, sabotage, what the message must say)."""
    layer = "model.layers.1.self_attn.k_proj.weight"
    missing = {name: tensor for name, tensor in weights.items() if name != layer}
    misnamed = {name.replace("k_proj.weight", "k_proj.wait"): t for name, t in weights.items()}
    misshaped = {**weights, layer: weights[layer][:-1]}
    return {
        "a missing name": (missing, {}, rf"lacks {layer}"),
        "a wrong name": (misnamed, {}, r"no .*k_proj\.wait"),
        "a wrong shape": (misshaped, {}, rf"{layer} has shape \(64, 64\).*\(63, 64\)"),
        "a sender that dies": (weights, {"second_stage_dies_at": 1}, "sender 1"),
        "a sender that hangs": (
            weights,
            {"second_stage_hangs_at": 1, "timeout_s": 2.0},
            "sender 1",
        ),
    }


@WITH_EITHER_HEAD
def test_a_failed_update_says_why_and_the_next_one_mends_it(running):
    first, second = running.folders
    weights = running.weights(first)
    version = running.plain.weight_version()
    for what, (broken, sabotage, message) in failing_updates(weights).items():
        started = time.monotonic()
        with pytest.raises(ServerError, match=message):
            push(running.plain, broken, 99, **(sabotage or {"expect": what}))
        assert time.monotonic() - started < 10, what
        assert running.plain.weight_version() == version, what
    running.push(second)
    assert running.error_against(second) < LOGPROB_TOL


@pytest.mark.parametrize("running", WITH_A_TIED_HEAD, indirect=True)
def test_tied_head_is_not_sent_twice(running):
    weights = policy(running.folders[0]).state_dict()
    with pytest.raises(ServerError, match=r"no lm_head\.weight"):
        push(running.plain, weights, 99, expect="refused")
