from __future__ import annotations

import random

import pytest
import torch

from megafork.data.packing import build_pack, fed_lengths, plan_micro_batches
from megafork.data.sample import Group, Sample
from megafork.data.token_table import token_table
from megafork.errors import UserError
from megafork.parallel.zigzag import Zigzag
from tests.helpers import reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [20, 64, 10_000])
def test_every_sequence_once_within_the_budget(dp_size, budget):
    rng = random.Random(dp_size * budget)
    lengths = [rng.randrange(1, 20) for _ in range(50)]
    plan = plan_micro_batches(lengths, dp_size=dp_size, token_budget=budget)
    assert len(plan) == dp_size
    assert len({len(of_rank) for of_rank in plan}) == 1
    micro_batches = [mb for of_rank in plan for mb in of_rank]
    assert sorted(b for mb in micro_batches for b in mb) == list(range(50))
    assert all(sum(lengths[b] for b in mb) <= budget for mb in micro_batches)
    ranks = [sum(lengths[b] for mb in of_rank for b in mb) for of_rank in plan]
    assert max(ranks) - min(ranks) <= len(plan[0]) * max(lengths)


def test_fewer_sequences_than_ranks_leave_empty_micro_batches():
    assert plan_micro_batches([5], dp_size=2, token_budget=8) == [[[0]], [[]]]


def test_a_sequence_longer_than_the_budget_names_both():
    with pytest.raises(UserError, match=r"a sequence of 9 tokens does not fit .* of 8"):
        plan_micro_batches([3, 9], dp_size=1, token_budget=8)


def test_a_pack_predicts_every_response_token_from_the_token_before():
    table = token_table(reference.make_groups(3, 2))
    samples = [4, 1, 3]
    pack = build_pack(table, samples, part=Zigzag(tp_size=8), device=CPU)
    assert len(pack.tokens_T) % 8 == 0
    assert pack.cu_seqlens.tolist()[-1] == len(pack.tokens_T)
    expected_rows = [row for b in samples for row in range(table.rows(b).start, table.rows(b).stop)]
    assert pack.rows_N.tolist() == expected_rows
    assert torch.equal(pack.targets_N, table.token_R[pack.rows_N])
    starts = dict(zip(samples, pack.cu_seqlens.tolist(), strict=False))
    for slot, row in zip(pack.slots_N.tolist(), pack.rows_N.tolist(), strict=True):
        sample, position = int(table.sample_R[row]), int(table.position_R[row])
        prompt = table.prompt(sample).tolist()
        before = (prompt + table.token_R[table.rows(sample)].tolist())[: len(prompt) + position]
        fed = pack.tokens_T[starts[sample] : slot + 1].tolist()
        assert fed == before
        assert int(pack.positions_T[slot]) == len(before) - 1


def test_empty_responses_take_no_row():
    groups = [
        Group(0, [5], 0, [Sample(0, [], [], False)]),
        Group(1, [5, 6, 7], 0, [Sample(1, [], [], False)]),
        Group(2, [5], 0, [Sample(2, [8], [0.0], False)]),
    ]
    pack = build_pack(token_table(groups), [0, 1, 2], part=Zigzag(), device=CPU)
    assert pack.tokens_T.tolist() == [5, 6, 5]
    assert pack.cu_seqlens.tolist() == [0, 2, 3]
    assert pack.slots_N.tolist() == [2]
    assert pack.targets_N.tolist() == [8]


def test_an_empty_pack_is_padding_only():
    table = token_table(reference.make_groups(1, 1))
    pack = build_pack(table, [], part=Zigzag(tp_size=4), device=CPU)
    assert pack.tokens_T.shape == (4,)
    assert pack.cu_seqlens.tolist() == [0, 4]
    assert len(pack.slots_N) == len(pack.rows_N) == 0


def test_the_last_token_is_not_fed():
    table = token_table(reference.make_groups(1, 2))
    lengths = (table.prompt_lengths_B + table.response_lengths_B).tolist()
    assert fed_lengths(table) == [n - 1 for n in lengths]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_ranks_hold_every_slot_once(cp_size, tp_size):
    table = token_table(reference.make_groups(3, 3))
    samples = [4, 1, 3, 7]
    parts = [Zigzag(rank, cp_size, tp_size) for rank in range(cp_size)]
    packs = [build_pack(table, samples, part=part, device=CPU) for part in parts]
    cu_seqlens = packs[0].cu_seqlens
    assert all(n % (2 * cp_size) == 0 for n in cu_seqlens.diff().tolist())
    assert len({len(pack.tokens_T) for pack in packs}) == 1
    assert len(packs[0].tokens_T) % tp_size == 0
    # Every response token is predicted on one rank, by the slot that the whole pack predicts it by.
    rows = torch.cat([pack.rows_N for pack in packs])
    assert sorted(rows.tolist()) == sorted(
        row for b in samples for row in range(table.rows(b).start, table.rows(b).stop)
    )
    order = parts[0].order_of_gathered(cu_seqlens)
    tokens = torch.cat([pack.tokens_T for pack in packs])[order]
    positions = torch.cat([pack.positions_T for pack in packs])[order]
    assert positions.tolist() == [i for n in cu_seqlens.diff().tolist() for i in range(n)]
    for start, sample in zip(cu_seqlens.tolist(), samples, strict=False):
        fed = torch.cat([table.prompt(sample), table.token_R[table.rows(sample)]])[:-1]
        assert torch.equal(tokens[start : start + len(fed)], fed)
    for pack in packs:
        assert torch.equal(pack.targets_N, table.token_R[pack.rows_N])
        before = pack.positions_T[pack.slots_N] + 1
        prompts = table.prompt_lengths_B[table.sample_R[pack.rows_N]]
        assert torch.equal(before, prompts + table.position_R[pack.rows_N])


def test_a_rank_holds_an_early_and_a_late_chunk():
    """8 slots and 4 slots over two ranks: chunks 0 and 3, chunks 1 and 2."""
    cu_seqlens = torch.tensor([0, 8, 12])
    assert Zigzag(0, 2).slots(cu_seqlens).tolist() == [0, 1, 6, 7, 8, 11]
    assert Zigzag(1, 2).slots(cu_seqlens).tolist() == [2, 3, 4, 5, 9, 10]


def test_micro_batches_come_in_rounds():
    """The interleaved pipeline schedule asks for a multiple of its ranks."""
    plan = plan_micro_batches([5] * 5, dp_size=2, token_budget=10, count_multiple=4)
    assert [len(of_rank) for of_rank in plan] == [4, 4]
    assert sorted(b for of_rank in plan for mb in of_rank for b in mb) == [0, 1, 2, 3, 4]


def test_a_longer_sequence_fits_more_ranks():
    assert plan_micro_batches([16], dp_size=1, token_budget=8, cp_size=2) == [[[0]]]
    with pytest.raises(UserError, match=r"on each of cp=2 ranks: raise .* to at least 9"):
        plan_micro_batches([17], dp_size=1, token_budget=8, cp_size=2)
