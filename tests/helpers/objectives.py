"""One optimizer step of every objective, denominator and mismatch correction, at any layout, and
the same in float64 from the papers' formulas: one token at a time, plain numbers, no autograd but
that of the log-probabilities.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from megafork.config import AlgorithmConfig, MismatchConfig, ParallelConfig
from tests.helpers import reference
from tests.helpers.step import (
    MAX_RESPONSE_TOKENS,
    RHO,
    make_policy,
    make_table,
    perturbation,
    score_each,
    whole_gradients,
)
from tools.benchmarks.ranks import run_ranks

OUTSIDE_LOSS = (3, 10)
"""Samples that overlong filtering takes out: they are in no count and no denominator."""

CLIPS = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"clip_low": 0.04, "clip_high": 0.06},
    "cispo": {"clip_low": 0.25, "clip_high": 0.3},
}
CLIPPED = {f"clip_{bound}": f"ratio/clip_{bound}_fraction" for bound in ("low", "high", "dual")}
"""What an update's metrics call the rows that a bound of the clip decides"""

DENOMINATORS = ("tokens", "sequence_tokens", "max_response_tokens")
CORRECTIONS = (
    {},
    {"correction": "truncate", "max_weight": 1.3},
    {"correction": "mask", "max_weight": 1.4, "min_weight": 0.6},
    {"correction": "truncate", "level": "sequence", "max_weight": 1.2},
    {"correction": "mask", "level": "sequence", "max_weight": 1.75},
)
CASES = [
    ({"objective": objective, "denominator": denominator} | clip, correction)
    for objective, clip in CLIPS.items()
    for denominator in DENOMINATORS
    for correction in CORRECTIONS
] + [({"objective": "ppo", "clip_dual": 1.35} | CLIPS["ppo"], {})]

EVERY_CASE = range(len(CASES))
PAIRS = [
    index
    for index, (algorithm, correction) in enumerate(CASES)
    if "clip_dual" in algorithm
    or DENOMINATORS.index(algorithm["denominator"])
    == (list(CLIPS).index(algorithm["objective"]) + CORRECTIONS.index(correction)) % 3
]
"""Indices of a third of CASES: every pair of objective, denominator and correction is in one"""

TOLERANCE = 1e-5
OF_SEQUENCE_WEIGHTS = 5e-5
"""A weight that is a product over up to 11 tokens has the rounding of all their log-probabilities
(about 2e-6 each in float32), which no clip or mean makes smaller."""


def engine_offset(rows):
    """How far the engine's log-probabilities are from the trainer's."""
    return 0.6 * torch.cos(rows.double() * 1.3)


def table_of(rollout_logprobs):
    table = make_table()
    loss_mask = ~torch.isin(table.sample_R, torch.tensor(OUTSIDE_LOSS))
    return table.with_columns(rollout_logprob_R=rollout_logprobs.float()).with_loss_mask(loss_mask)


class Reference:
    """The model in float64, its scores, and what each case makes of them."""

    def __init__(self, folder, cases=CASES):
        self.model = reference.load_model(folder, torch.float64)
        table = make_table()
        scored = score_each(self.model, table)
        self.logprobs, entropies = map(torch.cat, zip(*scored, strict=True))
        entropies = entropies.detach()
        rows = torch.arange(len(self.logprobs))
        self.old = self.logprobs.detach() + perturbation(rows).double()
        self.table = table_of(self.old + engine_offset(rows))
        in_loss = self.table.loss_mask_R
        tau = reference.top_threshold(entropies[in_loss], RHO)
        self.mask = in_loss & (entropies >= tau)
        assert (entropies - tau).abs().sort().values[1] > 2e-5
        self.selected = self.mask.nonzero()[:, 0].tolist()
        self.jacobian = self.gradients_of_selected([own for own, _ in scored]) if cases else {}
        self.expected = [self.case(*case) for case in cases]

    def gradients_of_selected(self, logprobs):
        """Of each parameter [selected tokens, *its shape]; logprobs: of each sample, in its own
        graph, which is all that a token's backward goes through."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        of_tokens = []
        for row in self.selected:
            sample = int(self.table.sample_R[row])
            logprob = logprobs[sample][row - self.table.offsets[sample]]
            of_tokens.append(torch.autograd.grad(logprob, parameters, retain_graph=True))
        columns = map(torch.stack, zip(*of_tokens, strict=True))
        return dict(zip(names, columns, strict=True))

    def case(self, algorithm, correction):
        terms = loss_terms(self, algorithm, correction)
        slope = torch.tensor(terms["slope"], dtype=torch.float64)
        assert not slope[~self.mask].any()
        slope = slope[self.selected]
        gradients = {n: torch.tensordot(slope, j, 1) for n, j in self.jacobian.items()}
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        return terms | {"gradients": gradients, "norm": norm}


def loss_terms(ref, algorithm, correction):
    """The loss, its slope in each token's log-probability, the rows it needs and what it clips."""
    config, mismatch = AlgorithmConfig(**algorithm), MismatchConfig(**correction)
    table, sequences = ref.table, []
    for b in range(table.num_samples):
        rows = range(table.offsets[b], table.offsets[b + 1])
        sequences += [(b, rows)] if table.loss_mask_R[table.offsets[b]] else []
    total = sum(len(rows) for _, rows in sequences)
    new, old = ref.logprobs.detach().tolist(), ref.old.tolist()
    engine = (ref.old + engine_offset(torch.arange(len(old)))).tolist()
    slope, needed, loss = [0.0] * len(new), [False] * len(new), 0.0
    counts = dict.fromkeys(("clip_low", "clip_high", "clip_dual", "truncated", "masked"), 0)
    for b, rows in sequences:
        share = {
            "tokens": total,
            "sequence_tokens": len(sequences) * len(rows),
            "max_response_tokens": len(sequences) * MAX_RESPONSE_TOKENS,
        }[config.denominator]
        advantage = float(table.advantage_R[table.offsets[b]])
        for t in rows:
            if not ref.mask[t] or advantage == 0:
                continue
            of_weight = [t] if mismatch.level == "token" else rows
            weight = math.exp(sum(old[u] - engine[u] for u in of_weight))
            weight = corrected(weight, mismatch, counts)
            if weight == 0:
                continue
            of_ratio = rows if config.objective == "gspo" else [t]
            ratio = math.exp(sum(new[u] - old[u] for u in of_ratio) / len(of_ratio))
            value, derivative = surrogate(ratio, new[t], advantage, config, counts)
            loss -= weight * value / share
            slope[t] = -weight * derivative / share
            for u in of_ratio:
                needed[u] = True
    return {"loss": loss, "slope": slope, "head_rows": sum(needed), "needed": needed, **counts}


def corrected(ratio, mismatch, counts):
    if mismatch.correction == "none":
        return 1.0
    low = 1 / mismatch.max_weight if mismatch.min_weight is None else mismatch.min_weight
    # Rounding must not decide.
    assert min(abs(ratio - bound) for bound in (low, mismatch.max_weight)) > 1e-4
    if mismatch.correction == "truncate":
        counts["truncated"] += ratio > mismatch.max_weight
        return min(ratio, mismatch.max_weight)
    inside = low <= ratio <= mismatch.max_weight
    counts["masked"] += not inside
    return ratio if inside else 0.0


def surrogate(ratio, logprob, advantage, config, counts):
    """(value, derivative in the token's log-probability)"""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    dual = config.clip_dual or math.inf
    assert min(abs(ratio - bound) for bound in (low, high, dual)) > 1e-5
    below, above = ratio < low, ratio > high
    clipped = min(max(ratio, low), high)
    if config.objective == "cispo":
        counts["clip_low"] += below
        counts["clip_high"] += above
        return clipped * advantage * logprob, clipped * advantage
    if advantage > 0:
        counts["clip_high"] += above
        return min(ratio, high) * advantage, 0.0 if above else ratio * advantage
    counts["clip_low"] += below
    counts["clip_dual"] += ratio > dual
    value = max(max(ratio, low) * advantage, dual * advantage)
    return min(value, 0.0), 0.0 if below or ratio > dual else ratio * advantage


def every_case(folder, layout, settings, rollout_logprobs, expected, mutate=None):
    """On every rank and for each case: its metrics and the error of each gradient it exports.

    The learning rate is lost in rounding, so all cases start from the same weights.
    """
    if mutate is not None:
        mutate()
    policy = make_policy(
        folder, layout, grad_clip=1e9, lr=1e-30, weight_decay=0.0, spike_factor=None, **settings
    )
    table = table_of(rollout_logprobs)
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    shifted = replace(scores, old_logprobs_N=scores.old_logprobs_N + perturbation(scores.rows_N))
    found = []
    for (algorithm, correction), wanted in zip(CASES, expected, strict=True):
        if wanted is None:
            continue
        policy.algorithm = AlgorithmConfig(**algorithm)
        policy.mismatch = MismatchConfig(**correction)
        metrics = policy.update(table, shifted, mask)
        errors = {
            name: float((g - wanted["gradients"][name]).abs().max())
            / float(wanted["gradients"][name].abs().max())
            for name, g in whole_gradients(policy).items()
        }
        found.append((metrics, errors))
    return {
        "rows": scores.rows_N,
        "mask": mask,
        "packs": len(scores.packs),
        "place": (policy.mesh.dp_rank, policy.mesh.cp_rank),
        "cases": found,
    }


def assert_cases(folder, ref, layout, settings, mutate=None, only=EVERY_CASE):
    """Run the cases on the layout's ranks and compare. `only`: indices. Returns the ranks."""
    world = ParallelConfig(**layout).world_size
    expected = [e if index in only else None for index, e in enumerate(ref.expected)]
    ranks = run_ranks(
        world, every_case, folder, layout, settings, ref.table.rollout_logprob_R, expected, mutate
    )
    for rank in ranks:
        assert torch.equal(rank["mask"], ref.mask[rank["rows"]])
    wanted = [(case, e) for case, e in zip(CASES, expected, strict=True) if e is not None]
    for index, (case, terms) in enumerate(wanted):
        bound = OF_SEQUENCE_WEIGHTS if case[1].get("level") == "sequence" else TOLERANCE
        errors = {}
        for rank in ranks:
            metrics, of_rank = rank["cases"][index]
            errors |= of_rank
            assert abs(metrics["grad_norm"] / terms["norm"] - 1) <= bound, case
            if "loss" in metrics:
                assert abs(metrics["loss"] - terms["loss"]) <= TOLERANCE, case
                for name, metric in _COUNTS.items():
                    assert metrics[metric] == terms[name], f"{case}: {name}"
        assert set(errors) == set(terms["gradients"])
        worst = max(errors, key=errors.get)
        assert errors[worst] <= bound, f"{case}, {worst}: {errors[worst]:.2e}"
    return ranks


_COUNTS = CLIPPED | {name: name for name in ("head_rows", "truncated", "masked")}
