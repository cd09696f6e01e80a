"""megatron-core's checkpoint files ("torch_dist"), written and read one block at a time.

The format is that of torch.distributed.checkpoint: .metadata knows every stored tensor's shape and,
for each of its blocks, the file and the bytes. torch's own writer and reader need the tensors of
the whole model in memory, or keep those of a file until it is full; these hold one block.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megafork.errors import UserError
from megafork.parallel.unpickling import guarded_checkpoint

METADATA = ".metadata"
_COMMON, _FORMAT = "common.pt", "metadata.json"  # what megatron-core keeps beside the tensors
_UNREADABLE = (
    *(EOFError, OSError, MemoryError, pickle.UnpicklingError),
    *(AttributeError, ImportError, LookupError, TypeError, ValueError, RuntimeError),
)
"""What a pickle that is damaged, or holds other objects than an index, is found by"""
_FORMAT_IS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWriter:
    """Appends blocks of stored tensors to numbered files; `close` makes them a checkpoint."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._file = self._next_file(0)
        self._number = 0
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, size: Sequence[int], offsets: Sequence[int], block: Tensor) -> None:
        """Append the block of the tensor `key` (its whole size is given) that starts at offsets."""
        if key not in self._tensors:
            properties = TensorProperties(dtype=block.dtype)
            self._tensors[key] = TensorStorageMetadata(properties, torch.Size(size), [])
        stored = self._tensors[key]
        assert isinstance(stored, TensorStorageMetadata)
        assert stored.properties.dtype == block.dtype and stored.size == torch.Size(size), key
        at = torch.Size(offsets)
        # Indices count from zero as torch's planner counts them; readers find blocks by offset.
        index = MetadataIndex(key, at, len(stored.chunks))
        stored.chunks.append(ChunkStorageMetadata(at, block.shape))
        start = self._file.tell()
        if block.untyped_storage().nbytes() != block.nbytes:
            block = block.clone()  # a view would be saved with all that it is a view of
        torch.save(block.contiguous(), self._file)
        self._close_entry(index, start)

    def add_object(self, key: str, index: int, count: int) -> None:
        """Append an object of megatron's, number `index` of `count`, that holds nothing."""
        name = f"{key}/shard_{index}_{count}"
        self._tensors[name] = BytesStorageMetadata()
        start = self._file.tell()
        torch.save([None], self._file)
        self._close_entry(MetadataIndex(name), start)

    def close(self) -> None:
        self._file.close()
        metadata = Metadata(state_dict_metadata=self._tensors, storage_data=self._storage)
        metadata.version = CURRENT_DCP_VERSION
        with (self._folder / METADATA).open("wb") as file:
            pickle.dump(metadata, file)
        torch.save({}, self._folder / _COMMON)
        (self._folder / _FORMAT).write_text(json.dumps(_FORMAT_IS))

    def _next_file(self, number: int) -> io.BufferedWriter:
        return (self._folder / f"__0_{number}.distcp").open("wb")

    def _close_entry(self, index: MetadataIndex, start: int) -> None:
        end = self._file.tell()
        self._storage[index] = _StorageInfo(Path(self._file.name).name, start, end - start)
        if end >= self._max_bytes:
            self._file.close()
            self._number += 1
            self._file = self._next_file(self._number)


class TorchDistReader:
    """Reads parts of stored tensors. Holds one stored block: the last one that it read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA).is_file():
            raise UserError(
                f"{folder} holds no {METADATA}: give the folder of a megatron-core checkpoint "
                "(dist_checkpointing, torch_dist)"
            )
        try:
            with guarded_checkpoint():
                metadata = FileSystemReader(folder).read_metadata()
            self._tensors = {
                key: stored
                for key, stored in metadata.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
            }
            self._storage = {
                (index.fqn, tuple(index.offset)): info
                for index, info in metadata.storage_data.items()
                if index.offset is not None
            }
        except _UNREADABLE as error:
            raise UserError(
                f"{folder / METADATA} cannot be read ({error}): copy it again"
            ) from None
        self._held: tuple[_StorageInfo, Tensor] | None = None

    def size(self, key: str) -> tuple[int, ...]:
        """Return a stored tensor's shape. Raises UserError when no such tensor is stored."""
        if key not in self._tensors:
            raise UserError(
                f"{self.folder} stores no tensor {key}: is it a checkpoint of this model?"
            )
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The part of a stored tensor, put together from the blocks that hold it."""
        result: Tensor | None = None
        filled = 0
        for chunk in self._tensors[key].chunks:
            overlap = list(_overlap(chunk, offsets, sizes))
            if any(start >= stop for start, stop in overlap):
                continue
            block = self._block(key, chunk)
            if list(chunk.offsets) == list(offsets) and list(chunk.sizes) == list(sizes):
                return block
            if result is None:
                result = torch.empty(*sizes, dtype=block.dtype)
            own = _within(overlap, chunk.offsets)
            result[_within(overlap, offsets)] = block[own]
            filled += block[own].numel()
        if result is None or filled != result.numel():
            raise UserError(f"{self.folder} does not hold all of {key}: copy it again")
        return result

    def _block(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[key, tuple(chunk.offsets)]
        if self._held is None or self._held[0] is not info:
            self._held = None  # before the next one is read
            try:
                with (self.folder / info.relative_path).open("rb") as file:
                    part = io.BufferedReader(_Section(file, info.offset, info.length))
                    block = torch.load(part, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise UserError(
                    f"{self.folder / info.relative_path} cannot be read ({error}): copy it again"
                ) from None
            self._held = info, block
        return self._held[1]


class _Section(io.RawIOBase):
    """Bytes [offset, offset + length) of a file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self._source, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._source.seek(self._offset + self._at)
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = self._source.readinto(view)
        self._at += count
        return count


def _overlap(
    chunk: ChunkStorageMetadata, offsets: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """[start, stop) along every axis, in the tensor's own coordinates."""
    for ours, size, theirs, length in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True):
        yield max(ours, theirs), min(ours + size, theirs + length)


def _within(overlap: Sequence[tuple[int, int]], offsets: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(start - at, stop - at) for (start, stop), at in zip(overlap, offsets, strict=True)
    )
