"""Checks of the vocabulary head against float64: in torch or Triton, on a CPU or a GPU."""

from __future__ import annotations

import os

import torch

from megafork.config import ParallelConfig
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from megafork.parallel.mesh import initialize
from tools.benchmarks.ranks import run_ranks

QWEN3_VOCAB = 151_936


def case(num_rows, vocab, hidden=48, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden, generator=generator)
    w = torch.randn(vocab, hidden, generator=generator) * 4 / hidden**0.5
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    return x.to(dtype), w.to(dtype), targets


def upstream(num_rows):
    rows = torch.arange(num_rows, dtype=torch.float32)
    return rows.cos(), rows.sin()


def reference(x, w, targets, temperature=1.0):
    """float64: values and gradients of sum(a logp + b H)."""
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    logprobs = (x @ w.T / temperature).log_softmax(-1)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    a, b = upstream(len(targets))
    (chosen * a + entropy * b).sum().backward()
    return chosen.detach(), entropy.detach(), x.grad, w.grad


def run(x, w, targets, **options):
    x, w = x.clone().requires_grad_(), torch.nn.Parameter(w.clone())
    logprobs, entropy = linear_logprob_and_entropy(x, w, targets, **options)
    a, b = upstream(len(targets))
    (logprobs * a + entropy * b).sum().backward()
    return logprobs.detach(), entropy.detach(), x.grad, w.grad


def relative(ours, exact):
    return float((ours - exact).abs().max() / exact.abs().max())


def check_values_and_gradients(chunk_tokens, temperature):
    x, w, targets = case(40, 700)
    ours = run(x, w, targets, chunk_tokens=chunk_tokens, temperature=temperature)
    exact = reference(x, w, targets, temperature)
    # The product's own rounding is in the bound.
    assert (ours[0] - exact[0]).abs().max() <= 1e-5
    assert (ours[1] - exact[1]).abs().max() <= 1e-5
    assert relative(ours[2], exact[2]) <= 1e-5
    assert relative(ours[3], exact[3]) <= 1e-5


def check_at_the_vocabulary_of_qwen3():
    x, w, targets = case(24, QWEN3_VOCAB, hidden=128)
    ours = run(x, w, targets, vocab_size=QWEN3_VOCAB)
    exact = reference(x, w, targets)
    for value, expected in zip(ours[:2], exact[:2], strict=True):
        assert (value - expected).abs().max() <= 1e-5
    for gradient, expected in zip(ours[2:], exact[2:], strict=True):
        assert relative(gradient, expected) <= 1e-5


def check_a_rows_bits_do_not_depend_on_the_rows_beside_it(hidden=48, dtype=torch.float32):
    """So the update may run the head on selected rows only and still start at ratio 1."""
    x, w, targets = case(200, 3000 if hidden == 48 else 700, hidden, dtype=dtype)
    everything = linear_logprob_and_entropy(x, w, targets)
    for count in (1, 2, 3, 5, 17, 64, 130):
        rows = torch.randperm(200)[:count].sort().values
        some = linear_logprob_and_entropy(x[rows], w, targets[rows], chunk_tokens=50)
        assert torch.equal(some[0], everything[0][rows])
        assert torch.equal(some[1], everything[1][rows])


def check_no_tokens_give_connected_zeros():
    x, w, _ = case(0, 50)
    _, _, grad_x, grad_w = run(x, w, torch.zeros(0, dtype=torch.int64))
    assert grad_x.shape == (0, 48)
    assert (grad_w == 0).all()


def sharded(x, w, targets, vocab, with_main_grad):
    world = int(os.environ["WORLD_SIZE"])
    mesh = initialize(ParallelConfig(tp=world))
    hidden = x.clone().requires_grad_()
    shard = torch.nn.Parameter(w.chunk(world)[mesh.tp_rank].clone())
    if with_main_grad:
        shard.main_grad = torch.zeros(shard.shape)
    logprobs, entropy = linear_logprob_and_entropy(
        hidden, shard, targets, tp_group=mesh.groups.tp, vocab_size=vocab, chunk_tokens=9
    )
    a, b = upstream(len(targets))
    (logprobs * a + entropy * b).sum().backward()
    grad = shard.main_grad if with_main_grad else shard.grad
    return logprobs.detach(), entropy.detach(), hidden.grad, grad


def check_over_shards_with_padding(tp, with_main_grad):
    """The gradient of hidden comes back summed, the weight's is the shard's, padding gets none."""
    x, w, targets = case(31, 1000)
    padded = torch.cat([w, torch.full((24, w.shape[1]), 3.0)])
    exact = reference(x, w, targets)
    ranks = run_ranks(tp, sharded, x, padded, targets, 1000, with_main_grad)
    for logprobs, entropy, grad_x, _ in ranks:
        assert (logprobs - exact[0]).abs().max() <= 1e-5
        assert (entropy - exact[1]).abs().max() <= 1e-5
        assert relative(grad_x, exact[2]) <= 1e-5
    grad_w = torch.cat([of_rank[3] for of_rank in ranks])
    assert relative(grad_w[:1000], exact[3]) <= 1e-5
    assert (grad_w[1000:] == 0).all()
