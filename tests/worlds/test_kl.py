"""The KL to a reference and the entropy bonus: by hand, on average, as TRL's, at every layout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megafork.algorithms import losses, regularizers
from megafork.config import (
    AlgorithmConfig,
    EntropyBonusConfig,
    KLConfig,
    MismatchConfig,
    ParallelConfig,
)
from tests.helpers import reference, trl
from tests.helpers.layouts import default_run
from tests.helpers.objectives import CLIPPED, CLIPS, Reference, loss_terms
from tests.helpers.reference import near
from tests.helpers.step import (
    MAX_RESPONSE_TOKENS,
    make_policy,
    make_table,
    perturbation,
    score_all,
    whole_gradients,
)
from tools.benchmarks.ranks import run_ranks

TOLERANCE = 1e-5


# ---- one optimizer step ----

PPO, GSPO, CISPO = ({"objective": name} | clip for name, clip in CLIPS.items())
OF_SEQUENCES = {"denominator": "sequence_tokens"}
MASKED = {"correction": "mask", "max_weight": 1.4, "min_weight": 0.6}


def kl(estimator, tokens="all", *, ratio=False):
    return {"estimator": estimator, "tokens": tokens, "coefficient": 0.3, "ratio": ratio}


def bonus(tokens="forking", coefficient=0.2):
    return {"tokens": tokens, "coefficient": coefficient}


CASES = [
    (PPO, {}, {}, {}),
    (PPO, {}, kl("k3"), {}),
    (PPO, MASKED, kl("k2", "forking"), bonus("forking")),
    (PPO | OF_SEQUENCES, {}, kl("k1"), bonus("all")),
    (PPO, {}, {}, bonus("all")),
    (GSPO | OF_SEQUENCES, {}, kl("k3", "forking"), bonus("forking")),
    (GSPO, MASKED, kl("k2"), bonus("all")),
    (CISPO, MASKED, kl("k3", ratio=True), {}),
    (CISPO | {"denominator": "max_response_tokens"}, {}, kl("k1", "forking"), bonus("all")),
    (GSPO, {}, kl("k1", ratio=True), {}),
    (PPO, {}, kl("k2", "forking", ratio=True), {}),
]
COUNTS = CLIPPED | {name: name for name in ("truncated", "masked", "gradient_rows", "head_rows")}


def differentiable(model, table, temperature):
    """(log-probabilities, entropies at `temperature`) in float64, both with gradients."""
    columns = []
    for b in range(table.num_samples):
        response = table.token_R[table.rows(b)].tolist()
        z = reference.response_logits(model, table.prompt(b).tolist(), response)
        logprobs, _ = reference.logprobs_and_entropies(z, response)
        columns.append((logprobs, reference.logprobs_and_entropies(z / temperature, response)[1]))
    logprobs, entropies = (torch.cat(column) for column in zip(*columns, strict=True))
    return logprobs, entropies


class Expected:
    """Each case in float64: plain numbers for the KL, autograd for the entropies."""

    def __init__(self, folder, ref_folder, cases, entropy_temperature=1.0):
        self.ref = Reference(folder, cases=())
        self.table, self.mask = self.ref.table, self.ref.mask
        with torch.no_grad():
            model = reference.load_model(ref_folder, torch.float64)
            self.ref_logprobs, _ = score_all(model, self.table)
        self.x = (self.ref.logprobs.detach() - self.ref_logprobs).tolist()
        self.log_ratio = (self.ref.logprobs.detach() - self.ref.old).tolist()
        self.ref.logprobs, self.entropies = differentiable(
            self.ref.model, self.table, entropy_temperature
        )
        self.cases = [self.case(*case) for case in cases]

    def case(self, algorithm, correction, kl, bonus):
        terms = loss_terms(self.ref, algorithm, correction)
        kl, bonus = KLConfig(**kl), EntropyBonusConfig(**bonus)
        shares = self.shares(AlgorithmConfig(**algorithm))
        slope, needed = list(terms["slope"]), list(terms["needed"])
        value, weights = 0.0, [0.0] * len(slope)
        for t in self.table.loss_mask_R.nonzero()[:, 0].tolist():
            if kl.coefficient and (kl.tokens == "all" or self.mask[t]):
                x, needed[t] = self.x[t], True
                of_token, derivative = {
                    "k1": (x, x),
                    "k2": (x * x / 2, x),
                    "k3": (math.exp(-x) - 1 + x, 1 - math.exp(-x)),
                }[kl.estimator]
                factor = 1.0
                if kl.ratio:
                    factor, derivative = math.exp(self.log_ratio[t]), x
                value += kl.coefficient * factor * of_token * shares[t]
                slope[t] += kl.coefficient * factor * derivative * shares[t]
            if bonus.coefficient and (bonus.tokens == "all" or self.mask[t]):
                weights[t], needed[t] = -bonus.coefficient * shares[t], True
        of_entropy = (torch.tensor(weights, dtype=torch.float64) * self.entropies).sum()
        carrier = (torch.tensor(slope, dtype=torch.float64) * self.ref.logprobs).sum()
        names, parameters = zip(*self.ref.model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(carrier + of_entropy, parameters, retain_graph=True)
        of_policy = sum(s != 0 for s in terms["slope"])
        return {
            "metrics": {
                "loss": terms["loss"],
                "kl": value,
                "entropy_bonus": of_entropy.item(),
                "grad_norm": float(torch.stack([g.norm() for g in gradients]).norm()),
            },
            "counts": terms | {"head_rows": sum(needed)},
            "at_least": of_policy,
            "gradients": dict(zip(names, gradients, strict=True)),
        }

    def shares(self, config):
        table = self.table
        lengths = table.num_loss_tokens_B[table.sample_R].tolist()
        sequences = table.num_loss_sequences
        return {
            "tokens": [1 / table.num_loss_tokens] * len(lengths),
            "sequence_tokens": [1 / (sequences * max(n, 1)) for n in lengths],
            "max_response_tokens": [1 / (sequences * MAX_RESPONSE_TOKENS)] * len(lengths),
        }[config.denominator]


def every_case(folder, ref_folder, layout, settings, rollout_logprobs, mask, cases, mutate=None):
    """On every rank and for each case: its metrics and gradients. No weight moves."""
    if mutate is not None:
        mutate()
    policy = make_policy(
        folder, layout, kl=kl("k3") | {"reference": str(ref_folder)}, grad_clip=1e9, lr=1e-30,
        weight_decay=0.0, spike_factor=None, **settings,
    )  # fmt: skip
    table = make_table()
    loss_mask = ~torch.isin(table.sample_R, torch.tensor((3, 10)))
    table = table.with_columns(rollout_logprob_R=rollout_logprobs).with_loss_mask(loss_mask)
    scores = policy.score(table)
    with policy.reference.in_place():
        by_reference = policy.score(table)
    shifted = replace(
        scores,
        old_logprobs_N=scores.old_logprobs_N + perturbation(scores.rows_N),
        reference=by_reference,
    )
    found = []
    for algorithm, correction, of_kl, of_bonus in cases:
        policy.algorithm = AlgorithmConfig(**algorithm)
        policy.mismatch = MismatchConfig(**correction)
        policy.kl, policy.entropy_bonus = KLConfig(**of_kl), EntropyBonusConfig(**of_bonus)
        metrics = policy.update(table, shifted, mask[scores.rows_N])
        found.append((metrics, whole_gradients(policy)))
    return found


def assert_cases(folder, ref_folder, expected, layout, settings, cases=CASES, mutate=None):
    world = ParallelConfig(**layout).world_size
    ranks = run_ranks(
        world, every_case, folder, ref_folder, layout, settings,
        expected.table.rollout_logprob_R, expected.mask, cases, mutate,
    )  # fmt: skip
    for index, (case, wanted) in enumerate(zip(cases, expected.cases, strict=True)):
        gradients = {}
        for metrics, of_rank in (rank[index] for rank in ranks):
            gradients |= of_rank
            for name in wanted["metrics"]:
                if name in metrics:
                    assert metrics[name] == pytest.approx(
                        wanted["metrics"][name], rel=TOLERANCE, abs=1e-6
                    ), f"{case}: {name}"
            for name, metric in COUNTS.items():
                if metric in metrics and name in wanted["counts"]:
                    assert metrics[metric] == wanted["counts"][name], f"{case}: {name}"
            if "gradient_rows" in metrics:
                clipped = sum(metrics[name] for name in CLIPPED.values())
                assert wanted["at_least"] <= metrics["gradient_rows"]
                assert metrics["gradient_rows"] <= wanted["at_least"] + clipped
        assert set(gradients) == set(wanted["gradients"])
        for name, g in wanted["gradients"].items():
            error = float((gradients[name] - g).abs().max() / g.abs().max())
            assert error <= TOLERANCE, f"{case}, {name}: {error:.2e}"


@pytest.fixture(scope="module")
def folder(model_of):
    return model_of(False, 4)  # on which every term is large enough to be told from the others


@pytest.fixture(scope="module")
def ref_folder(folder, tmp_path_factory):
    return near(folder, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def expected(folder, ref_folder):
    return Expected(folder, ref_folder, CASES)


SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = {
    "tp1-small-packs": ({}, {"micro_batch_tokens": 18}),
    "tp2": ({"tp": 2}, {}),
    "tp2-sp": (SP, {}),
    "pp2": ({"pp": 2}, {}),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, {"micro_batch_tokens": 32}),
    "cp2": ({"cp": 2}, {"micro_batch_tokens": 48}),
    "dp2-small-packs": ({"dp": 2}, {"micro_batch_tokens": 18}),
}


@pytest.mark.parametrize("case", default_run(LAYOUTS, ("tp1-small-packs", "tp2-sp", "cp2")))
def test_one_step_with_the_terms_at_every_layout(folder, ref_folder, expected, case):
    assert_cases(folder, ref_folder, expected, *LAYOUTS[case])


def test_the_terms_weigh_in(expected):
    """Else the test above could not tell them: in each case, against the policy's gradient."""
    plain = expected.cases[0]
    for (algorithm, _, of_kl, of_bonus), found in zip(CASES, expected.cases, strict=True):
        assert (abs(found["metrics"]["kl"]) > 1e-3) == bool(of_kl)
        assert (found["metrics"]["entropy_bonus"] < -0.01) == bool(of_bonus)
        if algorithm == PPO and (of_kl or of_bonus):
            name = "model.layers.0.mlp.up_proj.weight"
            moved = (found["gradients"][name] - plain["gradients"][name]).norm()
            assert moved > 0.02 * plain["gradients"][name].norm()
    x = torch.tensor(expected.x)
    assert 0.1 < x.abs().mean() < 1


def test_the_bonus_is_of_the_entropy_that_selects(folder, ref_folder):
    cases = [(PPO, {}, kl("k3"), bonus("all"))]
    hot = Expected(folder, ref_folder, cases, entropy_temperature=1.5)
    settings = {"forking": {"entropy_temperature": 1.5}}
    assert_cases(folder, ref_folder, hot, {"tp": 2}, settings, cases)


def count_tokens_of_the_reach():
    """TRL's mean of the bonus."""
    exact = regularizers.entropy_loss

    def mean(entropy_N, rows, config, *, denominator):
        return exact(entropy_N, rows, config, denominator=max(int(rows.gradient_N.sum()), 1))

    regularizers.entropy_loss = mean


def correct_the_terms():
    exact = losses.loss_rows

    def rows(*args, **options):
        found = exact(*args, **options)
        return replace(found, kl_weight_N=found.kl_weight_N * found.weight_N)

    losses.loss_rows = rows


def run_the_head_on_the_policys_rows():
    exact = losses.loss_rows

    def rows(*args, **options):
        found = exact(*args, **options)
        return replace(found, needed_N=found.gradient_N)

    losses.loss_rows = rows


def take_k1_as_a_loss():
    regularizers.kl_estimate = lambda log_ratio, estimator: log_ratio


@pytest.mark.parametrize(
    ("mutate", "case"),
    [
        (count_tokens_of_the_reach, 2),
        (correct_the_terms, 2),
        (run_the_head_on_the_policys_rows, 1),
        (take_k1_as_a_loss, 3),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_fault_is_caught(folder, ref_folder, expected, mutate, case):
    alone = Expected.__new__(Expected)
    alone.__dict__ = vars(expected) | {"cases": [expected.cases[case]]}
    with pytest.raises(AssertionError) as caught:
        assert_cases(folder, ref_folder, alone, {}, {}, [CASES[case]], mutate)
    assert "--- rank" not in str(caught.value), "a rank failed instead of the comparison"


# ---- TRL ----


def with_trl(kind, of_kl, of_bonus, select):
    """(our settings and mask, TRL's settings)"""
    ours, theirs, _ = trl.OBJECTIVES[kind]
    if of_kl:
        theirs = theirs | {"beta": 0.3, "use_bias_correction_kl": of_kl["ratio"]}
    if of_bonus:
        theirs = theirs | {"entropy_coef": 0.2}
    return (ours, of_kl, of_bonus, select), theirs


# TRL's KL reaches all tokens under any mask. Its bonus is a mean of its own over the masked tokens,
# whatever the loss is divided by: the same where that is the number of tokens and all are selected.
WITH_TRL = [
    with_trl("dapo", kl("k3"), {}, "top"),
    with_trl("dapo", kl("k3", ratio=True), {}, "top"),
    with_trl("dapo", kl("k3"), bonus(), "all"),
    with_trl("grpo", kl("k3"), {}, "top"),
    with_trl("dr-grpo", kl("k3"), {}, "all"),
    with_trl("gspo", kl("k3"), {}, "all"),
    with_trl("cispo", kl("k3"), {}, "top"),
    with_trl("bnpo", {}, bonus(), "all"),
]


def steps_of_ours(folder, ref_folder, table, old, masks):
    policy = make_policy(
        folder, {}, kl=kl("k3") | {"reference": str(ref_folder)}, grad_clip=1e9, lr=1e-30,
        weight_decay=0.0, spike_factor=None,
    )  # fmt: skip
    scores = policy.score(table)
    with policy.reference.in_place():
        by_reference = policy.score(table)
    scores = replace(scores, old_logprobs_N=old[scores.rows_N], reference=by_reference)
    found = []
    for (algorithm, of_kl, of_bonus, select), _ in WITH_TRL:
        policy.algorithm = AlgorithmConfig(**algorithm)
        policy.kl, policy.entropy_bonus = KLConfig(**of_kl), EntropyBonusConfig(**of_bonus)
        metrics = policy.update(table, scores, masks[select][scores.rows_N])
        found.append((metrics, whole_gradients(policy)))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not (trl.INSTALLED / "trl").is_dir(), reason="TRL is not in .venv/trl")
def test_the_terms_are_trls(folder, ref_folder, tmp_path):
    table, old, masks = trl.make_inputs(folder)
    with torch.no_grad():
        ref_logprobs, _ = score_all(reference.load_model(ref_folder, torch.float64), table)
    cases = [(theirs, ours[-1], {}) for ours, theirs in WITH_TRL]
    theirs = trl.losses_of_trl(folder, tmp_path, table, old, masks, cases, ref_logprobs)
    [found] = run_ranks(1, steps_of_ours, folder, ref_folder, table, old, masks)
    for (case, _), (loss, wanted), (metrics, gradients) in zip(
        WITH_TRL, theirs, found, strict=True
    ):
        total = metrics["loss"] + metrics["kl"] + metrics["entropy_bonus"]
        assert total == pytest.approx(loss, rel=2e-5, abs=1e-5), case
        for name, g in wanted.items():
            error = (gradients[name] - g).abs().max() / g.abs().max()
            assert error <= trl.OF_ALL_TOKENS, f"{case}, {name}: {error:.2e}"
