"""Writes HF safetensors folders whose names and shapes are known before the first value.

The files get their headers and sizes at once; values then go to their places in any order, so
that nothing has to be held until a file is full.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megafork.checkpoint.hf import shard_name, write_index
from megafork.model.hf_folder import SAFETENSORS_DTYPES
from megafork.system.disk import naming

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    """The place of a tensor's first byte."""

    file: Path
    offset: int
    info: TensorInfo


class StreamingSafetensors:
    """The files of one folder, cut as HF cuts them: a new one where `max_bytes` would be passed."""

    def __init__(self, folder: Path, tensors: Sequence[TensorInfo], max_bytes: int) -> None:
        self._places: dict[str, _Place] = {}
        shards = list(_shards(tensors, max_bytes))
        for number, shard in enumerate(shards, 1):
            self._lay_out(folder / shard_name(number, len(shards)), shard)
        if len(shards) > 1:
            weight_map = {name: place.file.name for name, place in self._places.items()}
            write_index(folder, weight_map, sum(info.num_bytes for info in tensors))

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Put `rows` of a tensor in their place, from row `start` on."""
        place = self._places[name]
        assert rows.dtype == place.info.dtype and rows.shape[1:] == place.info.shape[1:], name
        assert start + len(rows) <= place.info.shape[0], name
        with naming(place.file), place.file.open("r+b") as file:
            file.seek(place.offset + start * place.info.row_bytes)
            file.write(rows.contiguous().view(torch.uint8).numpy().data)

    def _lay_out(self, path: Path, shard: Sequence[TensorInfo]) -> None:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offsets, end = [], 0
        for info in shard:
            offsets.append(end)
            end += info.num_bytes
            header[info.name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offsets[-1], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the values are aligned
        with naming(path), path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            first = file.tell()
            os.truncate(file.fileno(), first + end)
        for info, offset in zip(shard, offsets, strict=True):
            self._places[info.name] = _Place(path, first + offset, info)


def _shards(tensors: Sequence[TensorInfo], max_bytes: int) -> Iterator[list[TensorInfo]]:
    shard: list[TensorInfo] = []
    size = 0
    for info in tensors:
        if shard and size + info.num_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(info)
        size += info.num_bytes
    yield shard
