"""Every objective, denominator and mismatch correction is the papers' at every layout."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from megafork.algorithms import losses, objectives
from megafork.config import AlgorithmConfig, MismatchConfig
from tests.helpers.layouts import default_run, depth_for
from tests.helpers.objectives import (
    CASES,
    CLIPS,
    CORRECTIONS,
    DENOMINATORS,
    EVERY_CASE,
    PAIRS,
    Reference,
    assert_cases,
    table_of,
)
from tests.helpers.step import make_policy, perturbation, whole_gradients
from tools.benchmarks.ranks import run_ranks

SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = {
    "tp1": ({}, {"micro_batch_tokens": 1000}),
    "tp1-small-packs": ({}, {"micro_batch_tokens": 30}),
    "tp2-sp": (SP, {}),
    "pp2": ({"pp": 2}, {}),
    "cp2": ({"cp": 2}, {"micro_batch_tokens": 48}),
    "dp2-small-packs": ({"dp": 2}, {"micro_batch_tokens": 18}),
    "tp2-cp2": ({"tp": 2, "cp": 2}, {"micro_batch_tokens": 32}),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, {"micro_batch_tokens": 64}),
    "cp2-dp2": ({"cp": 2, "dp": 2}, {"micro_batch_tokens": 32}),
}
BY_DEFAULT = ("tp1-small-packs", "tp2-sp", "cp2-dp2")
OF_ALL_CASES = ("tp1-small-packs", "cp2-dp2")
"""Others have the cases in which each two choices meet: a loss does not know the layout, but for
the sums over a sequence, over packs and over replicas, which these two have."""


@functools.cache
def reference_of(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def folder(model_of):
    return model_of(False)


@pytest.fixture(scope="module")
def ref(folder):
    return reference_of(folder)


@pytest.mark.parametrize("case", default_run(LAYOUTS, BY_DEFAULT))
def test_one_step_matches_the_papers_at_every_layout(model_of, case):
    layout, settings = LAYOUTS[case]
    folder = model_of(False, depth_for(layout))
    ref = reference_of(folder)
    only = EVERY_CASE if case in OF_ALL_CASES else PAIRS
    ranks = assert_cases(folder, ref, layout, settings, only=only)
    if case == "cp2-dp2":
        assert_sequences_are_spread(ref, ranks)


def assert_sequences_are_spread(ref, ranks):
    """Else the sums over ranks would not matter: of sequences that gspo takes, several have tokens
    on both cp ranks, and selected ones on one alone; both dp ranks have some, in several packs."""
    needed = torch.tensor(ref.expected[CASES.index(GSPO)]["needed"])
    holders, selected = {}, {}
    for rank in ranks:
        assert rank["packs"] > 1
        for row in rank["rows"][needed[rank["rows"]]].tolist():
            sample = int(ref.table.sample_R[row])
            holders.setdefault(sample, set()).add(rank["place"])
            if ref.mask[row]:
                selected.setdefault(sample, set()).add(rank["place"])
    assert sum(len(places) == 2 for places in holders.values()) >= 5
    assert sum(len(holders[s]) == 2 and len(selected[s]) == 1 for s in holders) >= 2
    assert {dp for places in holders.values() for dp, _ in places} == {0, 1}


GSPO = ({"objective": "gspo", "denominator": "sequence_tokens"} | CLIPS["gspo"], {})


def test_the_cases_clip_truncate_and_mask(ref):
    """Else the tests above could not tell one from another."""
    by_objective = {"ppo": [], "gspo": [], "cispo": []}
    for (algorithm, correction), terms in zip(CASES, ref.expected, strict=True):
        by_objective[algorithm["objective"]].append(terms)
        kept = sum(slope != 0 for slope in terms["slope"])
        assert kept >= 3
        assert (terms["truncated"] > 0) == (correction.get("correction") == "truncate")
        assert (terms["masked"] > 0) == (correction.get("correction") == "mask")
        assert (terms["clip_dual"] > 0) == ("clip_dual" in algorithm)
    for found in by_objective.values():
        assert found[0]["clip_low"] > 0
        assert found[0]["clip_high"] > 0
    assert by_objective["gspo"][0]["head_rows"] > 2 * by_objective["ppo"][0]["head_rows"]
    norms = {round(terms["norm"], 9) for terms in ref.expected}
    assert len(norms) == len(CASES)


def test_each_two_choices_meet():
    chosen = [
        (algorithm["objective"], algorithm["denominator"], CORRECTIONS.index(correction))
        for algorithm, correction in (CASES[index] for index in PAIRS)
        if "clip_dual" not in algorithm
    ]
    everything = list(itertools.product(CLIPS, DENOMINATORS, range(len(CORRECTIONS))))
    for pair in itertools.combinations(range(3), 2):
        met, all_of_them = (
            {tuple(case[place] for place in pair) for case in cases}
            for cases in (chosen, everything)
        )
        assert met == all_of_them
    assert len(chosen) == 15


def sum_sequences_on_each_rank():
    exact = objectives.sequence_ratio
    objectives.sequence_ratio = lambda inputs: exact(replace(inputs, cp_group=None))


def count_the_tokens_at_hand():
    exact = losses.loss_rows

    def rows(*args, **options):
        found = exact(*args, **options)
        held = torch.bincount(found.sequence_N)[found.sequence_N]
        share = found.num_tokens_N / held
        return replace(found, num_tokens_N=held, weight_N=found.weight_N * share.float())

    losses.loss_rows = rows


def take_the_ratio_of_selected_tokens():
    losses.needed_rows = lambda gradient_N, *_: gradient_N


def count_the_sequences_of_a_rank():
    exact = losses.loss_denominator

    def denominator(table, algorithm, **options):
        value = exact(table, algorithm, **options)
        return value if algorithm.denominator == "tokens" else value // 2

    losses.loss_denominator = denominator


def correct_with_the_tokens_at_hand():
    exact = losses.importance_weights
    losses.importance_weights = lambda *args, cp_group, **options: exact(*args, **options)


MUTATIONS = [
    (sum_sequences_on_each_rank, {"cp": 2}, "gspo"),
    (count_the_tokens_at_hand, {"cp": 2}, "ppo"),
    (take_the_ratio_of_selected_tokens, {}, "gspo"),
    (count_the_sequences_of_a_rank, {"dp": 2}, "cispo"),
    (correct_with_the_tokens_at_hand, {"cp": 2}, "cispo"),
]


@pytest.mark.parametrize(
    ("mutate", "layout", "objective"), MUTATIONS, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_fault_is_caught(folder, ref, mutate, layout, objective):
    only = [index for index in PAIRS if CASES[index][0]["objective"] == objective]
    with pytest.raises(AssertionError) as caught:
        assert_cases(folder, ref, layout, {"micro_batch_tokens": 32}, mutate, only)
    assert "--- rank" not in str(caught.value), "a rank failed instead of the comparison"


def gradients_of(policy, table, scores, mask, algorithm, correction):
    policy.algorithm = AlgorithmConfig(**algorithm)
    policy.mismatch = MismatchConfig(**correction)
    policy.accumulate_gradients(table, scores, mask)
    return whole_gradients(policy)


def with_an_engine_that_agrees(folder, rollout_logprobs):
    """Bits that differ between corrected and uncorrected gradients."""
    policy = make_policy(folder, {}, micro_batch_tokens=40)
    table = table_of(rollout_logprobs)
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    shifted = replace(scores, old_logprobs_N=scores.old_logprobs_N + perturbation(scores.rows_N))
    agreed = torch.empty(table.num_rows)
    agreed[scores.rows_N] = shifted.old_logprobs_N
    table = table.with_columns(rollout_logprob_R=agreed)
    differ = []
    for algorithm, correction in (CASES[index] for index in PAIRS):
        plain, other = (
            gradients_of(policy, table, shifted, mask, algorithm, c) for c in ({}, correction)
        )
        differ += [name for name in plain if not torch.equal(plain[name], other[name])]
    return differ


def test_with_equal_policies_a_correction_changes_no_bit(folder, ref):
    arguments = (folder, ref.table.rollout_logprob_R)
    assert run_ranks(1, with_an_engine_that_agrees, *arguments) == [[]]
    corrected = [index for index in PAIRS if CASES[index][1]]
    assert len(corrected) == len(CLIPS) * len(CORRECTIONS[1:])
