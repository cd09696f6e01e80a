"""PPO with a critic is the same at every layout, and is what one process in float64 says."""

from __future__ import annotations

import functools

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.training.policy import BOUNDARY_EPS
from tests import reference
from tests.ppo import (
    CLIP,
    one_ppo_step,
    reference_ppo_step,
    save_critic,
)
from tests.ranks import run_ranks

SP = {"tp": 2, "sequence_parallel": True}
CASES = {
    "tp1": ({}, {"micro_batch_tokens": 1000}),
    "tp1-small-packs": ({}, {"micro_batch_tokens": 18}),
    "tp2": ({"tp": 2}, {}),
    "tp2-sp": (SP, {}),
    "pp2": ({"pp": 2}, {}),
    "pp4": ({"pp": 4}, {"micro_batch_tokens": 32}),
    "pp2-vpp2-dummy-packs": ({"pp": 2, "vpp": 2}, {"micro_batch_tokens": 1000}),
    "cp2": ({"cp": 2}, {"micro_batch_tokens": 32}),
    "dp2": ({"dp": 2}, {"micro_batch_tokens": 18}),
    "tp2-pp2": ({"tp": 2, "pp": 2}, {}),
    "tp2-sp-cp2": ({**SP, "cp": 2}, {"micro_batch_tokens": 32}),
    "pp2-dp2": ({"pp": 2, "dp": 2}, {}),
}
SETTINGS = {
    "plain": {},
    "clipped": {"gamma": 0.98, "gae_lambda": 0.9, "clip_value": CLIP},
    "forking": {"gae_lambda": 0.95, "clip_value": CLIP, "tokens": "forking"},
}


# All layouts with the last settings; where a tied model or other settings make a difference, those.
STEPS = [
    *((case, "forking", False) for case in CASES),
    *((case, "forking", True) for case in ("tp1", "pp2", "pp2-vpp2-dummy-packs", "tp2-pp2")),
    *((case, other, False) for case in ("pp2", "tp2-sp-cp2") for other in ("plain", "clipped")),
]


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory):
    """The folders of policy and critic, tied or not."""

    @functools.cache
    def make(tied):
        folder = tmp_path_factory.mktemp("models")
        policy = reference.save_model(folder / "policy", tied=tied, seed=3)
        return policy, save_critic(folder / "critic", tied=tied)

    return make


@functools.cache
def reference_of(folders, of_critic):
    return reference_ppo_step(*folders, SETTINGS[of_critic])


@pytest.mark.parametrize(("case", "of_critic", "tied"), STEPS)
def test_a_ppo_step_is_that_of_one_process(folders_of, case, of_critic, tied):
    """Values, advantages, both losses, every gradient of policy and critic."""
    folders, (layout, settings), own_settings = folders_of(tied), CASES[case], SETTINGS[of_critic]
    truth = reference_of(folders, of_critic)
    assert truth["gap"] > 2 * BOUNDARY_EPS["float32"]
    assert (truth["clipped"] > 3) == ("clip_value" in own_settings)
    world = ParallelConfig(**layout).world_size
    ranks = run_ranks(world, one_ppo_step, *folders, layout, settings, own_settings)
    ours = {}, {}
    for rank in ranks:
        assert torch.equal(rank["values"], ranks[0]["values"])  # the same bits on every rank
        assert torch.equal(rank["advantages"], ranks[0]["advantages"])
        for gradients, own in zip(ours, rank["gradients"], strict=True):
            gradients |= own
        for metrics, norm in zip(rank["metrics"], truth["norms"], strict=True):
            assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        if "loss" in rank["metrics"][1]:
            for metrics, loss in zip(rank["metrics"], truth["losses"], strict=True):
                assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
            counts = rank["metrics"][1]
            assert (counts["rows"], counts["clipped"]) == (truth["rows"], truth["clipped"])
        assert {n: rank["estimated"][n] for n in truth["estimated"]} == pytest.approx(
            truth["estimated"], abs=1e-5
        )
    assert (ranks[0]["values"] - truth["values"]).abs().max() <= 1e-5
    assert (ranks[0]["advantages"] - truth["advantages"]).abs().max() <= 1e-5
    assert sum("loss" in rank["metrics"][1] for rank in ranks) == world // layout.get("pp", 1)
    for gradients, theirs in zip(ours, truth["gradients"], strict=True):
        assert set(gradients) == set(theirs)
        for name, g in theirs.items():
            error = (gradients[name] - g).abs().max() / g.abs().max()
            assert error <= 1e-5, f"{name}: {error:.2e}"
