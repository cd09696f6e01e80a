"""The one table between HF names and megatron-core names: load, save and weight sync use it.

Each rule ties one megatron parameter to one or more HF tensors and says how the parameter is cut
over the tensor-parallel ranks, along `dim`. `read` takes a rank's slice from HF tensors, `parts`
takes it apart into this rank's slices of those, `merge` puts the slices of all ranks together as HF
tensors. Works for weights and for their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megafork.model.shape import ModelShape

# (HF name, dim or None for the whole tensor, start, stop) -> that slice.
ReadSlice = Callable[[str, int | None, int, int], Tensor]


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank."""

    dim: None = None

    def read(self, read: ReadSlice, names: Sequence[str], rank: int, size: int) -> Tensor:
        return read(names[0], None, 0, 0)

    def parts(self, shard: Tensor, size: int) -> Sequence[Tensor]:
        return [shard]

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Equal slices of `length` along `dim`; with several HF tensors, their slices are stacked."""

    dim: int
    length: int

    def read(self, read: ReadSlice, names: Sequence[str], rank: int, size: int) -> Tensor:
        step = self.length // size
        return torch.cat([read(n, self.dim, rank * step, (rank + 1) * step) for n in names])

    def parts(self, shard: Tensor, size: int) -> Sequence[Tensor]:
        return shard.chunk(shard.shape[self.dim] * size // self.length, self.dim)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        parts = [self.parts(shard, len(shards)) for shard in shards]
        return [torch.cat(pieces, self.dim) for pieces in zip(*parts, strict=True)]


@dataclass(frozen=True)
class VocabSplit:
    """Rows of the vocabulary, zero rows appended up to megatron's padded size."""

    vocab_size: int
    padded_size: int
    dim: int = 0

    def read(self, read: ReadSlice, names: Sequence[str], rank: int, size: int) -> Tensor:
        step = self.padded_size // size
        start, stop = (min(edge * step, self.vocab_size) for edge in (rank, rank + 1))
        rows = read(names[0], 0, start, stop)
        return torch.cat([rows, rows.new_zeros(step - rows.shape[0], rows.shape[1])])

    def parts(self, shard: Tensor, size: int) -> Sequence[Tensor]:
        """Padding included: the last ranks may hold nothing else."""
        return [shard]

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards))[: self.vocab_size]]


@dataclass(frozen=True)
class QkvSplit:
    """Query, key and value, interleaved by kv head: [q of its group, k, v] for each kv head.

    For the matrices [rows, hidden] and for the biases [rows].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dim: int = 0

    def read(self, read: ReadSlice, names: Sequence[str], rank: int, size: int) -> Tensor:
        kv_heads = self.num_kv_heads // size
        q_rows, kv_rows = self._rows(kv_heads)
        q, k, v = (
            read(name, 0, rank * rows, (rank + 1) * rows)
            for name, rows in zip(names, (q_rows, kv_rows, kv_rows), strict=True)
        )
        hidden = q.shape[1:]
        by_kv_head = [x.reshape(kv_heads, -1, *hidden) for x in (q, k, v)]
        return torch.cat(by_kv_head, 1).reshape(q_rows + 2 * kv_rows, *hidden)

    def parts(self, shard: Tensor, size: int) -> Sequence[Tensor]:
        hidden = shard.shape[1:]
        per_kv_head = shard.reshape(self.num_kv_heads // size, -1, *hidden)
        group = self.num_heads // self.num_kv_heads
        parts = per_kv_head.split((group * self.head_dim, self.head_dim, self.head_dim), 1)
        return [part.reshape(-1, *hidden) for part in parts]

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        parts = [self.parts(shard, len(shards)) for shard in shards]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def _rows(self, kv_heads: int) -> tuple[int, int]:
        group = self.num_heads // self.num_kv_heads
        return kv_heads * group * self.head_dim, kv_heads * self.head_dim


Sharding = Replicated | Split | VocabSplit | QkvSplit


@dataclass(frozen=True)
class Rule:
    megatron: str
    hf: tuple[str, ...]
    sharding: Sharding
    hf_shapes: tuple[tuple[int, ...], ...]
    exported: bool = True
    """False for the last stage's copy of a tied embedding: the first stage exports it."""
    optional: bool = False
    """A folder may lack it: a value head's, which most critics begin without."""


def rules(
    shape: ModelShape,
    *,
    layers: range,
    first_stage: bool,
    last_stage: bool,
    padded_vocab_size: int,
    transformer_engine: bool,
    value_head: bool = False,
) -> Iterator[Rule]:
    """The rules of one pipeline stage, in a fixed order.

    layers: the stage's layers by their number in the whole model. transformer_engine: its fused
    layers keep the norm's weight inside the linear layer that follows. value_head: in place of the
    vocabulary's, under the names of transformers' Qwen3ForTokenClassification (which has a bias)
    and ...ForSequenceClassification (which has none).
    """
    vocab = VocabSplit(shape.vocab_size, padded_vocab_size)
    vocab_shape = ((shape.vocab_size, shape.hidden_size),)
    embedding = ("model.embed_tokens.weight",)
    if first_stage:
        yield Rule("embedding.word_embeddings.weight", embedding, vocab, vocab_shape)
    for local, layer in enumerate(layers):
        yield from _norm_rules(shape, local, layer, transformer_engine=transformer_engine)
        yield from _matrix_rules(shape, local, layer)
    if last_stage:
        norm = ("model.norm.weight",)
        hidden = ((shape.hidden_size,),)
        yield Rule("decoder.final_layernorm.weight", norm, Replicated(), hidden)
        if value_head:
            for name, size in (("weight", (1, shape.hidden_size)), ("bias", (1,))):
                ours, theirs = f"output_layer.{name}", (f"score.{name}",)
                yield Rule(ours, theirs, Replicated(), (size,), optional=True)
        elif not shape.tied_embeddings:
            yield Rule("output_layer.weight", ("lm_head.weight",), vocab, vocab_shape)
        elif not first_stage:
            yield Rule("output_layer.weight", embedding, vocab, vocab_shape, exported=False)


def whole_model_rules(
    shape: ModelShape, padded_vocab_size: int | None = None, *, value_head: bool = False
) -> Iterator[Rule]:
    """The rules of the model on one rank; without padding where none is given."""
    return rules(
        shape,
        layers=range(shape.num_layers),
        first_stage=True,
        last_stage=True,
        padded_vocab_size=padded_vocab_size or shape.vocab_size,
        transformer_engine=True,
        value_head=value_head,
    )


def _norm_rules(
    shape: ModelShape, local: int, layer: int, *, transformer_engine: bool
) -> Iterator[Rule]:
    before_attention, before_mlp = (
        ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        if transformer_engine
        else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    )
    norms = [(before_attention, "input_layernorm.weight", shape.hidden_size)]
    if shape.qk_norm:
        norms += [
            (f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", shape.head_dim)
            for x in "qk"
        ]
    norms.append((before_mlp, "post_attention_layernorm.weight", shape.hidden_size))
    for megatron, hf, size in norms:
        names = (f"model.layers.{layer}.{hf}",)
        yield Rule(f"decoder.layers.{local}.{megatron}", names, Replicated(), ((size,),))


def _matrix_rules(shape: ModelShape, local: int, layer: int) -> Iterator[Rule]:
    hidden, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q_rows, kv_rows = shape.num_heads * dim, shape.num_kv_heads * dim
    to, of = f"decoder.layers.{local}.", f"model.layers.{layer}."
    qkv = QkvSplit(shape.num_heads, shape.num_kv_heads, dim)
    yield Rule(
        to + "self_attention.linear_qkv.weight",
        tuple(f"{of}self_attn.{x}_proj.weight" for x in "qkv"),
        qkv,
        ((q_rows, hidden), (kv_rows, hidden), (kv_rows, hidden)),
    )
    if shape.qkv_bias:
        yield Rule(
            to + "self_attention.linear_qkv.bias",
            tuple(f"{of}self_attn.{x}_proj.bias" for x in "qkv"),
            qkv,
            ((q_rows,), (kv_rows,), (kv_rows,)),
        )
    yield Rule(
        to + "self_attention.linear_proj.weight",
        (of + "self_attn.o_proj.weight",),
        Split(1, q_rows),
        ((hidden, q_rows),),
    )
    yield Rule(
        to + "mlp.linear_fc1.weight",
        (of + "mlp.gate_proj.weight", of + "mlp.up_proj.weight"),
        Split(0, inner),
        ((inner, hidden), (inner, hidden)),
    )
    yield Rule(
        to + "mlp.linear_fc2.weight",
        (of + "mlp.down_proj.weight",),
        Split(1, inner),
        ((hidden, inner),),
    )
