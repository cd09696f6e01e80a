"""Any layout loads what any other saved, bit for bit, and what megatron gets wrong stays mended."""

from __future__ import annotations

import pytest
import torch

from megafork.checkpoint import optimizer_state
from megafork.config import ParallelConfig
from tests.helpers import reference
from tests.helpers.trained import (
    LAYOUTS,
    adams,
    everything,
    load,
    make_trained,
    own_tensors,
    save,
    store_of,
    update,
    weights,
    without_padding,
)
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow


def train_and_save(folder, layout, target, dtype):
    policy = make_trained(folder, layout, updates=2, dtype=dtype)
    store = store_of(policy, target)
    save(policy, store, 2)
    store.finish()
    held = {name: tensor.clone() for name, tensor in own_tensors(policy).items()}
    return weights(policy), update(policy, 2), weights(policy), held


def load_and_save(folder, layout, source, target, dtype):
    policy = make_trained(folder, layout, dtype=dtype)
    load(policy, store_of(policy, source))
    loaded = weights(policy)
    store = store_of(policy, target)
    save(policy, store, 2)
    store.finish()
    policy.num_updates = 2
    return loaded, update(policy, 2), weights(policy), None


def load_back(folder, layout, sources, dtype, held):
    """Of each source: the names of this rank's tensors that are not the bits it once `held`."""
    policy = make_trained(folder, layout, updates=1, dtype=dtype)
    expected = held[policy.mesh.rank]
    differ = {}
    for source in sources:
        for tensor in own_tensors(policy).values():
            tensor.fill_(7)  # so that what the checkpoint does not replace is seen
        load(policy, store_of(policy, source))
        found = own_tensors(policy)
        assert set(found) == set(expected)
        differ[source.name] = [n for n in expected if not torch.equal(found[n], expected[n])]
    return differ


def run(layout, function, *arguments):
    ranks = run_ranks(ParallelConfig(**LAYOUTS[layout]).world_size, function, *arguments)
    loaded, later, norms = {}, {}, ranks[0][1]
    for first, own_norms, last, _ in ranks:
        assert own_norms == norms
        loaded |= first
        later |= last
    return loaded, norms, later, [held for *_, held in ranks]


@pytest.mark.parametrize(
    ("source", "targets", "tied", "dtype"),
    [
        ("tp2-pp2", ["tp1", "tp4", "pp2", "dp2", "tp2-pp2"], False, "float32"),
        ("pp2-vpp2", ["tp2", "pp2-vpp2"], True, "float32"),
        ("dp4", ["tp2-cp2", "dp4"], False, "bfloat16"),
    ],
)
def test_a_layout_loads_what_another_saved_and_back(tmp_path, source, targets, tied, dtype):
    model = reference.save_model(tmp_path / "model", tied=tied, seed=3, kv_heads=4)
    saved, norms, after, held = run(
        source, train_and_save, model, LAYOUTS[source], tmp_path / source, dtype
    )
    [original] = run_ranks(1, everything, tmp_path / source / "step_000002")
    kinds = {name.split(".")[2] for name in original if name.startswith("optimizer.state.")}
    assert kinds == {"exp_avg", "exp_avg_sq", "param"}
    folders = [tmp_path / f"{source}-{layout}" for layout in targets]
    for layout, folder in zip(targets, folders, strict=True):
        loaded, their_norms, later, _ = run(
            layout, load_and_save, model, LAYOUTS[layout], tmp_path / source, folder, dtype
        )
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        [again] = run_ranks(1, everything, folder / "step_000002")
        assert set(again) == set(original)
        for name, tensor in original.items():
            pair = without_padding(name, tensor), without_padding(name, again[name])
            assert torch.equal(*pair), f"{layout}: {name}"
        # Training goes on as it would have: Adam's count of steps has come along too.
        tolerance = 1e-4 if dtype == "float32" else 2e-2
        assert their_norms == pytest.approx(norms, rel=tolerance)
        if layout == source:
            assert their_norms == norms
            assert all(torch.equal(after[name], later[name]) for name in after)
    ranks = run_ranks(len(held), load_back, model, LAYOUTS[source], folders, dtype, held)
    assert ranks == [{folder.name: [] for folder in folders}] * len(held)


@pytest.fixture(scope="module")
def after_two_updates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = reference.save_model(folder / "model", tied=False, seed=3)
    target = folder / "out"
    _, norms, after, _ = run("dp2", train_and_save, model, LAYOUTS["dp2"], target, "float32")
    return model, target, norms, after


def go_on(folder, layout, source, without):
    """Load into a policy that has not learned yet and update it twice more."""
    if without is not None:
        assert getattr(optimizer_state, without)
        setattr(optimizer_state, without, lambda _: None)
    policy = make_trained(folder, layout)
    load(policy, store_of(policy, source))
    policy.num_updates = 2
    norms = update(policy, 2)
    steps = [float(state["step"]) for adam in adams(policy) for state in adam.state.values()]
    return norms, steps, weights(policy)


def assert_goes_on(after_two_updates, without=None):
    """Adam is where it would be without the checkpoint, at another layout."""
    model, source, norms, after = after_two_updates
    ranks = run_ranks(2, go_on, model, {"tp": 2}, source, without)
    for their_norms, steps, _ in ranks:
        assert set(steps) == {4.0}, "the updates that Adam has counted"
        assert their_norms == pytest.approx(norms, rel=1e-4)
    later = {name: weight for *_, own in ranks for name, weight in own.items()}
    lr = 1e-4  # each of the two updates moved a weight by about this much
    mean = sum(float((later[n] - after[n]).abs().sum()) for n in after)
    assert mean / sum(weight.numel() for weight in after.values()) <= 1e-3 * lr


@pytest.fixture(scope="module")
def goes_on_with_all_mends(after_two_updates):
    assert_goes_on(after_two_updates)


# Without its mend megatron has no state to ask for, finds no `step` to copy, or gives one tensor to
# all parameters, which then counts every one of them as an update.
@pytest.mark.usefixtures("goes_on_with_all_mends")
@pytest.mark.parametrize(
    ("mend", "complaint"),
    [
        ("_make_adam_state", r"distrib_optimizer\.py(.|\n)*AssertionError"),
        ("_without_step", "KeyError: 'step'"),
        ("_separate_steps", "the updates that Adam has counted"),
    ],
)
def test_each_mend_of_megatron_s_resharding_is_needed(after_two_updates, mend, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_goes_on(after_two_updates, without=mend)


def save_untrained(folder, layout, target):
    policy = make_trained(folder, layout)
    store = store_of(policy, target)
    save(policy, store, 0)
    store.finish()
    return update(policy, 2)


def load_untrained(folder, layout, source):
    policy = make_trained(folder, layout)
    load(policy, store_of(policy, source))
    return update(policy, 2)


def test_a_checkpoint_before_the_first_update(tmp_path):
    """Adam has no state yet that megatron could save."""
    model = reference.save_model(tmp_path / "model", tied=False, seed=3)
    [norms, _] = run_ranks(2, save_untrained, model, {"dp": 2}, tmp_path / "out")
    [theirs, _] = run_ranks(2, load_untrained, model, {"tp": 2}, tmp_path / "out")
    assert theirs == pytest.approx(norms, rel=1e-4)
