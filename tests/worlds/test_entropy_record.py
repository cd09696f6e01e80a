"""Which tokens fork: counts and entropies by token id against loops, at every layout."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.metrics.log import MetricsLog
from megafork.trainer.clock import Clock
from megafork.trainer.entropy_record import TokenCounts, entropy_record, most_forking
from megafork.trainer.step import optimize
from tests.helpers import reference
from tests.helpers.step import RHO, make_policy, make_table, score_all
from tools.benchmarks.ranks import run_ranks


def make_minibatches():
    """Two of three prompts each, with ids folded to 2..10 so that they repeat; some responses are
    out of the loss."""
    table = make_table(seed=15)
    table = table.with_columns(token_R=table.token_R % 9 + 2).with_loss_mask(
        table.sample_R % 5 != 1
    )
    return table.minibatches(3, seed=0)


def reported(folder, layout, scope):
    forking = {"report_tokens": 5, "report_min_count": 3, "scope": scope}
    policy = make_policy(folder, layout, forking=forking, micro_batch_tokens=40, lr=1e-5)
    done = optimize(policy, make_minibatches(), step=1, clock=Clock())
    return entropy_record(policy, done, policy_version=0, step=1).forking_tokens


def expected_report(folder):
    """Loops in float64."""
    model = reference.load_model(folder, torch.float64)
    count, selected, entropy_sum = (defaultdict(float) for _ in range(3))
    for table in make_minibatches():
        with torch.no_grad():
            _, entropies = score_all(model, table)
        tau = reference.top_threshold(entropies[table.loss_mask_R], RHO)
        for token, entropy, in_loss in zip(
            table.token_R.tolist(), entropies.tolist(), table.loss_mask_R.tolist(), strict=True
        ):
            if in_loss:
                count[token] += 1
                selected[token] += entropy >= tau
                entropy_sum[token] += entropy
    mean = {token: entropy_sum[token] / count[token] for token in count}
    return count, selected, mean


@pytest.mark.parametrize(
    "layout",
    [{}, {"dp": 2}, {"cp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True, "cp": 2, "dp": 2}],
    ids=str,
)
def test_the_report_is_the_same_at_every_layout(tmp_path, layout):
    folder = reference.save_model(tmp_path, tied=False, seed=3)
    count, selected, mean = expected_report(folder)
    frequent = [token for token in mean if count[token] >= 3]
    assert len(frequent) > 5  # some are left out
    ranks = run_ranks(ParallelConfig(**layout).world_size, reported, folder, layout, "minibatch")
    for report in ranks:
        assert (report["tokens"], report["selected"]) == (
            sum(count.values()),
            sum(selected.values()),
        )
        highest, most = (
            [token["id"] for token in report[name]] for name in ("highest_entropy", "most_selected")
        )
        assert highest == sorted(frequent, key=lambda t: -mean[t])[:5]
        assert most == sorted(count, key=lambda t: (-selected[t], t))[:5]
        for token in [*report["highest_entropy"], *report["most_selected"]]:
            of = token["id"]
            assert (token["count"], token["selected"]) == (count[of], selected[of])
            assert token["mean_entropy"] == pytest.approx(mean[of], abs=1e-5)
    assert all(report == ranks[0] for report in ranks)


def test_rare_and_unselected_tokens_are_not_listed():
    counts = TokenCounts(
        id_U=torch.tensor([2, 5, 7, 9]),
        count_U=torch.tensor([10, 2, 3, 3]),
        selected_U=torch.tensor([4, 2, 0, 4]),
        entropy_U=torch.tensor([0.5, 3.0, 1.0, 1.0], dtype=torch.float64),
    )
    report = most_forking(counts, num_listed=4, min_count=3)
    assert [t["id"] for t in report["highest_entropy"]] == [7, 9, 2]
    assert [t["id"] for t in report["most_selected"]] == [2, 9, 5]
    assert report["most_selected"][0] == {"id": 2, "count": 10, "selected": 4, "mean_entropy": 0.5}
    assert (report["tokens"], report["selected"], report["min_count"]) == (18, 10, 3)
    assert len(most_forking(counts, num_listed=1, min_count=1)["highest_entropy"]) == 1


def test_a_resumed_run_writes_later_steps_again(tmp_path: Path):
    path = tmp_path / "forking_tokens.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    with MetricsLog(tmp_path, 4, tensorboard=False, steps_done=2) as log:
        log.forking_tokens(3, {"most_selected": [{"text": "é"}]})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "most_selected": [{"text": "é"}]}]
