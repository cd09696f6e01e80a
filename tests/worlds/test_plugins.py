"""The plug-ins of examples/plugins at several layouts: the gradient of one process, and that of the
same formulas in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafork.algorithms.objectives import LossOutputs, needs_rows
from megafork.config import ParallelConfig
from megafork.trainer.rows import with_advantages
from tests.helpers import reference
from tests.helpers.step import (
    CLIP_HIGH,
    RHO,
    make_policy,
    make_table,
    perturbation,
    score_all,
    whole_gradients,
)
from tools.benchmarks.ranks import run_ranks

STEP = 40
OWN = "tests.worlds.test_plugins:"
EXAMPLES = {
    "objective": {"algorithm": {"objective": "examples.plugins.objective:penalized"}},
    "advantages": {"algorithm": {"advantages": "examples.plugins.advantages:leave_one_out"}},
    "selection": {"forking": {"select": "examples.plugins.selection:surprisal"}},
    "credit": {
        "algorithm": {
            "credit": ["examples.plugins.credit:by_entropy", "examples.plugins.credit:early"]
        }
    },
    "sequence": {"algorithm": {"objective": f"{OWN}of_sequences"}},
    "all": {"algorithm": {"objective": f"{OWN}of_all"}},
}
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"cp": 2}]
TOLERANCE = 1e-5


@needs_rows("sequence")
def of_sequences(inputs):
    """The mean log-ratio of a whole response as a constant factor."""
    sums_B = inputs.sums_of_sequences(inputs.logprobs_N - inputs.old_logprobs_N)
    factor_N = (sums_B[inputs.sequence_N] / inputs.num_tokens_N).exp().float()
    return LossOutputs(-factor_N * inputs.advantages_N * inputs.logprobs_N)


@needs_rows("all")
def of_all(inputs):
    """Rows without an advantage count as well."""
    return LossOutputs(-(inputs.advantages_N + 0.5) * inputs.logprobs_N)


def run_all(folder, layout):
    """On every rank, for each example: what it selected, metrics, and the gradients by HF name."""
    policy = make_policy(folder, layout, grad_clip=1e9)
    algorithm, forking = policy.algorithm, policy.forking
    found = {}
    for name, settings in EXAMPLES.items():
        policy.algorithm = algorithm.model_copy(update=settings.get("algorithm", {}))
        policy.forking = forking.model_copy(update=settings.get("forking", {}))
        table = with_advantages(make_table(), policy.algorithm)
        scores = policy.score(table)
        [mask], _ = policy.select([table], [scores], step=STEP)
        shifted = replace(
            scores, old_logprobs_N=scores.old_logprobs_N + perturbation(scores.rows_N)
        )
        metrics = policy.judged_update(table, shifted, mask, step=STEP).metrics
        found[name] = scores.rows_N[mask], metrics, whole_gradients(policy)
    return found


def reference_gradients(folder, name):
    """The formulas once more, in float64 and one process, without any of our operations."""
    model = reference.load_model(folder, torch.float64)
    table = make_table()
    logprobs, entropies = score_all(model, table)
    old = logprobs.detach() + perturbation(torch.arange(len(logprobs)))
    scores = -logprobs.detach() if name == "selection" else entropies
    mask = scores >= reference.top_threshold(scores, RHO)
    advantages = table.advantage_R.double()
    if name == "advantages":
        rewards, groups = table.reward_B.tolist(), table.group_B.tolist()
        others = [
            [r for j, r in enumerate(rewards) if groups[j] == groups[i] and i != j]
            for i in range(len(rewards))
        ]
        own = [r - sum(o) / len(o) for r, o in zip(rewards, others, strict=True)]
        advantages = torch.tensor(own, dtype=torch.float64)[table.sample_R]
    ratio = (logprobs - old).exp()
    terms = torch.min(ratio * advantages, ratio.clamp(0.8, 1 + CLIP_HIGH) * advantages)
    if name == "objective":
        terms = ratio * advantages - advantages.abs() / (2 * CLIP_HIGH) * (ratio - 1) ** 2
    if name == "sequence":
        means = [
            (logprobs - old)[table.rows(b)].mean().exp().detach() for b in range(table.num_samples)
        ]
        terms = torch.stack(means)[table.sample_R] * advantages * logprobs
    if name == "all":
        terms = (advantages + 0.5) * logprobs
    if name == "credit":
        lengths = table.response_lengths_B[table.sample_R]
        weights = (entropies / entropies.mean()).clamp(max=2.0)
        terms = terms * weights * (table.position_R < 0.7 * lengths)
    loss = -(terms * mask).sum() / len(logprobs)
    loss.backward()
    return mask.nonzero()[:, 0], {n: p.grad for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("plugins") / "model", tied=False)


@pytest.fixture(scope="module")
def alone(folder):
    [found] = run_ranks(1, run_all, folder, ParallelConfig().model_dump())
    return found


def assert_equal(gradients, expected, what):
    assert set(gradients) == set(expected)
    for name, g in expected.items():
        error = (gradients[name] - g).abs().max() / g.abs().max()
        assert error <= TOLERANCE, f"{what}, {name}: {error:.2e}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_process_is_the_formulas(folder, alone, name):
    rows, _, gradients = alone[name]
    expected_rows, expected = reference_gradients(folder, name)
    assert torch.equal(rows.sort().values, expected_rows)
    assert_equal(gradients, expected, name)


def test_the_examples_differ_from_the_built_in_rule(folder, alone):
    """Else the tests around could not tell a plug-in that is never called."""
    _, plain = reference_gradients(folder, "")
    weight = "model.embed_tokens.weight"
    for name, (_, _, gradients) in alone.items():
        assert not torch.allclose(gradients[weight].double(), plain[weight], rtol=1e-2), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_is_one_process(folder, alone, layout):
    parallel = ParallelConfig(**layout)
    ranks = run_ranks(parallel.world_size, run_all, folder, layout)
    for name, (rows, metrics, expected) in alone.items():
        gradients = {n: g for rank in ranks for n, g in rank[name][2].items()}
        assert_equal(gradients, expected, name)
        picked = torch.cat([rank[name][0] for rank in ranks]).unique()
        assert torch.equal(picked, rows.sort().values)
        for found in (rank[name][1] for rank in ranks if rank[name][1]):
            assert found == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert ranks[-1]["objective"][1]["penalized/far_fraction"] > 0
