"""A JSON header and arrays as one run of bytes with checksums: a journal's record, a message.

    8 bytes           the same in every frame, so that reading finds its place again after damage
    uint32, uint64    how many bytes the header has, and the arrays
    uint32, uint32    crc32 of the two numbers above with the header, and of the arrays
    header            JSON; under "arrays" the name, type and length of each array
    arrays            one after the other

Little-endian. Imports no torch.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from megafork.system.parsing import parse_json

MAGIC = b"\xf1frame\x01\xff"
"""Arrays may contain these bytes by chance; the header's checksum then fails there."""
_SIZES = struct.Struct("<IQ")
_CHECKSUMS = struct.Struct("<II")
PREFIX_BYTES = len(MAGIC) + _SIZES.size + _CHECKSUMS.size
_TYPES = {"<i4", "<i8", "<f4", "<f8", "|u1"}


class Damaged(ValueError):
    """Bytes that are not what was written."""


@dataclass(frozen=True)
class Prefix:
    """The fixed part at the beginning of a frame: sizes and checksums."""

    header_bytes: int
    arrays_bytes: int
    header_crc: int
    arrays_crc: int

    @classmethod
    def parse(cls, prefix: bytes | bytearray) -> Self:
        """Parse the beginning of a frame. Raises Damaged where none begins."""
        if len(prefix) < PREFIX_BYTES or not prefix.startswith(MAGIC):
            raise Damaged("no frame begins here")
        sizes = _SIZES.unpack_from(prefix, len(MAGIC))
        return cls(*sizes, *_CHECKSUMS.unpack_from(prefix, len(MAGIC) + _SIZES.size))

    def header(self, content: bytes | bytearray) -> dict[str, Any]:
        """Parse the header. Raises Damaged where sizes or header are not what was written."""
        sizes = _SIZES.pack(self.header_bytes, self.arrays_bytes)
        if zlib.crc32(content, zlib.crc32(sizes)) != self.header_crc:
            raise Damaged("its header is not what was written")
        return parse_json(content)

    def arrays(
        self, header: Mapping[str, Any], content: bytes | bytearray
    ) -> dict[str, np.ndarray]:
        """Return the arrays by name, views of `content`. Raises Damaged for others than written."""
        if zlib.crc32(content) != self.arrays_crc:
            raise Damaged("its arrays are not what was written")
        found, start = {}, 0
        for name, kind, length in header["arrays"]:
            if kind not in _TYPES:
                raise Damaged(f"its array {name} is of type {kind}")
            found[name] = np.frombuffer(content, kind, length, start)
            start += found[name].nbytes
        return found


def encode(
    header: Mapping[str, Any], arrays: Mapping[str, Sequence[np.ndarray]]
) -> list[bytes | memoryview]:
    """Build the parts of a frame, to be written in this order; arrays are not copied.

    arrays: by name, pieces of one type each, which the frame holds one after the other.
    """
    parts: list[memoryview] = []
    described = []
    for name, pieces in arrays.items():
        kind = pieces[0].dtype.newbyteorder("<").str
        whole = [np.ascontiguousarray(piece, kind) for piece in pieces]
        described.append([name, kind, sum(len(piece) for piece in whole)])
        parts += [piece.data for piece in whole]
    text = json.dumps({**header, "arrays": described}, separators=(",", ":")).encode()
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    sizes = _SIZES.pack(len(text), sum(part.nbytes for part in parts))
    of_header = zlib.crc32(text, zlib.crc32(sizes))
    return [MAGIC, sizes, _CHECKSUMS.pack(of_header, checksum), text, *parts]
