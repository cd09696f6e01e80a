"""old_logprobs = "engine": the ratio to what was sampled from, and the passes that it saves."""

from __future__ import annotations

import pytest
import torch

from megafork.config import ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.trainer.clock import Clock
from megafork.trainer.entropy_record import entropy_record
from megafork.trainer.step import optimize
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART
from tests.helpers.step import (
    make_policy,
    make_table,
    paper_loss,
    perturbation,
    score_all,
    whole_gradients,
)
from tools.benchmarks.ranks import run_ranks


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), tied=True, seed=3)


def engines_table(folder):
    """The engine's log-probabilities are other than the trainer's; some ratios are clipped."""
    logprobs, _ = score_all(reference.load_model(folder, torch.float64), make_table())
    engines = logprobs.detach() + perturbation(torch.arange(len(logprobs)))
    return make_table().with_columns(rollout_logprob_R=engines.float())


def one_update(folder, layout, forking):
    """How often it scored, the gradients of its update, its metrics."""
    policy = make_policy(
        folder, layout, algorithm={"old_logprobs": "engine"}, forking=forking, grad_clip=1e9
    )
    calls, score = [], policy.score
    policy.score = lambda table: calls.append(1) or score(table)
    table = engines_table(folder)
    done = optimize(policy, [table], step=1, clock=Clock())
    version = int(table.policy_version_R.max())
    record = entropy_record(policy, done, policy_version=version, step=1)
    metrics = record.metrics if policy.mesh.is_last_stage else {}
    return len(calls), whole_gradients(policy), done.updates[0], metrics, record.forking_tokens


LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"cp": 2}, {"dp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nothing_is_scored_where_no_entropy_is_needed(model_folder, layout):
    model = reference.load_model(model_folder, torch.float64)
    table = engines_table(model_folder)
    logprobs, _ = score_all(model, table)
    everything = torch.ones(table.num_rows, dtype=torch.bool)
    loss = paper_loss(logprobs, table.rollout_logprob_R.double(), table, everything)
    loss.backward()
    num_ranks = ParallelConfig(**layout).world_size
    ranks = run_ranks(num_ranks, one_update, model_folder, layout, {"select": "all"})
    ours = {name: g for _, gradients, *_ in ranks for name, g in gradients.items()}
    for name, parameter in model.named_parameters():
        error = (ours[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error <= 1e-5, f"{name}: {error:.2e}"
    for calls, _, update, metrics, report in ranks:
        assert calls == 0
        assert report is None
        if metrics:
            assert abs(update["loss"] - float(loss)) <= 1e-6
            assert update["max_ratio_offset"] > 0.2
            assert metrics["entropy/mean"] != metrics["entropy/mean"]  # unknown, and said so
            assert metrics["mismatch/kl"] != metrics["mismatch/kl"]
            assert metrics["forking/kept_fraction"] == 1.0


@pytest.mark.parametrize("entropy_of", ["old", "current"])
def test_one_pass_gives_the_entropies(model_folder, entropy_of):
    forking = {"select": "top", "entropy_of": entropy_of}
    [(calls, gradients, update, metrics, _)] = run_ranks(1, one_update, model_folder, {}, forking)
    model = reference.load_model(model_folder, torch.float64)
    table = engines_table(model_folder)
    logprobs, entropies = score_all(model, table)
    mask = entropies >= reference.top_threshold(entropies, 0.2)
    loss = paper_loss(logprobs, table.rollout_logprob_R.double(), table, mask)
    loss.backward()
    assert calls == 1
    assert abs(update["loss"] - float(loss)) <= 1e-6
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error <= 1e-5, f"{name}: {error:.2e}"
    # What the trainer thinks is known then, and measured against the engine.
    difference = perturbation(torch.arange(table.num_rows)).abs().mean()
    assert abs(metrics["mismatch/mean_difference"] - float(difference)) <= 1e-5


def test_a_correction_beside_it_is_refused():
    overrides = ["algorithm.old_logprobs=engine", "mismatch.correction=truncate"]
    with pytest.raises(UserError, match=r"correction=truncate .* the ratio itself corrects"):
        load_config(TrainConfig, QUICKSTART / "config.toml", overrides)
