"""logprob_and_entropy against float64 log_softmax; shards against the whole, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.ops.softmax_rows import Rows, Shard
from megafork.ops.vocab_parallel import logprob_and_entropy
from megafork.parallel.mesh import initialize
from tools.benchmarks.ranks import run_ranks

QWEN3_VOCAB = 151_936


def reference(logits_TV, targets_T, temperature=1.0, entropy_temperature=None):
    """float64, from the definitions. temperature: a float or [T]."""

    def column(t):
        return torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)

    x = logits_TV.double()
    logprobs_TV = (x / column(temperature)).log_softmax(-1)
    t = temperature if entropy_temperature is None else entropy_temperature
    log_p = (x / column(t)).log_softmax(-1)
    entropy_T = torch.special.entr(log_p.exp()).sum(-1)
    return logprobs_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def case(num_rows, vocab, *, scale=4.0, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=generator) * scale + shift
    logits[0] *= 5  # a peaked row
    logits[1] = shift  # a uniform one
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    return logits, targets


def assert_close(logprobs, entropy, expected):
    """2e-6 nats; a float32 beyond 32 cannot be stated to that, so there its own rounding."""
    rounding = expected[0].abs() * 2**-24
    assert ((logprobs - expected[0]).abs() <= rounding.clamp(min=2e-6)).all()
    assert (entropy - expected[1]).abs().max() <= 2e-6


def upstream(num_rows):
    rows = torch.arange(num_rows, dtype=torch.float32)
    return rows.cos(), rows.sin()


@pytest.mark.parametrize("shift", [0.0, -300.0, 100.0])
def test_values_at_the_vocabulary_of_qwen3(shift):
    logits, targets = case(64, QWEN3_VOCAB, shift=shift)
    logprobs, entropy = logprob_and_entropy(logits, targets)
    expected_logprobs, expected_entropy = reference(logits, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_close(logprobs, entropy, (expected_logprobs, expected_entropy))


def test_many_equal_logits_share_no_rounding_error():
    """One token has as much mass as all others together: where an error in exp counts most."""
    logits = torch.zeros(21, QWEN3_VOCAB)
    logits[:, 5] = torch.linspace(11, 13, 21)
    targets = torch.zeros(21, dtype=torch.int64)
    assert_close(*logprob_and_entropy(logits, targets), reference(logits, targets))


@pytest.mark.parametrize("outputs", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize(
    ("temperature", "entropy_temperature"),
    [(1.0, None), (0.7, None), (1.0, 2.0), (torch.linspace(0.5, 2, 12), None)],
    ids=["T=1", "T=0.7", "two temperatures", "per token"],
)
def test_gradients_through_both_outputs(outputs, temperature, entropy_temperature):
    values, targets = case(12, 1000)
    a, b = upstream(12)
    a, b = a * (outputs != "entropy"), b * (outputs != "logprobs")
    logits = values.clone().requires_grad_()
    logprobs, entropy = logprob_and_entropy(
        logits, targets, temperature=temperature, entropy_temperature=entropy_temperature
    )
    loss = {"logprobs": (logprobs * a).sum(), "entropy": (entropy * b).sum()}
    loss["both"] = loss["logprobs"] + loss["entropy"]
    loss[outputs].backward()

    exact = values.double().requires_grad_()
    expected_logprobs, expected_entropy = reference(
        exact, targets, temperature, entropy_temperature
    )
    (expected_logprobs * a).sum().add((expected_entropy * b).sum()).backward()
    assert_close(logprobs, entropy, (expected_logprobs, expected_entropy))
    assert (logits.grad - exact.grad).abs().max() <= 1e-6 * exact.grad.abs().max()
    assert torch.equal(logits.detach(), values)  # nothing is written into the input


def test_padding_columns_take_no_part():
    values, targets = case(8, 100)
    padded = torch.cat([values, torch.full((8, 28), 50.0)], 1).requires_grad_()
    logprobs, entropy = logprob_and_entropy(padded, targets, vocab_size=100)
    expected = logprob_and_entropy(values, targets)
    assert torch.equal(logprobs, expected[0])
    assert torch.equal(entropy, expected[1])
    (logprobs + entropy).sum().backward()
    assert (padded.grad[:, 100:] == 0).all()
    assert (padded.grad[:, :100] != 0).any()


def test_minus_infinity_is_a_token_of_probability_zero():
    values, targets = case(6, 50)
    values[:, 10:20] = -torch.inf
    targets = targets % 10
    kept = torch.cat([values[:, :10], values[:, 20:]], 1)
    logits = values.clone().requires_grad_()
    logprobs, entropy = logprob_and_entropy(logits, targets)
    (logprobs + 2 * entropy).sum().backward()
    expected = reference(kept, targets)
    assert_close(logprobs, entropy, expected)
    assert (logits.grad[:, 10:20] == 0).all()
    assert logits.grad.isfinite().all()
    target_at_zero, _ = logprob_and_entropy(values, torch.full((6,), 12))
    assert (target_at_zero == -torch.inf).all()


def test_one_certain_token_has_entropy_zero():
    logits = torch.full((1, 9), -1e4)
    logits[0, 4] = 1e4
    logprobs, entropy = logprob_and_entropy(logits, torch.tensor([4]))
    assert logprobs.item() == 0.0
    assert entropy.item() == 0.0


def test_bfloat16_logits_are_summed_in_full_precision():
    logits, targets = case(16, 5000)
    half = logits.bfloat16().requires_grad_()
    logprobs, entropy = logprob_and_entropy(half, targets)
    expected = reference(half, targets)
    assert_close(logprobs, entropy, expected)
    entropy.sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_invalid_row_gives_nan_and_no_other_row_does(value):
    values, targets = case(4, 40)
    expected = logprob_and_entropy(values, targets)
    values[2, [5, 6]] = value
    logits = values.clone().requires_grad_()
    logprobs, entropy = logprob_and_entropy(logits, targets)
    (logprobs.nansum() + entropy.nansum()).backward()
    for ours, before in zip((logprobs, entropy), expected, strict=True):
        assert ours.isnan().tolist() == [False, False, True, False]
        assert torch.equal(ours[[0, 1, 3]], before[[0, 1, 3]])
    assert logits.grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shards", [1, 2, 8, 61])
def test_the_integer_sums_are_the_same_for_any_shards_and_threads(shards, threads):
    """Before they become float32, which would hide most differences."""
    logits, targets = case(5, QWEN3_VOCAB)
    temperature, everything = torch.full((5, 1), 0.9), slice(0, 5)
    maximum_T1 = logits.amax(1, keepdim=True)

    def sums(x, first):
        rows = Rows.empty(targets, Shard(first, x.shape[1]), temperature, None)
        rows.max_T1[:] = maximum_T1
        rows.add_up(x, everything)
        return rows.sums

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = sums(logits, 0)
        torch.set_num_threads(threads)
        parts = logits.tensor_split(shards, 1)  # 61 does not divide the vocabulary
        firsts = [sum(part.shape[1] for part in parts[:i]) for i in range(shards)]
        total = torch.stack([sums(*shard) for shard in zip(parts, firsts, strict=True)]).sum(0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("entropy_temperature", [None, 2.0])
def test_a_certain_target_keeps_its_gradient_in_bfloat16(entropy_temperature):
    """1 - p is taken before it is rounded."""
    logits = torch.zeros(1, 100, dtype=torch.bfloat16)
    logits[0, 3] = 12.0
    logits.requires_grad_()
    logprobs, _ = logprob_and_entropy(
        logits, torch.tensor([3]), entropy_temperature=entropy_temperature
    )
    logprobs.sum().backward()
    expected = 99 / (99 + torch.tensor(12.0).exp())
    assert abs(logits.grad[0, 3] / expected - 1) <= 2**-8


def test_no_tokens():
    logits = torch.zeros(0, 10, requires_grad=True)
    logprobs, entropy = logprob_and_entropy(logits, torch.zeros(0, dtype=torch.int64))
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == (0, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets_T": torch.tensor([0, 7])}, r"targets span 0\.\.7, outside the vocabulary of 7"),
        ({"targets_T": torch.tensor([-1, 3])}, r"targets span -1\.\.3"),
        ({"targets_T": torch.tensor([1])}, r"must be \[T, _\], \[T\]"),
        ({"vocab_size": 8}, r"vocab_size=8 must be in 1\.\.7"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, r"must be a float or \[T=2\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"logits_TV": torch.zeros(2, 7), "targets_T": torch.tensor([0, 6])} | arguments
    with pytest.raises(ValueError, match=message):
        logprob_and_entropy(**arguments)


def sharded(logits_TV, targets_T, vocab, temperature, entropy_temperature):
    """On a rank of a tp group: values, and this shard's gradient."""
    world = int(os.environ["WORLD_SIZE"])
    mesh = initialize(ParallelConfig(tp=world))
    shard = logits_TV.chunk(world, 1)[mesh.tp_rank].clone().requires_grad_()
    before = shard.detach().clone()
    logprobs, entropy = logprob_and_entropy(
        shard,
        targets_T,
        tp_group=mesh.groups.tp,
        temperature=temperature,
        entropy_temperature=entropy_temperature,
        vocab_size=vocab,
    )
    a, b = upstream(len(targets_T))
    ((logprobs * a) + (entropy * b)).sum().backward()
    assert torch.equal(shard.detach().nan_to_num(), before.nan_to_num())
    return logprobs.detach(), entropy.detach(), shard.grad


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("entropy_temperature", [None, 1.5])
def test_shards_give_the_bits_of_the_whole(tp, entropy_temperature):
    """At Qwen3's vocabulary, padded as megatron pads it for tp=8; the last shard has padding."""
    values, targets = case(24, QWEN3_VOCAB, seed=tp)
    targets[:3] = torch.tensor([0, QWEN3_VOCAB - 1, QWEN3_VOCAB // 2])
    padded = torch.cat([values, torch.full((24, 152_576 - QWEN3_VOCAB), 99.0)], 1)
    ranks = run_ranks(tp, sharded, padded, targets, QWEN3_VOCAB, 0.9, entropy_temperature)

    whole = values.clone().requires_grad_()
    logprobs, entropy = logprob_and_entropy(
        whole, targets, temperature=0.9, entropy_temperature=entropy_temperature
    )
    for of_rank in ranks:
        assert torch.equal(of_rank[0], logprobs)
        assert torch.equal(of_rank[1], entropy)
    exact = values.double().requires_grad_()
    expected = reference(exact, targets, 0.9, entropy_temperature)
    assert_close(logprobs, entropy, expected)
    a, b = upstream(24)
    ((expected[0] * a) + (expected[1] * b)).sum().backward()
    gradient = torch.cat([of_rank[2] for of_rank in ranks], 1)
    assert (gradient[:, QWEN3_VOCAB:] == 0).all()
    error = (gradient[:, :QWEN3_VOCAB] - exact.grad).abs().max() / exact.grad.abs().max()
    assert error <= 1e-6


@pytest.mark.parametrize("tp", [2, 4])
def test_every_rank_hears_of_a_nan_on_the_last_shard(tp):
    values, targets = case(4, 64)
    values[1, [62, 63]] = torch.nan
    for logprobs, entropy, _ in run_ranks(tp, sharded, values, targets, 64, 1.0, None):
        assert logprobs.isnan().tolist() == [False, True, False, False]
        assert entropy.isnan().tolist() == [False, True, False, False]


def test_a_shard_of_padding_only():
    values, targets = case(5, 40)
    padded = torch.cat([values, torch.full((5, 120), 7.0)], 1)
    ranks = run_ranks(4, sharded, padded, targets, 40, 1.0, None)
    expected = logprob_and_entropy(values, targets)
    for of_rank in ranks:
        assert torch.equal(of_rank[0], expected[0])
        assert torch.equal(of_rank[1], expected[1])
    assert (torch.cat([r[2] for r in ranks[1:]], 1) == 0).all()
