"""Decoding with two temperatures: the arithmetic, and what a real server samples with it."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from megafork.data.sample import Sample
from megafork.rollout.client import RolloutClient, ServerError
from megafork.rollout.sampling import TWO_TEMPERATURES, Sampling, TwoTemperatures
from tests.helpers.reference import load_model, response_logits
from tests.helpers.shared_servers import ON_QUICKSTART, quickstart_server

# vLLM is imported within the tests that need it: the other workers need not spend its seconds.
pytestmark = ON_QUICKSTART
CPU = torch.device("cpu")
MODEL = Path(__file__).parents[2] / "examples/quickstart/model"
# A float32 engine against float64. A few rare tokens of the toy are off by 6e-5, once by 1.2e-4, in
# transformers' float32 too; another request's temperature would be off by 1e-2 and more.
USUAL_TOL, WORST_TOL = 1e-5, 1e-3
NEAR = 1e-5  # nats: closer to the threshold the engine may round to the other side
FALSE_ALARM = 1e-7
SURELY_WRONG = 1e-12


def distribution(logits: list[float] | Tensor, settings: TwoTemperatures | float) -> np.ndarray:
    """What a token is drawn from, in float64 and straight from the definition."""
    z = np.asarray(logits, dtype=np.float64)
    p = np.exp(z - z.max())
    p /= p.sum()
    temperature = settings
    if isinstance(settings, TwoTemperatures):
        is_fork = entropy(p) > settings.threshold
        temperature = settings.above if is_fork else settings.below
    if temperature == 0:
        return np.eye(len(z))[z.argmax()]
    q = np.exp((z - z.max()) / temperature)
    return q / q.sum()


def entropy(p: np.ndarray) -> float:
    return float(-sum(x * math.log(x) for x in p if x > 0))


# ------------------------------------------------------------------------- the arithmetic


def scaled(logits: list[list[float]], settings: list[TwoTemperatures]) -> np.ndarray:
    from megafork.vllm_plugin.two_temperatures import scale_by_entropy

    rows = torch.tensor(logits)
    before = rows.clone()
    columns = torch.tensor([[s.threshold, s.above, s.below] for s in settings])
    result = scale_by_entropy(rows, *columns.unbind(-1))
    assert torch.equal(rows, before)
    return result.double().softmax(-1).numpy()


def test_rows_are_divided_by_the_temperature_of_their_side():
    rng = random.Random(0)
    spread = torch.tensor([0.3, 3.0, 30.0]).repeat(67)[:, None]
    logits = (torch.randn(201, 50, generator=torch.Generator().manual_seed(0)) * spread).tolist()
    settings = [
        TwoTemperatures(rng.uniform(0, 4), rng.choice([0.0, 0.3, 1.0, 2.5]), rng.choice([0, 0.5]))
        for _ in logits
    ]
    expected = np.stack([distribution(z, s) for z, s in zip(logits, settings, strict=True)])
    assert np.abs(scaled(logits, settings) - expected).max() < 1e-6


def test_a_tie_with_the_threshold_is_not_above():
    """Two equal logits have an entropy of ln 2, and float32 has it exactly."""
    tie = float(torch.tensor(math.log(2)))
    below = float(torch.nextafter(torch.tensor(tie), torch.tensor(0.0)))
    row = [0.0, 0.0, -math.inf, -math.inf]
    settings = [TwoTemperatures(tie, 1.0, 0.0), TwoTemperatures(below, 1.0, 0.0)]
    assert scaled([row, row], settings).tolist() == [[1, 0, 0, 0], [0.5, 0.5, 0, 0]]


def test_impossible_tokens_stay_impossible_and_certain_ones_certain():
    nothing = -math.inf
    logits = [[nothing, 2.0, 1.0, nothing], [nothing, nothing, 5.0, nothing], [1.0, 1.0, 1.0, 0.0]]
    hot, greedy = TwoTemperatures(0.3, 3.0, 3.0), TwoTemperatures(0.3, 0.0, 0.0)
    for settings in (hot, greedy):
        expected = np.stack([distribution(z, settings) for z in logits])
        assert np.abs(scaled(logits, [settings] * 3) - expected).max() < 1e-6
    assert scaled(logits, [greedy] * 3).tolist()[2] == [1, 0, 0, 0]  # the first of equals


def test_logits_far_from_zero_lose_no_digits():
    from megafork.vllm_plugin.two_temperatures import scale_by_entropy

    logits = [-300.0 + 0.37 * i for i in range(8)]
    settings = TwoTemperatures(10.0, 1.0, 0.7)
    row = scale_by_entropy(*(torch.tensor([v]) for v in (logits, 10.0, 1.0, 0.7)))
    expected = np.log(distribution(torch.tensor(logits).double(), settings))
    assert np.abs(row.log_softmax(-1)[0].double().numpy() - expected).max() < 1e-6


def test_a_temperature_of_one_changes_no_bit():
    from megafork.vllm_plugin.two_temperatures import scale_by_entropy

    logits = torch.randn(64, 300) * torch.linspace(0, 20, 64)[:, None]
    ones = torch.ones(64)
    assert torch.equal(scale_by_entropy(logits, 3 * ones, ones, ones), logits)
    mixed = scale_by_entropy(logits, 3 * ones, 0.5 * ones, ones)
    is_same = (mixed == logits).all(-1)
    assert 0 < is_same.sum() < 64


# ------------------------------------------------------------------- vLLM's two interfaces


def params(settings: TwoTemperatures | None):
    from vllm import SamplingParams

    if settings is None:
        return SamplingParams()
    values = [settings.threshold, settings.above, settings.below]
    return SamplingParams(extra_args={TWO_TEMPERATURES: values})


def check_rows(logits: Tensor, result: Tensor, settings: list[TwoTemperatures | None]) -> None:
    for row, was, own in zip(result, logits, settings, strict=True):
        if own is None:
            assert torch.equal(row, was)
        else:
            error = row.double().softmax(-1).numpy() - distribution(was, own)
            assert np.abs(error).max() < 1e-6


def some_settings(rng: random.Random) -> TwoTemperatures | None:
    if rng.random() < 0.4:
        return None
    return TwoTemperatures(rng.uniform(1.0, 2.5), rng.uniform(0.3, 2), rng.uniform(0.3, 2))


@dataclass
class Limits:
    """The part of vLLM's config that the processor reads."""

    max_num_seqs: int = 8

    @property
    def scheduler_config(self) -> Limits:
        return self


def test_settings_follow_their_requests_through_the_batch():
    """V1: requests come into free rows, go, slide down into gaps and swap."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from megafork.vllm_plugin.two_temperatures import TwoTemperatureProcessor

    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    processor = TwoTemperatureProcessor(Limits(), CPU, False)
    rows: list[TwoTemperatures | None] = []
    num_moves = 0
    for _ in range(400):
        removed = sorted(rng.sample(range(len(rows)), rng.randint(0, len(rows))), reverse=True)
        gaps, added, moved = removed[::-1], [], []
        for new in (some_settings(rng) for _ in range(rng.randint(0, 3))):
            index = gaps.pop(0) if gaps else len(rows)  # vLLM fills the lowest gap first
            if index < 8:
                rows[index : index + 1] = [new]
                added.append((index, params(new), None, []))
        while gaps:  # the last request that is left takes the lowest gap
            last = max((i for i in range(len(rows)) if i not in gaps), default=-1)
            if last < gaps[0]:
                break
            moved.append((last, gaps[0], MoveDirectionality.UNIDIRECTIONAL))
            rows[gaps[0]] = rows[last]
            gaps = sorted([*gaps[1:], last])
        still_removed = sorted(gaps, reverse=True)
        rows = rows[: len(rows) - len(gaps)]
        if len(rows) > 1 and rng.random() < 0.5:
            a, b = rng.sample(range(len(rows)), 2)
            rows[a], rows[b] = rows[b], rows[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        num_moves += len(moved)
        taken = [i for i in removed if i in still_removed]
        has_changed = removed or added or moved
        update = BatchUpdate(len(rows), taken, added, moved)
        processor.update_state(update if has_changed else None)
        logits = 2 * torch.randn(len(rows), 12, generator=generator)
        check_rows(logits, processor.apply(logits.clone()), rows)
    assert num_moves > 100


def test_settings_follow_their_slots():
    """V2's interface, on the CPU: rows name slots, and a slot's next request may ask for nothing.

    Its buffers of tokens are None: the processor has no use for them.
    """
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsContext,
        LogitsProcRequestState,
    )

    from megafork.vllm_plugin.two_temperatures import TwoTemperatureProcessor

    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    processor = TwoTemperatureProcessor(None, LogitsProcRequestState(CPU, 8, 12, *[None] * 4))
    slots: list[TwoTemperatures | None] = [None] * 8
    for _ in range(200):
        for slot in rng.sample(range(8), 2):
            slots[slot] = some_settings(rng)
            changes = processor.add_request(slot, params(slots[slot]))
            assert changes == (slots[slot] is not None)
        processor.apply_staged_writes()
        mapping = torch.tensor(rng.sample(range(8), rng.randint(1, 5)), dtype=torch.int32)
        none = torch.zeros(0)
        context = LogitsContext(mapping, mapping, mapping.numpy(), none, none, none, none.numpy())
        logits = 2 * torch.randn(len(mapping), 12, generator=generator)
        result = processor.apply(logits.clone(), context)
        check_rows(logits, result, [slots[slot] for slot in mapping.tolist()])


# ---------------------------------------------------------------------------- a real server


@dataclass
class Running:
    client: RolloutClient
    model: torch.nn.Module
    ids: dict[str, int]

    def prompt(self, text: str) -> list[int]:
        return [self.ids[character] for character in text]

    def generate(self, requests: list[tuple[list[int], int, Sampling, int | None]]):
        async def gather() -> list[list[Sample]]:
            return await asyncio.gather(*(self.client.generate(*r) for r in requests))

        return asyncio.run(gather())

    @torch.no_grad()
    def logits(self, prompt: list[int], response: list[int]) -> np.ndarray:
        return response_logits(self.model, prompt, response).numpy()


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, torch.float64)


@pytest.fixture
def running(tmp_path_factory, model) -> Iterator[Running]:
    torch.set_num_threads(1)
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    with quickstart_server(tmp_path_factory) as server:
        yield Running(server.client(timeout_s=120), model, vocabulary)


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's test; cells that expect fewer than 5 are one cell."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:  # still too few: into the smallest of the others
        smallest = expected[:-1].argmin()
        counts[smallest] += counts[-1]
        expected[smallest] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    return float(chisquare(counts, expected, sum_check=False).pvalue)


def test_the_chi_square_of_a_table():
    """Two degrees of freedom: the tail is exp(-x / 2), x = 1.5."""
    p = chi_square_p(np.array([35.0, 25.0, 30.0]), np.array([30.0, 30.0, 30.0]))
    assert p == pytest.approx(math.exp(-0.5 * (25 + 25) / 30))


@pytest.mark.parametrize(
    ("text", "is_fork"),
    [
        ("7 13 5>30:", True),
        ("6 2 4>48:6", True),
        ("14 15 5>89:", False),
        ("6 2 4>48:6*4=24;2", False),
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_their_side(running, text, is_fork):
    prompt, count = running.prompt(text), 4096
    logits = running.logits(prompt, [0])[0]
    asked = TwoTemperatures(0.672, above=1.7, below=0.6)
    assert (entropy(distribution(logits, 1.0)) > asked.threshold) == is_fork
    sampling = Sampling(max_tokens=1, forking_temperatures=asked)
    (responses,) = running.generate([(prompt, count, sampling, 11)])
    drawn = [response.token_ids[0] for response in responses]
    counts = np.bincount(drawn, minlength=len(logits)).astype(float)
    p = chi_square_p(counts, count * distribution(logits, asked))
    print(f"\n{text}: p = {p:.3g} at the temperature asked for", end="")
    assert p > FALSE_ALARM
    for wrong in (1.0, asked.below if is_fork else asked.above):
        p = chi_square_p(counts, count * distribution(logits, wrong))
        print(f"; {p:.3g} at {wrong}", end="")
        assert p < SURELY_WRONG


def mixed_requests(running: Running) -> list[tuple[list[int], int, Sampling, None]]:
    """Many more than the batch holds, of all kinds and lengths, so that rows are reused."""
    rng, kinds = random.Random(3), []
    for i in range(160):
        sampling = Sampling(max_tokens=rng.randint(1, 60))
        if i % 4:
            threshold = rng.choice([0.05, 0.3, 0.672, 1.0])
            above, below = rng.choice([(1.6, 1.0), (1.0, 0.5), (0.5, 1.8), (1.3, 0.0), (0.0, 1.0)])
            asked = TwoTemperatures(threshold, above, below)
            sampling = replace(sampling, forking_temperatures=asked)
        elif i % 8:
            sampling = replace(sampling, temperature=0.7)
        text = (
            f"{rng.randint(1, 15)} {rng.randint(1, 15)} {rng.randint(1, 15)}>{rng.randint(1, 90)}:"
        )
        kinds.append((running.prompt(text), rng.randint(1, 3), sampling, None))
    return kinds


def test_every_logprob_in_a_mixed_batch_is_that_of_its_distribution(running):
    """And the tokens follow it: their summed surprise is as far from its mean as chance has it."""
    requests = mixed_requests(running)
    errors, sides = [], {True: 0, False: 0}
    surprise = variance = 0.0
    for (prompt, _, sampling, _), responses in zip(
        requests, running.generate(requests), strict=True
    ):
        asked = sampling.forking_temperatures
        for response in responses:
            assert len(response.token_ids) == sampling.max_tokens
            rows = running.logits(prompt, response.token_ids)
            for z, token, logprob in zip(rows, response.token_ids, response.logprobs, strict=True):
                if asked is not None:
                    distance = entropy(distribution(z, 1.0)) - asked.threshold
                    if abs(distance) < NEAR:
                        continue
                    sides[distance > 0] += 1
                q = distribution(z, asked or sampling.temperature)
                errors.append(abs(logprob - math.log(q[token])))
                surprisal = -np.log(q, where=q > 0, out=np.zeros_like(q))
                mean = (q * surprisal).sum()
                surprise += surprisal[token] - mean
                variance += (q * (surprisal - mean) ** 2).sum()
    usual, worst = np.quantile(errors, [0.98, 1.0])
    print(f"\nerrors: 98% below {usual:.2g}, largest {worst:.2g}; tokens {sides}")
    print(f"surprise {surprise / math.sqrt(variance):.2f} standard deviations from its mean")
    assert usual < USUAL_TOL and worst < WORST_TOL
    assert min(sides.values()) > 500
    assert abs(surprise) / math.sqrt(variance) < 5.5  # 4e-8


def test_temperatures_of_one_are_the_same_as_none(running):
    prompt = running.prompt("7 13 5>30:")
    plain = Sampling(max_tokens=30)
    ones = replace(plain, forking_temperatures=TwoTemperatures(0.672, 1.0, 1.0))
    first, second, third = (
        running.generate([(prompt, 24, sampling, 5)])[0] for sampling in (plain, ones, plain)
    )
    for again in (second, third):
        for one, other in zip(first, again, strict=True):
            assert np.array_equal(one.logprobs, other.logprobs)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)


@pytest.mark.parametrize(
    ("sampling", "cause"),
    [
        (Sampling(0.7, forking_temperatures=TwoTemperatures(0.5)), "leave out temperature=0.7"),
        (Sampling(top_p=0.9, forking_temperatures=TwoTemperatures(0.5)), "leave out top_p=0.9"),
        (Sampling(forking_temperatures=TwoTemperatures(0.5, -1.0)), "below 0"),
        (Sampling(forking_temperatures=TwoTemperatures(math.inf)), "finite"),
        (Sampling(forking_temperatures=TwoTemperatures("0.5")), "a valid number"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(running, sampling, cause):
    with pytest.raises(ServerError, match=cause) as refused:
        running.generate([(running.prompt("1 2 3>6:"), 1, sampling, None)])
    assert refused.value.status == 400
