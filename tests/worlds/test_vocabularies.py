"""The head over shards of published vocabularies, padded as megatron pads them.

Ranks of a group then have different numbers of real columns, and whatever a rank derives from its
own must not decide how often, or with which shapes, it calls the others.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from megafork.config import ParallelConfig
from megafork.ops import vocab_parallel
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from megafork.parallel.mesh import initialize
from tests.helpers.linear_head import case, reference, run
from tests.helpers.properties import examples
from tools.benchmarks.ranks import run_ranks

PUBLISHED = [151_936, 151_669, 128_256, 32_000]
"""Qwen3's embedding, its tokenizer, Llama 3, Llama 2"""
HIDDEN, ROWS = 8, 50


@dataclass(frozen=True)
class Head:
    vocab: int
    divisible_by: int
    rows: int
    chunk_of_shard: int
    """Whose real columns times chunk_rows is the number of logits of a chunk"""
    chunk_rows: int
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32

    def padded(self, tp):
        multiple = self.divisible_by * tp
        return -(-self.vocab // multiple) * multiple

    def chunk_logits(self, tp):
        """As many as make that rank's own count of columns give another chunk than others' do."""
        width = self.padded(tp) // tp
        first = width * (self.chunk_of_shard % tp)
        return self.chunk_rows * max(1, min(width, self.vocab - first))

    def tensors(self):
        return case(self.rows, self.vocab, HIDDEN, dtype=self.dtype, seed=self.vocab)


def over_shards(heads):
    """Of each head on this rank: values, and the gradients of hidden and of this shard."""
    world = int(os.environ["WORLD_SIZE"])
    mesh = initialize(ParallelConfig(tp=world))
    found = []
    for head in heads:
        vocab_parallel._CHUNK_LOGITS = head.chunk_logits(world)
        x, w, targets = head.tensors()
        padding = torch.full((head.padded(world) - head.vocab, HIDDEN), 3.0, dtype=head.dtype)
        shard = torch.cat([w, padding]).chunk(world)[mesh.tp_rank]
        options = {
            "tp_group": mesh.groups.tp,
            "vocab_size": head.vocab,
            "temperature": head.temperature,
        }
        found.append(run(x, shard, targets, **options))
    return found


@functools.cache
def expected_of(vocab):
    return reference(*Head(vocab, 128, ROWS, 0, 1).tensors())


def assert_head(head, ranks, exact):
    # Sums over 150,000 columns in the gradients' own dtype: 2.4e-5 was seen of one processor.
    rounding = 1e-4 if head.dtype == torch.float32 else 2**-8
    for rank in ranks:
        assert all(torch.equal(a, b) for a, b in zip(rank[:2], ranks[0][:2], strict=True))
        for ours, value in zip(rank[:2], exact[:2], strict=True):
            assert ((ours - value).abs() <= 2e-5).all(), head
        assert_near(rank[2], exact[2], rounding, head)
    grad_w = torch.cat([rank[3] for rank in ranks])
    assert (grad_w[head.vocab :] == 0).all(), head
    assert_near(grad_w[: head.vocab], exact[3], rounding, head)


def assert_near(ours, exact, rounding, head):
    """Of the largest; a vocabulary of one token has no gradient to compare with."""
    assert ours.shape == exact.shape
    largest = max(1e-3, float(exact.abs().amax())) if exact.numel() else 0.0
    assert ((ours - exact).abs() <= rounding * largest).all(), head


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_more_rows_than_a_chunk_over_published_vocabularies(tp):
    heads = [Head(vocab, 128, ROWS, tp - 1, 20) for vocab in PUBLISHED]
    ranks = run_ranks(tp, over_shards, heads, timeout=60)
    for index, head in enumerate(heads):
        assert_head(head, [rank[index] for rank in ranks], expected_of(head.vocab))


def with_chunks_of(num_rows, chunk_tokens):
    """Values at Qwen3's vocabulary; chunk_tokens None: the chunks that a run has."""
    mesh = initialize(ParallelConfig(tp=2))
    x, w, targets = case(num_rows, PUBLISHED[0], HIDDEN)
    shard = torch.cat([w, w.new_full((128, HIDDEN), 3.0)]).chunk(2)[mesh.tp_rank]
    with torch.no_grad():
        return [
            linear_logprob_and_entropy(
                x,
                shard,
                targets,
                tp_group=mesh.groups.tp,
                vocab_size=PUBLISHED[0],
                chunk_tokens=rows,
            )
            for rows in (None, chunk_tokens)
        ]


def test_more_rows_than_a_chunk_of_the_size_that_runs_have():
    """441 rows, and as many chunks of them on both ranks."""
    (first, other), second = run_ranks(2, with_chunks_of, 450, 129, timeout=120)
    for values in (other, *second):
        assert all(torch.equal(a, b) for a, b in zip(values, first, strict=True))
    x, w, targets = case(450, PUBLISHED[0], HIDDEN)
    for rows in (slice(0, 8), slice(438, 446)):
        exact = reference(x[rows], w, targets[rows])
        for ours, value in zip(first, exact[:2], strict=True):
            assert (ours[rows] - value).abs().max() <= 1e-5


HEADS = st.builds(
    Head,
    vocab=st.integers(1, 1500),
    divisible_by=st.sampled_from([1, 8, 128]),
    rows=st.integers(0, 60),
    chunk_of_shard=st.integers(0, 7),
    chunk_rows=st.integers(1, 40),
    temperature=st.sampled_from([1.0, 0.6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_any_vocabulary_rows_and_chunks(tp):
    """Shards of padding alone, one column, no rows, chunks that divide nothing."""
    heads = examples(HEADS, 60)
    assert any(head.padded(tp) // tp * (tp - 1) >= head.vocab for head in heads)
    ranks = run_ranks(tp, over_shards, heads, timeout=60)
    for index, head in enumerate(heads):
        exact = reference(*head.tensors(), head.temperature)
        assert_head(head, [rank[index] for rank in ranks], exact)
