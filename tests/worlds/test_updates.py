"""What an update does to the weights: AdamW with clipping, warm-up, decay, master weights."""

from __future__ import annotations

import functools
import multiprocessing

import pytest
import torch

from megafork.config import ModelConfig, ParallelConfig
from megafork.errors import UserError
from megafork.model import scorer
from megafork.model.shape import ModelShape
from megafork.parallel.mesh import shutdown
from megafork.trainer.policy import BOUNDARY_EPS
from tests.helpers import reference
from tests.helpers.layouts import default_run, depth_for
from tests.helpers.step import RHO, make_policy, make_table, paper_loss, score_all
from tools.benchmarks.ranks import run_ranks

SP = {"tp": 2, "sequence_parallel": True}
DTYPES = ("float32", "bfloat16")


def decay_only(folder):
    """An update without gradients: every advantage is 0."""
    policy = make_policy(folder, {}, lr=0.1, weight_decay=0.5, warmup_steps=2)
    before = dict(policy.export_shards())
    before = {name: value.clone() for name, value in before.items()}
    table = make_table().with_columns(advantage_R=torch.zeros(make_table().num_rows))
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    metrics = policy.update(table, scores, mask)
    assert metrics["grad_norm"] == 0.0
    return before, {name: value.clone() for name, value in policy.export_shards()}


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_and_warm_up(model_of, tied):
    [(before, after)] = run_ranks(1, decay_only, model_of(tied))
    for name, value in before.items():
        # lr is 0.1 / 2 at the first of two warm-up steps; norms are not decayed
        factor = 1.0 if "norm" in name else 1 - 0.05 * 0.5
        assert torch.allclose(after[name], value * factor, rtol=1e-6), name


STEPS, CLIP, LR, DECAY = 3, 0.05, 1e-5, 0.1


def several_updates(folder, layout):
    """The same old log-probabilities for all updates: later ratios differ from 1."""
    policy = make_policy(folder, layout, lr=LR, weight_decay=DECAY, grad_clip=CLIP)
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    norms = [policy.update(table, scores, mask)["grad_norm"] for _ in range(STEPS)]
    return norms, {name: value.clone() for name, value in policy.export_shards()}


def reference_updates(folder):
    """torch.optim.AdamW and clip_grad_norm_ in float64."""
    model = reference.load_model(folder, torch.float64)
    table = make_table()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "norm" not in n], "weight_decay": DECAY},
            {"params": [p for n, p in named.items() if "norm" in n], "weight_decay": 0.0},
        ],
        lr=LR,
    )
    old = mask = None
    norms = []
    for _ in range(STEPS):
        logprobs, entropies = score_all(model, table)
        if old is None:
            old = logprobs.detach()
            mask = entropies >= reference.top_threshold(entropies, RHO)
        optimizer.zero_grad()
        paper_loss(logprobs, old, table, mask).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return norms, {n: p.detach() for n, p in named.items()}


@functools.cache
def expected_updates(folder):
    return reference_updates(folder)


UPDATED = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-sp-cp2": {**SP, "cp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", default_run(UPDATED, ("tp1", "pp2", "dp2", "tp2-sp-cp2")))
def test_clipped_updates_are_adamw(model_of, case, tied):
    layout = UPDATED[case]
    model_folder = model_of(tied, depth_for(layout))
    expected_norms, expected = expected_updates(model_folder)
    assert min(expected_norms) > CLIP  # every update is clipped
    ranks = run_ranks(ParallelConfig(**layout).world_size, several_updates, model_folder, layout)
    for norms, _ in ranks:
        assert norms == pytest.approx(expected_norms, rel=1e-4)
    ours = {name: value for _, weights in ranks for name, value in weights.items()}
    assert set(ours) == set(expected)
    for name, value in expected.items():
        # Three AdamW steps move a weight by up to 3 lr. A float32 weight of size 1 is stated to
        # 6e-8 = 0.006 lr; where a gradient is near Adam's epsilon its direction is rounding, so
        # single elements may be off by a fraction of a step.
        difference = (ours[name] - value).abs()
        assert difference.mean() <= 1e-2 * LR, name
        assert difference.max() <= 0.2 * LR, name


def score_in_bfloat16(folder, layout):
    policy = make_policy(folder, layout, dtype="bfloat16", micro_batch_tokens=40)
    table = make_table()
    scores = policy.score(table)
    [mask], selection = policy.select([table], [scores], step=1)
    metrics = policy.update(table, scores, mask)
    return scores.rows_N, scores.entropy_N, selection, metrics


def test_bfloat16_moves_entropies_within_the_stated_eps(tmp_path):
    folder = reference.save_model(tmp_path, tied=False, dtype=torch.bfloat16, seed=3)
    entropies = {}
    for layout in ({}, {"tp": 2}, {"pp": 2, "vpp": 2}, {**SP, "cp": 2}):
        column = torch.full((make_table().num_rows,), torch.nan)
        world = ParallelConfig(**layout).world_size
        for rows, entropy, selection, metrics in run_ranks(
            world, score_in_bfloat16, folder, layout
        ):
            column[rows] = entropy
            assert metrics["grad_norm"] > 0
            if selection is not None:
                assert metrics["max_ratio_offset"] == 0.0
                assert 0.2 <= selection.kept_fraction <= 0.22
        entropies[str(layout)] = column
    first, *others = entropies.values()
    moved = [float((first - other).abs().max()) for other in others]
    assert 0 < max(moved) <= BOUNDARY_EPS["bfloat16"]


def first_ratio(folder, threads, dtype):
    policy = make_policy(folder, {}, dtype=dtype)
    torch.set_num_threads(threads)
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    offset = policy.update(table, scores, mask)["max_ratio_offset"]
    shutdown()
    return offset


@pytest.mark.slow
def test_the_first_ratio_is_1_at_any_number_of_threads(tmp_path):
    """The head runs on all rows when they are scored and on the selected ones in the update."""
    sizes = {"hidden_size": 1024, "intermediate_size": 32}
    folder = reference.save_model(tmp_path, tied=True, seed=3, layers=1, **sizes)
    cases = [(folder, threads, dtype) for threads in (1, 2, 3, 4) for dtype in DTYPES]
    # A fork would wait for the threads that its parent has had.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(first_ratio, cases) == [0.0] * len(cases)


LARGE_LR = 2.0**-10


def many_small_updates(folder, layout, float32_head):
    policy = make_policy(
        folder, layout, dtype="bfloat16", model={"float32_head": float32_head},
        lr=LARGE_LR, weight_decay=0.0, grad_clip=1e9, micro_batch_tokens=64,
    )  # fmt: skip
    dtypes = {
        rule.megatron: (p.dtype, p.main_grad.dtype)
        for stage in policy.stages
        for rule, p in stage.parameters()
    }
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    weights = []
    for count in (0, 1, 7):
        for _ in range(count):
            policy.update(table, scores, mask)
        weights.append({name: w.clone() for name, w in policy.export_shards()})
    return dtypes, weights


ADDED_UP = {
    "tp1": {},
    "tp2": {"tp": 2},
    "dp2": {"dp": 2},
    "tp2-sp-cp2": {**SP, "cp": 2},
    "pp2-vpp2-dp2": {"pp": 2, "vpp": 2, "dp": 2},
}


EVERY_HEAD = [(case, float32_head) for case in ADDED_UP for float32_head in (False, True)]
BY_DEFAULT = [("tp1", True), ("tp2", False), ("dp2", True), ("tp2-sp-cp2", False)]


@pytest.mark.parametrize(
    "case_and_head",
    default_run(EVERY_HEAD, BY_DEFAULT),
    ids=lambda value: f"{value[0]}-{'float32' if value[1] else 'bfloat16'}-head",
)
def test_bfloat16_weights_add_up_in_float32(tmp_path, case_and_head):
    """A weight of 1 to 2 is a multiple of 2^-7 in bfloat16: one step of 2^-10 rounds back to where
    it was, eight of them in float32 do not."""
    case, float32_head = case_and_head
    layout = ADDED_UP[case]
    folder = reference.save_model(tmp_path, tied=False, dtype=torch.bfloat16, seed=3)
    world = ParallelConfig(**layout).world_size
    moved, total = [0, 0], 0
    for dtypes, (start, *later) in run_ranks(
        world, many_small_updates, folder, layout, float32_head
    ):
        for name, (weight, gradient) in dtypes.items():
            in_float32 = float32_head and name == "output_layer.weight"
            assert weight == (torch.float32 if in_float32 else torch.bfloat16), name
            assert gradient == torch.float32
        assert all(weight.dtype == torch.bfloat16 for weight in start.values())
        for name, weight in start.items():
            # Eight steps of AdamW and the rounding at their end.
            bound = 1.5 * 8 * LARGE_LR + 2**-8 * weight.abs().float()
            assert ((later[1][name].float() - weight.float()).abs() <= bound).all(), name
        for name in (name for name in start if "norm" in name):
            large = (start[name].abs() > 1) & (start[name].abs() < 2)
            total += int(large.sum())
            for index, weights in enumerate(later):
                moved[index] += int((weights[name] != start[name])[large].sum())
    assert total > 200
    assert moved[0] == 0
    assert moved[1] > 0.1 * total


def types_at_the_head(folder):
    seen = set()
    exact = scorer.linear_logprob_and_entropy

    def recording(hidden, weight, *args, **options):
        seen.add((hidden.dtype, weight.dtype))
        return exact(hidden, weight, *args, **options)

    scorer.linear_logprob_and_entropy = recording
    policy = make_policy(folder, {}, dtype="bfloat16")
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    policy.update(table, scores, mask)
    return seen


def test_the_head_gets_bfloat16_hidden_states(tmp_path):
    """Cast to float32 by megatron's wrapper they would cost the tensor cores, for nothing."""
    folder = reference.save_model(tmp_path, tied=False, seed=3)
    assert run_ranks(1, types_at_the_head, folder) == [{(torch.bfloat16, torch.bfloat16)}]


def score_with_head(folder, float32_head):
    policy = make_policy(folder, {}, dtype="bfloat16", model={"float32_head": float32_head})
    return policy.score(make_table()).entropy_N


def test_a_float32_head_keeps_what_bfloat16_would_round(tmp_path):
    """A float32 checkpoint: only the head's rounding differs between the two."""
    folder = reference.save_model(tmp_path, tied=False, seed=3)
    [rounded], [kept] = (run_ranks(1, score_with_head, folder, flag) for flag in (False, True))
    assert 1e-4 < (rounded - kept).abs().max() < 0.1


def test_a_tied_head_cannot_be_float32(tmp_path):
    shape = ModelShape.from_folder(reference.save_model(tmp_path, tied=True))
    model = ModelConfig(path=str(tmp_path), float32_head=True)
    with pytest.raises(UserError, match=r"model\.float32_head=true, but this model's head is its"):
        shape.check(model, ParallelConfig())
