"""The responses that are kept with their entropies, and the histogram: the same at every layout."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.metrics.log import MetricsLog, read_rows
from megafork.trainer.clock import Clock
from megafork.trainer.entropy_record import EDGES, entropy_record
from megafork.trainer.outcome import Optimized
from megafork.trainer.samples import is_sampled, pick_responses
from megafork.trainer.step import optimize
from tests.helpers import reference
from tests.helpers.step import RHO, make_policy, make_table, score_all
from tools.benchmarks.ranks import run_ranks

CLOSE = 1e-5  # nats, float32 against float64
COUNT, STEP = 5, 3
LAYOUTS = [
    {},
    {"tp": 2},
    {"pp": 2},
    {"cp": 2},
    {"dp": 2},
    {"tp": 2, "sequence_parallel": True, "pp": 2, "cp": 2},
]


def make_minibatches():
    """Two of three prompts each; some responses are cut and out of the loss.

    No entropy is within 0.02 nats of a threshold: tokens that share a prefix are equal on paper,
    and rounding would choose among them."""
    table = make_table(seed=19)
    cut_B = torch.arange(table.num_samples) % 5 == 1
    table = table.with_columns(truncated_B=cut_B).with_loss_mask(~cut_B[table.sample_R])
    return table.minibatches(3, seed=0)


def kept(folder, layout, scope="minibatch", select="top", **algorithm):
    policy = make_policy(
        folder, layout, micro_batch_tokens=40, lr=1e-5, algorithm=algorithm,
        forking={"scope": scope, "select": select},
    )  # fmt: skip
    done = optimize(policy, make_minibatches(), step=STEP, clock=Clock())
    record = entropy_record(policy, done, policy_version=0, step=STEP, num_responses=COUNT)
    own = torch.cat([s.entropy_N for s in done.scores])
    in_loss = torch.cat(
        [t.loss_mask_R[s.rows_N] for t, s in zip(done.tables, done.scores, strict=True)]
    )
    return record.responses, record.histogram, own[in_loss]


@functools.cache
def kept_at(folder, index):
    """`kept` on the ranks of one of LAYOUTS."""
    layout = LAYOUTS[index]
    return run_ranks(ParallelConfig(**layout).world_size, kept, folder, layout)


@pytest.fixture(scope="module")
def folder(model_of):
    return model_of(False, 4)  # with make_minibatches, no entropy is near a threshold


@pytest.fixture(scope="module")
def expected(folder):
    """In float64, of each uid: its table and place in it, its entropies, its threshold."""
    model = reference.load_model(folder, torch.float64)
    found = {}
    for table in make_minibatches():
        with torch.no_grad():
            _, entropies = score_all(model, table)
        tau = reference.top_threshold(entropies[table.loss_mask_R], RHO)
        for sample, uid in enumerate(table.uid_B.tolist()):
            found[uid] = (table, sample, entropies[table.rows(sample)], tau)
    return found


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: str(LAYOUTS[index]))
def test_the_kept_responses_are_those_of_the_reference(folder, expected, index):
    """And the histogram is that of one rank."""
    ranks = kept_at(folder, index)
    assert all(rank[1] == kept_at(folder, 0)[0][1] for rank in ranks)
    responses = ranks[0][0]
    assert all(rank[0] == responses for rank in ranks)
    assert len({r["uid"] for r in responses}) == COUNT
    assert [r["uid"] for r in responses] == [
        one.uid for one in pick_responses(make_minibatches(), COUNT, step=STEP)
    ]
    assert sum(sum(r["selected"]) for r in responses) > 3
    for response in responses:
        table, sample, entropies, tau = expected[response["uid"]]
        rows = table.rows(sample)
        assert response["prompt_ids"] == table.prompt(sample).tolist()
        assert response["token_ids"] == table.token_R[rows].tolist()
        assert response["entropies"] == pytest.approx(entropies.tolist(), abs=CLOSE)
        assert response["threshold"] == pytest.approx(tau, abs=CLOSE)
        in_loss = table.loss_mask_R[rows]
        assert response["selected"] == ((entropies >= tau) & in_loss).tolist()
        logprobs = table.rollout_logprob_R[rows]
        assert torch.equal(torch.tensor(response["rollout_logprobs"]), logprobs)
        assert response["advantage"] == pytest.approx(float(table.advantage_R[rows.start]))
        assert (response["reward"], response["accuracy"]) == (
            float(table.reward_B[sample]), float(table.accuracy_B[sample])
        )  # fmt: skip
        assert (response["truncated"], response["loss"]) == (
            bool(table.truncated_B[sample]), bool(in_loss.any())
        )  # fmt: skip


def test_the_histogram_is_torchs(folder):
    [(_, histogram, entropies)] = kept_at(folder, 0)
    theirs = torch.histogram(entropies, bins=torch.tensor(EDGES)).hist.long().tolist()
    assert histogram["edges"] == list(EDGES)
    assert histogram["tokens"] == theirs
    assert sum(theirs) == len(entropies) and sum(count > 0 for count in theirs) > 10
    # The selected ones are the highest of each mini-batch's.
    assert sum(histogram["selected"]) == pytest.approx(RHO * len(entropies), abs=2)
    assert all(s <= t for s, t in zip(histogram["selected"], theirs, strict=True))


def test_edges_belong_to_the_bin_above_and_nothing_is_lost(folder):
    last = len(EDGES) - 2
    values = {0.0: 0, -1e-9: 0, EDGES[1]: 1, EDGES[40]: 40, EDGES[-1]: last, 30.0: last}
    [tokens] = run_ranks(1, histogram_of, folder, list(values))
    expected = [0] * (last + 1)
    for index in values.values():
        expected[index] += 1
    assert tokens == expected
    assert 1.0 in EDGES and 0.1 in EDGES  # decades are edges


def histogram_of(folder, values):
    policy = make_policy(folder, {})
    table = make_table().take([0, 1, 2])
    scores = policy.score(table)
    table = table.with_loss_mask(torch.arange(table.num_rows) < len(values))
    entropies = torch.zeros(len(scores.rows_N))
    for row, value in enumerate(values):
        entropies[scores.rows_N == row] = value
    scores = replace(scores, entropy_N=entropies)
    masks, selection = policy.select([table], [scores], step=1)
    done = Optimized([table], [scores], masks, selections=[selection])
    return entropy_record(policy, done, policy_version=0, step=1).histogram["tokens"]


def test_each_response_has_its_own_threshold_with_scope_sequence(folder, expected):
    [(responses, _, _)] = run_ranks(1, kept, folder, {}, "sequence")
    in_loss = [r for r in responses if r["loss"]]
    assert len(in_loss) > 2
    for response in in_loss:
        entropies = expected[response["uid"]][2]
        own = reference.top_threshold(entropies, RHO)
        assert response["threshold"] == pytest.approx(own, abs=CLOSE)
        assert response["selected"] == (entropies >= own - CLOSE / 10).tolist()


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=str)
def test_unknown_entropies_are_said_to_be_unknown(folder, layout):
    ranks = run_ranks(
        ParallelConfig(**layout).world_size,
        kept_without_entropies, folder, layout,
    )  # fmt: skip
    for responses, histogram in ranks:
        assert histogram is None
        assert len(responses) == COUNT
        for response in responses:
            assert response["entropies"] is None and response["threshold"] is None
            assert response["selected"] == [response["loss"]] * len(response["token_ids"])


def kept_without_entropies(folder, layout):
    responses, histogram, _ = kept(folder, layout, select="all", old_logprobs="engine")
    return responses, histogram


def test_a_right_and_a_wrong_one_of_different_groups_come_first():
    table = make_table(seed=15)
    for step in range(1, 30):
        [right, wrong, *rest] = pick_responses([table], 6, step=step)
        assert right.is_right and not wrong.is_right
        assert len({one.group for one in (right, wrong, *rest)}) == 6  # there are six groups
        for one in (right, wrong, *rest):
            assert table.uid_B[one.sample] == one.uid and table.group_B[one.sample] == one.group
            assert one.is_right == bool(table.accuracy_B[one.sample])
    steps = {tuple(one.uid for one in pick_responses([table], 6, step=s)) for s in range(1, 9)}
    assert len(steps) == 8


def test_the_choice_is_one_of_uid_and_step_alone():
    table = make_table(seed=15)
    backwards = table.take(list(reversed(range(table.num_samples))))
    apart = [backwards.take(range(9)), backwards.take(range(9, table.num_samples))]
    uids = [
        [one.uid for one in pick_responses(tables, 7, step=4)]
        for tables in ([table], [backwards], apart)
    ]
    assert uids[0] == uids[1] == uids[2]


def test_few_responses_are_all_taken_once_and_cut_ones_last():
    table = make_table(seed=15).take([0, 1, 2, 3])  # of one group
    table = table.with_columns(accuracy_B=torch.zeros(4))
    assert sorted(one.uid for one in pick_responses([table], 9, step=1)) == [0, 1, 2, 3]
    cut = table.with_loss_mask(table.sample_R != 2)
    for step in range(1, 9):
        assert [one.uid for one in pick_responses([cut], 4, step=step)][-1] == 2
    assert pick_responses([], 4, step=1) == []


def test_the_first_and_the_last_step_are_sampled():
    assert [s for s in range(1, 26) if is_sampled(s, every=10, last=25)] == [1, 10, 20, 25]
    assert not any(is_sampled(s, every=0, last=25) for s in range(1, 26))


def test_a_resumed_run_writes_later_steps_again(tmp_path):
    """A torn last line, in the middle of a character, is gone too."""
    for name in ("samples", "entropy_histogram"):
        rows = [{"step": step, "text": ["é"]} for step in (1, 2, 2, 3)]
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(lines) + lines[0][:23])
        assert lines[0][22:24] == "é".encode()
    with MetricsLog(tmp_path, 4, tensorboard=False, steps_done=2) as log:
        log.samples([{"step": 3, "text": ["ü"]}, {"step": 3, "text": ["</script>"]}])
        log.entropy_histogram(3, {"tokens": [1]})
    samples = read_rows(tmp_path / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 2, 2, 3, 3]
    assert [row["text"][0] for row in samples] == ["é", "é", "é", "ü", "</script>"]
    histogram = read_rows(tmp_path / "entropy_histogram.jsonl")
    assert [row["step"] for row in histogram] == [1, 2, 2, 3]
    assert histogram[-1]["tokens"] == [1]
