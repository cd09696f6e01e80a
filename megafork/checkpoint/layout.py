"""The contents of megatron-core's checkpoint, block by block, and the HF rows of each block.

The blocks follow from the rules of hf_mapping.py, so no model is built. megatron stores the whole
tensors (those of one rank), the layers of a parameter stacked along a first axis, and names the
norms as TransformerEngine's fused layers do, whichever layers trained. Large tensors come in blocks
of rows, so that no more than `BLOCK_BYTES` or one layer's matrix is needed at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megafork.model.hf_mapping import (
    QkvSplit,
    ReadSlice,
    Rule,
    Split,
    VocabSplit,
    whole_model_rules,
)
from megafork.model.shape import ModelShape

BLOCK_BYTES = 256 << 20
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXTRA_STATE_OF = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class Block:
    """Rows [start, start + num_rows) of the tensor that a rule's HF tensors make together.

    hf_start counts rows of the HF tensor `hf`; for query, key and value, whose rows are mixed, the
    block is all of them and hf is None. num_rows can pass the HF tensor's end: rows of padding.
    """

    rule: Rule
    num_layers: int
    full_shape: tuple[int, ...]
    start: int
    num_rows: int
    hf: str | None
    hf_start: int

    @property
    def _layer(self) -> int | None:
        match = _LAYER.match(self.rule.megatron)
        return int(match[1]) if match else None

    @property
    def key(self) -> str:
        return key_of(self.rule)

    @property
    def size(self) -> tuple[int, ...]:
        """The stored tensor's shape, its axis of layers included."""
        stack = () if self._layer is None else (self.num_layers,)
        return (*stack, *self.full_shape)

    @property
    def padded(self) -> bool:
        """True where a checkpoint may hold another number of rows, as its layout pads them."""
        return isinstance(self.rule.sharding, VocabSplit)

    def offsets(self) -> tuple[int, ...]:
        layer = () if self._layer is None else (self._layer,)
        return (*layer, self.start, *(0 for _ in self.full_shape[1:]))

    def hf_rows(self) -> int:
        """Return the number of rows that stand in HF tensors, without the padding."""
        if self.hf is None:
            return self.num_rows
        index = self.rule.hf.index(self.hf)
        return max(0, min(self.num_rows, self.rule.hf_shapes[index][0] - self.hf_start))

    def sizes(self, rows: int) -> tuple[int, ...]:
        layer = () if self._layer is None else (1,)
        return (*layer, rows, *self.full_shape[1:])

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return the block's bytes without the padding."""
        return math.prod(self.sizes(self.hf_rows())) * dtype.itemsize

    def from_hf(self, read: ReadSlice) -> Tensor:
        """Return the block as it is stored, padding included."""
        if self.hf is None:
            values = self.rule.sharding.read(read, self.rule.hf, 0, 1)
        else:
            stop = self.hf_start + self.hf_rows()
            values = read(self.hf, 0, min(self.hf_start, stop), stop)
            if len(values) < self.num_rows:
                values = F.pad(values, (0, 0, 0, self.num_rows - len(values)))
        return values.view(self.sizes(self.num_rows))

    def to_hf(self, stored: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """Yield (HF name, first row, rows) of stored rows, which have no padding."""
        values = stored.view(-1, *self.full_shape[1:])
        if self.hf is not None:
            yield self.hf, self.hf_start, values
            return
        for name, tensor in zip(self.rule.hf, self.rule.sharding.merge([values]), strict=True):
            yield name, 0, tensor


def key_of(rule: Rule) -> str:
    """The stored tensor's name: all layers share one."""
    return _LAYER.sub("decoder.layers.", rule.megatron)


def blocks(shape: ModelShape, padded_vocab_size: int) -> Iterator[Block]:
    """Every block of a checkpoint of the whole model, in the order of the layers."""
    for rule in whole_model_rules(shape, padded_vocab_size):
        yield from _blocks(rule, shape.num_layers)


def extra_states(shape: ModelShape) -> Iterator[tuple[str, int]]:
    """(key, layer) of the empty objects that megatron-core asks for beside the weights."""
    for layer in range(shape.num_layers):
        for module in _EXTRA_STATE_OF:
            yield f"decoder.layers.{module}._extra_state", layer


def _blocks(rule: Rule, num_layers: int) -> Iterator[Block]:
    sharding, first = rule.sharding, rule.hf_shapes[0]
    if isinstance(sharding, QkvSplit):
        rows = sum(shape[0] for shape in rule.hf_shapes)
        yield Block(rule, num_layers, (rows, *first[1:]), 0, rows, None, 0)
        return
    if isinstance(sharding, VocabSplit):
        total, step = sharding.padded_size, _rows_of_a_block(first)
        for start in range(0, total, step):
            rows = min(step, total - start)
            yield Block(rule, num_layers, (total, *first[1:]), start, rows, rule.hf[0], start)
        return
    # Several HF tensors (gate and up) follow each other along the rows.
    assert len(rule.hf) == 1 or (isinstance(sharding, Split) and sharding.dim == 0)
    full = (first[0] * len(rule.hf), *first[1:])
    for index, name in enumerate(rule.hf):
        yield Block(rule, num_layers, full, index * first[0], first[0], name, 0)


def _rows_of_a_block(shape: Sequence[int]) -> int:
    return max(1, BLOCK_BYTES // (shape[1] * torch.float32.itemsize))
