"""Damaged versions of whole files, drawn by hypothesis: bytes, and values of JSON documents."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP = "\x00deep\x00"
"""Stands for 100,000 nested lists, which json.dumps could not write"""
HOSTILE = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "0",
    "\ud800",
    "\x1b[2J\x00",
    "../../etc/passwd",
    "x" * 5000,
    [],
    [[]],
    [None],
    ["a"],
    [1, 2, 3],
    {},
    {"": {}},
    DEEP,
]


def _paths(value: Any, at: tuple = ()) -> list[tuple]:
    found = [at]
    if isinstance(value, dict):
        for key, part in value.items():
            found += _paths(part, (*at, key))
    if isinstance(value, list):
        for index, part in enumerate(value[:4]):
            found += _paths(part, (*at, index))
    return found


def _changed(document: Any, path: tuple, change: str, value: Any) -> Any:
    if not path:
        return value if change == "set" else document
    document = copy.deepcopy(document)
    parent = document
    for step in path[:-1]:
        parent = parent[step]
    if change == "set":
        parent[path[-1]] = value
    elif change == "drop":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent["unknown"] = value
    else:
        parent.append(value)
    return document


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> bytes:
    """JSON with one to three of its values replaced, dropped or added."""
    document = valid
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_paths(document)))
        change = draw(st.sampled_from(["set", "set", "drop", "add"]))
        document = _changed(document, path, change, draw(st.sampled_from(HOSTILE)))
    text = json.dumps(document).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.encode()


@st.composite
def torn(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes with one to four of them, or one span of them, changed, lost, doubled or put in."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 1, 2, 10, 1000])))
        new = draw(
            st.sampled_from([b"", b"\x00", b"\xff\xfe", b"{", b"]", b'"', b"\n", b"9" * 5000])
        )
        kind = draw(st.sampled_from(["put", "flip", "double", "cut"]))
        if kind == "flip" and start < len(content):
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "double":
            content[stop:stop] = content[start:stop]
        elif kind == "cut":
            del content[start:]
        else:
            content[start:stop] = new
    return bytes(content)


def damaged(valid: Any) -> st.SearchStrategy[bytes]:
    """Of a document, or of lines of documents (a list of dicts)."""
    if isinstance(valid, list):
        whole = [json.dumps(line).encode() + b"\n" for line in valid]
        bad_line = st.integers(0, len(valid) - 1).flatmap(
            lambda i: documents(valid[i]).map(
                lambda line: b"".join([*whole[:i], line, b"\n", *whole[i + 1 :]])
            )
        )
        return st.one_of(bad_line, torn(b"".join(whole)))
    return st.one_of(documents(valid), torn(json.dumps(valid).encode()))
