"""top_fraction_threshold against sorting, on one rank and over orthogonal groups."""

from __future__ import annotations

import math

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.ops import top_fraction
from megafork.ops.top_fraction import largest_keys, top_fraction_threshold, top_k
from megafork.parallel.mesh import initialize
from tools.benchmarks.ranks import run_ranks


def by_sorting(values, fraction):
    """(threshold, kept, total) the slow way."""
    k = math.ceil(fraction * len(values) - 1e-9)
    threshold = values.sort(descending=True).values[k - 1].item()
    return threshold, int((values >= threshold).sum()), len(values)


def randoms(n, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator)
    if kind == "ties":
        values = (values * 2).round()
    if kind == "denormal":
        values = values * 1e-41
    if kind == "huge":
        values = values * 1e38
    if kind == "close":
        values = 1 + values * 1e-6
    return values, torch.rand(n, generator=generator) < 0.7


@pytest.mark.parametrize("kind", ["plain", "ties", "denormal", "huge", "close"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.2, 0.5, 0.999, 1.0])
def test_equals_sorting(kind, fraction):
    for seed in range(20):
        values, mask = randoms(10 + 37 * seed, kind, seed)
        assert tuple(top_fraction_threshold(values, mask, fraction)) == by_sorting(
            values[mask], fraction
        )


def test_k_is_not_a_victim_of_binary_fractions():
    values = torch.arange(30.0)
    found = top_fraction_threshold(values, torch.ones(30, dtype=torch.bool), 0.1)
    assert (found.threshold, found.num_kept, found.num_total) == (27.0, 3, 30)


@pytest.mark.parametrize(
    ("num_values", "fraction", "k"),
    [
        (164_000_000, 0.14, 22_960_000),
        (10**10, 0.07, 700_000_000),
        (10, 0.1 + 0.2, 3),
        (7, 0.2, 2),
        (0, 0.2, 1),
    ],
)
def test_k_of_many_values(num_values, fraction, k):
    assert top_k(torch.tensor([num_values]), fraction).tolist() == [k]


@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -(2.0**-149), torch.inf, -torch.inf])
def test_equal_values_are_all_kept(value):
    found = top_fraction_threshold(torch.full((9,), value), torch.ones(9).bool(), 0.2)
    assert (found.threshold, found.num_kept, found.num_total) == (value, 9, 9)


def test_the_two_zeros_are_equal():
    values = torch.tensor([-0.0, 0.0, -0.0, -1.0])
    found = top_fraction_threshold(values, torch.ones(4).bool(), 0.25)
    assert (found.threshold, found.num_kept) == (0.0, 3)


def test_no_values():
    found = top_fraction_threshold(torch.ones(5), torch.zeros(5).bool(), 0.2)
    assert (found.threshold, found.num_kept, found.num_total) == (math.inf, 0, 0)


def test_half_precision_is_exact():
    values = torch.randn(500).bfloat16()
    found = top_fraction_threshold(values, torch.ones(500).bool(), 0.2)
    assert tuple(found) == by_sorting(values.float(), 0.2)


def test_a_tiny_fraction_keeps_one():
    found = top_fraction_threshold(torch.arange(5.0), torch.ones(5).bool(), 1e-12)
    assert (found.threshold, found.num_kept) == (4.0, 1)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fraction={fraction}"):
        top_fraction_threshold(torch.ones(3), torch.ones(3).bool(), fraction)


def test_nan_is_counted():
    values = torch.tensor([1.0, torch.nan, torch.nan, torch.nan])
    mask = torch.tensor([True, True, True, False])
    with pytest.raises(ValueError, match=r"NaN among the values \(rank 0: 2\)"):
        top_fraction_threshold(values, mask, 0.5)


def test_segments_are_independent():
    values, mask = randoms(1000, "ties", 4)
    segments = torch.arange(1000) % 7
    mask &= segments != 5  # an empty one
    found = top_fraction_threshold(values, mask, 0.3, segments_T=segments, num_segments=7)
    for s in range(7):
        inside = values[mask & (segments == s)]
        expected = by_sorting(inside, 0.3) if len(inside) else (math.inf, 0, 0)
        got = (found.threshold[s].item(), found.num_kept[s].item(), found.num_total[s].item())
        assert got == expected


@pytest.mark.parametrize("num_segments", [3, 100, 5000])
def test_largest_keys_are_exactly_k(num_segments):
    """64-bit keys; as many passes as keep the histograms small."""
    generator = torch.Generator().manual_seed(num_segments)
    keys = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=generator)
    mask = torch.rand(20_000, generator=generator) < 0.9
    segments = torch.randint(0, num_segments, (20_000,), generator=generator)
    segments[segments == 1] = 0  # an empty one
    sizes = torch.bincount(segments[mask], minlength=num_segments)
    k = (sizes * torch.rand(num_segments, generator=generator)).long()
    chosen = largest_keys(keys, mask, k, segments_T=segments)
    assert not (chosen & ~mask).any()
    for s in range(num_segments):
        inside = mask & (segments == s)
        expected = set(keys[inside].sort(descending=True).values[: k[s]].tolist())
        assert set(keys[inside & chosen].tolist()) == expected


def test_more_tokens_than_int32_can_count(monkeypatch):
    """Every value stands for 2^25 equal ones: 33.5 billion tokens in all."""
    repeats = 2**25
    one_each = top_fraction._histogram
    monkeypatch.setattr(top_fraction, "_histogram", lambda *a: one_each(*a) * repeats)
    values, mask = randoms(1000, "ties", 2)
    ordered = values[mask].sort(descending=True).values
    for fraction in (0.2, 0.5, 0.999):
        found = top_fraction_threshold(values, mask, fraction)
        total = len(ordered) * repeats
        assert found.num_total == total > 2**34
        k = math.ceil(fraction * total - 1e-9)
        assert found.threshold == ordered[(k - 1) // repeats]
        assert found.num_kept == int((ordered >= found.threshold).sum()) * repeats


def over_ranks(values, mask, segments, split_over):
    """Each rank of a 2 x 2 world holds a quarter, or, with one group, ranks 0 and 1 a half."""
    mesh = initialize(ParallelConfig(tp=2))
    groups = (mesh.groups.dp_cp, mesh.groups.tp)[:split_over]
    part = mesh.dp_rank * 2 + mesh.tp_rank if split_over == 2 else mesh.dp_rank
    sizes = [len(values) // 2, 0, 3] if split_over == 2 else [len(values) // 3]
    sizes.append(len(values) - sum(sizes))  # uneven, one rank has nothing
    mine = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
    whole = top_fraction_threshold(values[mine], mask[mine], 0.2, groups=groups)
    split = top_fraction_threshold(
        values[mine], mask[mine], 0.2, groups=groups, segments_T=segments[mine], num_segments=3
    )
    return tuple(whole), [column.tolist() for column in split]


@pytest.mark.parametrize("split_over", [1, 2])
def test_over_ranks_equals_sorting(split_over):
    values, mask = randoms(501, "ties", 9)
    segments = torch.arange(501) % 3
    expected = [by_sorting(values[mask & (segments == s)], 0.2) for s in range(3)]
    for whole, split in run_ranks(4, over_ranks, values, mask, segments, split_over):
        assert whole == by_sorting(values[mask], 0.2)
        assert list(zip(*split, strict=True)) == expected


def nan_on_rank_one():
    mesh = initialize(ParallelConfig())
    values = torch.ones(4)
    if mesh.rank == 1:
        values[2:] = torch.nan
    with pytest.raises(ValueError, match=r"rank 1: 2"):
        top_fraction_threshold(values, torch.ones(4).bool(), 0.2, groups=(mesh.groups.dp_cp,))
    return True


def test_every_rank_hears_where_the_nan_is():
    assert run_ranks(2, nan_on_rank_one) == [True, True]


def segments_out_of_range(bad):
    """Rank 1 names a segment that there is not: bincount would fail or grow on it alone."""
    mesh = initialize(ParallelConfig())
    segments = torch.tensor([0, 1, 2, 1])
    if mesh.rank == 1:
        segments[3] = bad
    with pytest.raises(ValueError, match=r"segments outside 0\.\.2 \(rank 1: 1\)"):
        top_fraction_threshold(
            torch.ones(4),
            torch.ones(4).bool(),
            0.2,
            groups=(mesh.groups.dp_cp,),
            segments_T=segments,
            num_segments=3,
        )
    return True


@pytest.mark.parametrize("bad", [3, -1])
def test_every_rank_hears_of_a_segment_that_one_rank_makes_up(bad):
    assert run_ranks(2, segments_out_of_range, bad, timeout=30) == [True, True]
