"""The reference policy's weights come and go without a trace, and its selection is compared."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megafork.config import ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.data.sample import Group, Sample
from megafork.data.token_table import token_table
from megafork.errors import UserError
from megafork.model.shape import ModelShape
from megafork.trainer.clock import Clock
from megafork.trainer.entropy_record import entropy_record
from megafork.trainer.outcome import Optimized
from megafork.trainer.step import optimize
from megafork.trainer.step_record import update_metrics
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART, left_over, lines, megafork, tiny_run
from tests.helpers.layouts import depth_for
from tests.helpers.reference import near
from tests.helpers.step import make_policy, make_table
from tests.helpers.trained import load, own_tensors, save, store_of, weights
from tools.benchmarks.ranks import run_ranks

SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS = {
    "tp1": ({}, False),
    "tp2-sp": (SP, False),
    "cp2": ({"cp": 2}, True),
    "pp2-vpp2-dp2-tied": ({"pp": 2, "vpp": 2, "dp": 2}, True),
}
"""Layout, and whether the head is the embedding."""
KL = {"coefficient": 0.1}
LEARNING = {"lr": 1e-3, "weight_decay": 0.1}


def copies(policy):
    return {name: tensor.clone() for name, tensor in own_tensors(policy).items()}


def same(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


def updates(policy, count):
    table = make_table()
    for _ in range(count):
        scores = policy.score(table)
        [mask], _ = policy.select([table], [scores], step=1)
        policy.update(table, scores, mask)


def settings_of(dtype, tied):
    """With bfloat16 weights an untied head in float32, so that not all have one dtype."""
    return {"dtype": dtype, "model": {"float32_head": dtype == "bfloat16" and not tied}} | LEARNING


def come_and_go(folder, layout, settings):
    """Two updates, a pass of the reference that fails, one that does not, another update."""
    forking = {"compare_every": 1}  # a reference, and no term that would change an update
    policy = make_policy(folder, layout, forking=forking, **settings)
    table = make_table()
    initial, at_first = policy.score(table), copies(policy)
    updates(policy, 2)
    before, buffers = copies(policy), [p.data_ptr() for p in own_tensors(policy).values()]
    with pytest.raises(ZeroDivisionError), policy.reference.in_place():
        _ = 1 / 0
    after_a_failure = same(before, copies(policy))
    with policy.reference.in_place():
        inside = weights_of(policy)
        by_reference = policy.score(table)
    unmoved = same(before, copies(policy))
    assert buffers == [p.data_ptr() for p in own_tensors(policy).values()]
    own = policy.score(table)
    updates(policy, 1)
    facts = {
        "after a failure": after_a_failure,
        "after a pass": unmoved,
        "the initial weights inside": all(
            torch.equal(inside[name], at_first[name]) for name in inside
        ),
        "the initial log-probabilities": torch.equal(
            by_reference.old_logprobs_N, initial.old_logprobs_N
        )
        and torch.equal(by_reference.entropy_N, initial.entropy_N),
    }
    moved = float((own.old_logprobs_N - by_reference.old_logprobs_N).abs().sum())
    return facts, moved, copies(policy)


def without_reference(folder, layout, settings):
    policy = make_policy(folder, layout, **settings)
    assert policy.reference is None
    updates(policy, 3)
    return copies(policy)


def weights_of(policy):
    """Only what the model runs on; a main parameter in float32 is a view of it."""
    return {name: t for name, t in copies(policy).items() if not name.startswith("adam")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_the_reference_comes_and_goes_bit_for_bit(model_of, case, dtype):
    layout, tied = LAYOUTS[case]
    folder = model_of(tied, depth_for(layout))
    world = ParallelConfig(**layout).world_size
    settings = settings_of(dtype, tied)
    ranks = run_ranks(world, come_and_go, folder, layout, settings)
    plain = run_ranks(world, without_reference, folder, layout, settings)
    for (found, _, after), expected in zip(ranks, plain, strict=True):
        assert found == dict.fromkeys(found, True)
        assert same(after, expected)  # the update after it is the same, bit for bit
    assert sum(moved for _, moved, _ in ranks) > 0.1  # the policy was another one by then


def of_reference(policy, done, step=1):
    """The record's metrics of the reference policy."""
    metrics = entropy_record(policy, done, policy_version=0, step=step).metrics
    names = ("kl/reference", "forking/overlap_initial")
    return {name: metrics[name] for name in names if name in metrics}


def first_step(folder, layout):
    """A whole step of two mini-batches with KL, and what the metrics say."""
    policy = make_policy(
        folder, layout, kl=KL | {"tokens": "all"}, entropy_bonus={"coefficient": 0.01},
        forking={"compare_every": 2}, micro_batch_tokens=32, **LEARNING,
    )  # fmt: skip
    found = []
    for step in (1, 2):
        clock = Clock()
        done = optimize(policy, make_table().minibatches(3, seed=0), step=step, clock=clock)
        of_record = of_reference(policy, done, step)
        metrics = {}
        if policy.mesh.is_last_stage:
            metrics = of_record | update_metrics(done.updates, policy.terms)
        equal = all(
            torch.equal(s.reference.old_logprobs_N, s.old_logprobs_N)
            and torch.equal(s.reference.entropy_N, s.entropy_N)
            for s in done.scores
        )
        of_first = done.updates[0]
        found.append((metrics, of_first, equal, clock.seconds))
    return found


@pytest.mark.parametrize("layout", [{}, SP, {"pp": 2}, {"cp": 2}, {"dp": 2}], ids=str)
def test_a_reference_that_is_the_policy_says_so(model_of, layout):
    """At step 1 the divergence is exactly 0; at step 2 it is not, and the selections are near."""
    folder = model_of(False)
    world = ParallelConfig(**layout).world_size
    for first, second in run_ranks(world, first_step, folder, layout):
        metrics, of_first, equal, seconds = first
        assert equal
        assert not second[2] or not second[0]  # stages before the last have no scores
        assert set(seconds) == {"score", "reference", "update"}
        if not metrics:
            continue
        assert metrics["kl/reference"] == 0.0
        assert of_first["kl"] == 0.0
        assert "forking/overlap_initial" not in metrics  # not due
        later, of_second, *_ = second
        assert later["kl/reference"] > 1e-5
        assert of_second["kl"] > 0
        assert later["loss/kl"] > 0
        assert later["loss/entropy_bonus"] < 0
        assert 0.5 < later["forking/overlap_initial"] < 1.0


def without_terms(folder):
    policy = make_policy(folder, {}, kl={"reference": str(folder / "nowhere")})
    done = optimize(policy, [make_table()], step=1, clock=(clock := Clock()))
    found = of_reference(policy, done)
    return policy.reference, found, set(clock.seconds), update_metrics(done.updates, policy.terms)


def test_without_a_coefficient_there_is_no_reference(model_of):
    """Nor a read of its folder, a pass, a metric or a row of the head."""
    folder = model_of(False)
    [(held, found, phases, metrics)] = run_ranks(1, without_terms, folder)
    assert (held, found, phases) == (None, {}, {"score", "update"})
    assert not [name for name in metrics if "kl" in name or "bonus" in name]


def with_a_broken_reference(folder, broken, layout):
    policy = make_policy(folder, layout, kl=KL | {"reference": str(broken)}, **LEARNING)
    before = copies(policy)
    done = optimize(policy, [make_table()], step=1, clock=Clock())
    return [skipped.reason for skipped in done.skipped], same(before, copies(policy))


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=str)
def test_a_reference_with_a_nan_is_named_and_moves_nothing(tmp_path, layout):
    folder = reference.save_model(tmp_path / "model", tied=False, seed=3)
    model = reference.load_model(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    world = ParallelConfig(**layout).world_size
    found = run_ranks(world, with_a_broken_reference, folder, tmp_path / "broken", layout)
    reason = "a log-probability or an entropy of the reference policy is not finite"
    assert found == [([reason], True)] * world


# ---- after a checkpoint ----


def save_trained(folder, layout, output):
    policy = make_policy(folder, layout, kl=KL, **LEARNING)
    table = make_table()
    initial = policy.score(table)
    run_steps(policy, 2)
    store = store_of(policy, output)
    save(policy, store, 2)
    store.finish()
    return initial.rows_N, initial.old_logprobs_N, weights(policy)


def run_steps(policy, count):
    for step in range(1, count + 1):
        optimize(policy, [make_table()], step=step, clock=Clock())


def resume_and_score(folder, layout, output):
    policy = make_policy(folder, layout, kl=KL, **LEARNING)
    load(policy, store_of(policy, output))
    with policy.reference.in_place():
        found = policy.score(make_table())
    return found.rows_N, found.old_logprobs_N, weights(policy)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_after_a_checkpoint_the_reference_is_still_the_folder(tmp_path, model_of, layout):
    folder = model_of(False)
    whole = torch.full((make_table().num_rows,), torch.nan)
    [(rows, logprobs, trained)] = run_ranks(1, save_trained, folder, {}, tmp_path / "run")
    whole[rows] = logprobs
    for resumed in ({}, layout):
        world = ParallelConfig(**resumed).world_size
        again = {}
        for rows, logprobs, parts in run_ranks(
            world, resume_and_score, folder, resumed, tmp_path / "run"
        ):
            again |= parts
            if not resumed:
                assert torch.equal(logprobs, whole[rows])
            elif len(rows):
                assert (logprobs - whole[rows]).abs().max() <= 1e-5
        assert same(again, trained)


# ---- the comparison ----


def score_by_hand(own, other, in_loss, rho, scope):
    """One response of ten tokens (and one outside the loss), with these entropies."""

    def function(folder):
        policy = make_policy(folder, {}, forking={"rho": rho, "scope": scope, "compare_every": 1})
        samples = [
            Sample(i, [5] * (len(own) // 2), [0.0] * (len(own) // 2), False) for i in range(2)
        ]
        table = token_table([Group(0, [3, 4], 0, samples)])
        table = table.with_loss_mask(torch.tensor(in_loss, dtype=torch.bool))
        scores = policy.score(table)
        by_reference = replace(scores, entropy_N=torch.tensor(other)[scores.rows_N])
        scores = replace(scores, entropy_N=torch.tensor(own)[scores.rows_N], reference=by_reference)
        masks, selection = policy.select([table], [scores], step=1)
        theirs, _ = policy.select([table], [by_reference], step=1)
        done = Optimized([table], [scores], masks, theirs, [selection])
        return of_reference(policy, done)["forking/overlap_initial"]

    return function


OWN = [9.0, 1.0, 8.0, 2.0, 99.0, 7.0, 0.1, 6.0, 0.2, 0.3]
OTHER = [9.0, 8.0, 1.0, 2.0, 99.0, 3.0, 0.1, 7.0, 6.0, 0.2]
IN_LOSS = [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("rho", "scope", "share"),
    [
        # Top 4 of 9: {0, 2, 5, 7} against {0, 1, 7, 8}.
        (4 / 9, "minibatch", 2 / 4),
        # Top 1 of 9: {0} and {0}.
        (1 / 9, "minibatch", 1.0),
        # Half of each response: {0, 2} against {0, 1}; 3 of 5 {5, 7, 9} against {7, 8, 5}.
        (0.5, "sequence", 3 / 5),
    ],
)
def test_the_overlap_by_hand(model_of, rho, scope, share):
    folder = model_of(False)
    function = score_by_hand(OWN, OTHER, IN_LOSS, rho, scope)
    assert run_ranks(1, function, folder) == [pytest.approx(share)]


def overlap_at(folder, ref_folder, layout, forking):
    policy = make_policy(
        folder, layout, kl={"reference": str(ref_folder), "tokens": "forking"}, lr=1e-30,
        micro_batch_tokens=24, forking=forking | {"compare_every": 3},
    )  # fmt: skip
    done = optimize(policy, make_table(seed=15).minibatches(2, seed=0), step=3, clock=Clock())
    metrics = of_reference(policy, done, step=3)
    if not policy.mesh.is_last_stage:
        return None
    parts = zip(done.tables, done.scores, done.masks, done.reference_masks, strict=True)
    return metrics, [
        (t.key_R[s.rows_N], s.old_logprobs_N, s.reference.old_logprobs_N, s.entropy_N,
         s.reference.entropy_N, own, theirs)
        for t, s, own, theirs in parts
    ]  # fmt: skip


@pytest.mark.parametrize(
    "forking",
    [{"scope": "batch"}, {"select": "bottom", "scope": "sequence"}, {"entropy_of": "current"}],
    ids=str,
)
def test_the_comparison_is_the_same_at_every_layout(tmp_path, model_of, forking):
    folder = model_of(False)
    ref_folder = near(folder, tmp_path / "reference")
    values = []
    for layout in ({}, SP, {"pp": 2}, {"cp": 2}, {"dp": 2}):
        world = ParallelConfig(**layout).world_size
        ranks = run_ranks(world, overlap_at, folder, ref_folder, layout, forking)
        found = [rank for rank in ranks if rank is not None]
        tp = layout.get("tp", 1)
        columns = [
            torch.cat([part[i].double() for _, parts in found[::tp] for part in parts])
            for i in range(7)
        ]
        _, ours, theirs, _, _, mask, ref_mask = columns
        inside = mask.bool()
        k3 = ((theirs - ours).exp() - 1 - (theirs - ours))[inside].mean()
        for metrics, _ in found:
            assert metrics["kl/reference"] == pytest.approx(float(k3), rel=1e-4)
            assert metrics["forking/overlap_initial"] == float(ref_mask[inside].mean())
        values.append((float(k3), metrics["forking/overlap_initial"]))
    for value in values:
        assert value == pytest.approx(values[0], rel=1e-4)
    assert 0.4 < values[0][1] < 0.98


# ---- settings and a whole run ----


def test_a_reference_of_another_shape_is_refused(tmp_path):
    shape = ModelShape.from_folder(reference.save_model(tmp_path / "a", tied=False))
    other = reference.save_model(tmp_path / "b", tied=False, layers=2)
    with pytest.raises(UserError, match=r"kl\.reference=.*b has num_layers=2, .* has 4: give"):
        shape.check_same_build(other, setting="kl.reference")
    with pytest.raises(UserError, match=r"kl\.reference=.*c is not a folder"):
        shape.check_same_build(tmp_path / "c", setting="kl.reference")


@pytest.mark.parametrize("select", ["random", "all"])
def test_a_selection_without_entropies_is_not_compared(select):
    overrides = ["forking.compare_every=5", f"forking.select={select}"]
    with pytest.raises(
        UserError, match=rf"select={select} does not select by them: set it to 0 or select"
    ):
        load_config(TrainConfig, QUICKSTART / "config.toml", overrides)


@pytest.mark.slow
def test_a_run_with_everything_on(tmp_path):
    done = megafork(
        *tiny_run(
            tmp_path / "run", "parallel.tp=2", "kl.coefficient=0.01",
            "entropy_bonus.coefficient=0.001", "forking.compare_every=1",
        ),
        mark=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert left_over(tmp_path) == []
    first, second = lines(tmp_path / "run" / "metrics.jsonl")
    assert first["kl/reference"] == 0.0
    assert first["forking/overlap_initial"] == 1.0
    assert second["kl/reference"] > 0
    assert 0.5 < second["forking/overlap_initial"] <= 1.0
    for row in (first, second):
        assert row["ratio/first_update_max_offset"] == 0.0
        assert row["time/reference"] > 0
        assert row["loss/entropy_bonus"] < 0
        assert row["loss/kl"] >= 0
        assert math.isfinite(row["loss/policy"])
