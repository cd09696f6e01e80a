"""PPO with a critic is the same at every layout, and is what one process in float64 says."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from megafork.config import ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.scorer import Scores
from megafork.model.shape import ModelShape
from megafork.model.weights import export_weights
from megafork.parallel.mesh import initialize
from megafork.trainer.clock import Clock
from megafork.trainer.critic import estimate_advantages
from megafork.trainer.outcome import Optimized
from megafork.trainer.policy import BOUNDARY_EPS
from megafork.trainer.preflight import check_critic
from megafork.trainer.step import optimize
from megafork.trainer.update import update_both
from tests.helpers import reference
from tests.helpers.layouts import default_run, depth_for
from tests.helpers.ppo import (
    CLIP,
    make_critic,
    make_ppo_table,
    one_ppo_step,
    reference_ppo_step,
    save_critic,
)
from tests.helpers.step import make_policy, whole_gradients
from tests.helpers.trained import adams
from tools.benchmarks.ranks import run_ranks

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
    *((case, other, False) for case in ("pp2", "dp2") for other in ("plain", "clipped")),
]


BY_DEFAULT = [
    ("tp1-small-packs", "forking", False),
    ("tp2-sp", "forking", False),
    ("tp2-sp-cp2", "forking", False),
    ("pp2-dp2", "forking", False),
    ("pp2", "forking", True),
    ("pp2", "plain", False),
    ("dp2", "clipped", False),
]


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory):
    """The folders of policy and critic, tied or not, with as many layers as the layout needs."""

    @functools.cache
    def make(tied, layers=2):
        folder = tmp_path_factory.mktemp("models")
        policy = reference.save_model(folder / "policy", tied=tied, seed=3, layers=layers)
        return policy, save_critic(folder / "critic", tied=tied, layers=layers)

    return make


@functools.cache
def reference_of(folders, of_critic):
    return reference_ppo_step(*folders, SETTINGS[of_critic])


@pytest.mark.parametrize(
    "step", default_run(STEPS, BY_DEFAULT), ids=lambda step: "-".join(map(str, step))
)
def test_a_ppo_step_is_that_of_one_process(folders_of, step):
    """Values, advantages, both losses, every gradient of policy and critic."""
    case, of_critic, tied = step
    (layout, settings), own_settings = CASES[case], SETTINGS[of_critic]
    folders = folders_of(tied, depth_for(layout))
    truth = reference_of(folders, of_critic)
    assert truth["gap"] > 2 * BOUNDARY_EPS["float32"]
    assert (truth["clipped"] > 3) == ("clip_value" in own_settings)
    world = ParallelConfig(**layout).world_size
    ranks = run_ranks(world, one_ppo_step, *folders, layout, settings, own_settings)
    ours = {}, {}
    of_row = {}
    for rank in ranks:
        for column in ("values", "advantages"):
            assert len(rank[column]) == len(rank["rows"])
            for row, value in zip(rank["rows"].tolist(), rank[column].tolist(), strict=True):
                assert of_row.setdefault((column, row), value) == value  # the same bits
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
    for column in ("values", "advantages"):
        found = torch.tensor([of_row[column, row] for row in range(len(truth[column]))])
        assert (found - truth[column]).abs().max() <= 1e-5
    assert sum("loss" in rank["metrics"][1] for rank in ranks) == world // layout.get("pp", 1)
    for gradients, theirs in zip(ours, truth["gradients"], strict=True):
        assert set(gradients) == set(theirs)
        for name, g in theirs.items():
            error = (gradients[name] - g).abs().max() / g.abs().max()
            assert error <= 1e-5, f"{name}: {error:.2e}"


def several_minibatches(folders, layout, settings, of_critic):
    """Three updates of both: what was logged of them, and the critic's weights after them."""
    policy_folder, critic_folder = folders
    smooth = {"lr": 4e-3, "adam_eps": 1e-2, "weight_decay": 0.0, "grad_clip": 1e9}
    policy = make_policy(policy_folder, layout, **settings, **smooth)
    critic = make_critic(
        critic_folder, layout, policy.mesh, adam_eps=1e-2, **settings,
        critic={"lr": 4e-3, "weight_decay": 0.0, "clip_value": 0.02} | of_critic,
    )  # fmt: skip
    minibatches = make_ppo_table(seed=15).minibatches(2, seed=0)
    done = optimize(policy, minibatches, step=1, clock=Clock(), critic=critic)
    weights = {n: w.clone() for n, w in export_weights(critic.stages, critic.mesh, torch.clone)}
    learnt = policy.num_updates, critic.num_updates
    return done.updates, done.critic_updates, done.values, weights, learnt


@pytest.mark.parametrize("case", default_run(["tp2-sp", "pp2", "dp2"], ["pp2"]))
def test_three_updates_are_those_of_one_process(folders_of, case):
    """The later ones with what the critic has learnt before, and values clipped to the old ones."""
    folders = folders_of(False)
    [alone] = run_ranks(1, several_minibatches, folders, {}, {}, {})
    updates, critic_updates, values, weights, _ = alone
    assert critic_updates[2]["clipped"] > 0 and critic_updates[0]["clipped"] == 0
    layout, settings = CASES[case]
    world = ParallelConfig(**layout).world_size
    loaded = {}
    for rank in run_ranks(world, several_minibatches, folders, layout, settings, {}):
        for theirs, ours in ((rank[0], updates), (rank[1], critic_updates)):
            for their, our in zip(theirs, ours, strict=True):
                assert set(their) in (set(our), {"grad_norm"})
                names = set(their) & {"loss", "grad_norm", "rows"}
                assert {n: their[n] for n in names} == pytest.approx(
                    {n: our[n] for n in names}, rel=1e-4, abs=1e-5
                )
        if not math.isnan(rank[2]["value/mean"]):  # the last stage
            assert {n: rank[2][n] for n in values} == pytest.approx(values, abs=1e-5)
        loaded |= rank[3]
    assert set(loaded) == set(weights)
    assert max(float((loaded[n] - weights[n]).abs().max()) for n in weights) <= 1e-5


def test_a_critic_may_learn_alone_at_first(folders_of):
    folders = folders_of(False)
    [(updates, critic_updates, _, _, learnt)] = run_ranks(
        1, several_minibatches, folders, {}, {}, {"alone_steps": 1}
    )
    assert updates == [] and len(critic_updates) == 3 and learnt == (0, 3)


def a_first_step(path, layout, dtype):
    """Of a critic without a value head: values, its head's and its body's gradient, its head."""
    critic = make_critic(path, layout, initialize(ParallelConfig(**layout)), dtype=dtype)
    table = make_ppo_table()
    values = critic.values(table)
    rows = torch.cat([pack.rows_N for pack in critic.packs(table)])
    if not critic.mesh.is_last_stage:
        rows = rows[:0]
    scores = Scores(critic.packs(table), rows, rows.float(), rows.float())
    done = estimate_advantages(critic, [table], [scores])
    [table], [scores] = done.tables, done.scores
    gradients = []
    for _ in range(2):
        update = critic.judged_update(table, scores, torch.zeros(len(rows), dtype=torch.bool))
        gradients.append({n: float(g.abs().max()) for n, g in whole_gradients(critic).items()})
        critic.apply(update)
    shapes = {
        name: (tuple(p.shape), p.dtype)
        for stage in critic.stages
        for name, p in stage.gpt.named_parameters()
    }
    return values, gradients, shapes, critic.values(table)


@pytest.mark.parametrize(
    ("tied", "dtype"), [(True, "float32"), (False, "float32"), (False, "bfloat16")]
)
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_new_value_head_is_zero_and_learns(folders_of, layout, tied, dtype):
    """From the policy's own folder, whose vocabulary head, tied or not, has no place here."""
    world = ParallelConfig(**layout).world_size
    head = {
        "output_layer.weight": ((1, 64), torch.float32),
        "output_layer.bias": ((1,), torch.float32),
    }
    ranks = run_ranks(world, a_first_step, folders_of(tied)[0], layout, dtype)
    first, second = {}, {}
    for values, (before, after), shapes, later in ranks:
        assert not values.any()
        assert later.abs().gt(0).all() and torch.equal(later, ranks[-1][-1][: len(later)])
        first |= before
        second |= after
        found = {n: what for n, what in shapes.items() if "output_layer" in n}
        assert found in ({}, head)
    for name in ("output_layer.weight", "embedding.word_embeddings.weight"):
        assert sum(name in shapes for *_, shapes, _ in ranks) == world // layout.get("pp", 1)
    assert not any(g for name, g in first.items() if "score" not in name)
    assert first["score.weight"] > 0 and first["score.bias"] > 0
    assert all(g > 0 for g in second.values())


def a_refused_update(folders, layout, spoilt):
    """Weights of both before and after a mini-batch that one of them must refuse, and why."""
    policy = make_policy(folders[0], layout, lr=1e-2)
    critic = make_critic(folders[1], layout, policy.mesh, critic={"lr": 1e-2})
    done = estimate_advantages(critic, [make_ppo_table()], [policy.score(make_ppo_table())])
    [table], [scores] = done.tables, done.scores
    [mask], _ = policy.select([table], [scores], step=1)
    if policy.mesh.rank == policy.mesh.last_stage_rank:
        bad = getattr(scores, spoilt).clone()
        bad[mask] = torch.nan
        scores = replace(scores, **{spoilt: bad})

    def weights():
        return [
            {n: w.clone() for n, w in export_weights(m.stages, m.mesh, torch.clone)}
            for m in (policy, critic)
        ]

    before = weights()
    batch = Optimized(tables=[table], scores=[scores], masks=[mask])
    reason = update_both(policy, critic, batch, 0, 1)
    after = weights()
    unchanged = all(
        torch.equal(own[n], was[n]) for own, was in zip(after, before, strict=True) for n in own
    )
    adam = [bool(a.state) for m in (policy, critic) for a in adams(m)]
    return reason, unchanged, adam, (policy.num_updates, critic.num_updates)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize(
    ("spoilt", "whose"),
    [("returns_N", "the critic: its loss is"), ("old_logprobs_N", "its loss is")],
)
def test_both_update_or_neither(folders_of, layout, spoilt, whose):
    world = ParallelConfig(**layout).world_size
    for reason, unchanged, adam, learnt in run_ranks(
        world, a_refused_update, folders_of(False), layout, spoilt
    ):
        assert reason.startswith(whose)
        assert unchanged and not any(adam) and learnt == (0, 0)


def with_a_bad_critic(folders, layout):
    """NaN in the critic's embedding of a token that one mini-batch alone has."""
    policy = make_policy(folders[0], layout)
    critic = make_critic(folders[1], layout, policy.mesh)
    minibatches = make_ppo_table(seed=15).minibatches(2, seed=0)
    tokens = [set(m.token_R.tolist()) | set(m.prompt_ids_P.tolist()) for m in minibatches]
    token = min(tokens[1] - tokens[0] - tokens[2])
    for stage in critic.stages:
        for rule, parameter in stage.parameters():
            local = token - policy.mesh.tp_rank * len(parameter)
            if "embedding" in rule.megatron and 0 <= local < len(parameter):
                parameter.data[local] = torch.nan
    done = optimize(policy, minibatches, step=1, clock=Clock(), critic=critic)
    return [(s.number, s.reason) for s in done.skipped], len(done.critic_updates), done.values


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_nan_of_the_critic_costs_its_minibatch_alone(folders_of, layout):
    world = ParallelConfig(**layout).world_size
    known = []
    for skipped, updates, values in run_ranks(world, with_a_bad_critic, folders_of(False), layout):
        assert skipped == [(1, "a value of the critic is not finite")]
        assert updates == 2
        known.append(all(map(math.isfinite, values.values())))
    assert known == [False] * (layout.get("pp", 1) - 1) + [True] * layout.get("tp", 1)


def load_one(path):
    make_critic(path, {}, initialize(ParallelConfig()))


def test_a_classifier_of_several_labels_is_no_critic(tmp_path):
    folder = save_critic(tmp_path, tied=False, labels=3)
    with pytest.raises(AssertionError, match=r"score.weight has shape \[3, 64\], but"):
        run_ranks(1, load_one, folder)


REQUIRED = ("run.dir=r", "model.path=m", "data.train=t", "reward.verifier=a:b", "training.steps=3")


def test_a_critic_fits_the_policy_and_its_layout(tmp_path):
    policy = ModelShape.from_folder(reference.save_model(tmp_path / "policy", tied=True))
    other = reference.save_model(tmp_path / "other", tied=True, layers=3)

    def config(**critic):
        overrides = [f"critic.{key}={value}" for key, value in critic.items()]
        gae = "algorithm.advantages=gae"
        return load_config(TrainConfig, None, [*REQUIRED, gae, "parallel.pp=2", *overrides])

    check_critic(config(), policy)
    with pytest.raises(UserError, match=r"critic\.path=.*parallel\.pp=2 must divide"):
        check_critic(config(path=other), policy)
    with pytest.raises(UserError, match=r"^critic\.path=nowhere is not a folder"):
        check_critic(config(path="nowhere"), policy)
    with pytest.raises(UserError, match=r"vocab_size=251, but that of .* has 252"):
        check_critic(config(path=tmp_path / "policy"), replace(policy, vocab_size=252))
    with pytest.raises(UserError, match=r"critic\.alone_steps=3 leaves none of training\.steps=3"):
        config(alone_steps=3)


def test_settings_of_a_critic_that_there_is_not():
    with pytest.raises(
        UserError,
        match=r"critic\.lr=0.0001, critic\.tokens=forking without algorithm.advantages=gae",
    ):
        load_config(TrainConfig, None, [*REQUIRED, "critic.lr=1e-4", "critic.tokens=forking"])
    load_config(TrainConfig, None, [*REQUIRED, "critic.lr=1e-5"])  # as a saved config has it


def test_one_response_for_each_prompt_needs_a_critic():
    single = [*REQUIRED, "rollout.group_size=1"]
    gae, no_drops = "algorithm.advantages=gae", "rollout.dynamic_sampling=false"
    for settings in ([], [gae], [no_drops]):
        with pytest.raises(UserError, match=r"rollout.group_size=1 .* use 2 or more"):
            load_config(TrainConfig, None, [*single, *settings])
    assert load_config(TrainConfig, None, [*single, gae, no_drops]).rollout.group_size == 1
