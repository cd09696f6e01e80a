"""Messages between a run's processes: what is sent arrives, and strangers get nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest

from megafork.rollout.frames import MAGIC, PREFIX_BYTES, Damaged, encode
from megafork.rollout.messages import Connection, connect, serve
from tests.helpers.background import BackgroundLoop

KEY = "of the run"
MOST = 1 << 22


@pytest.fixture
def echoing():
    """The address of an end that sends back what it gets, and the hellos that it took."""
    hellos = []

    async def talk(hello, link):
        hellos.append(hello)
        while True:
            header, arrays = await link.receive()
            del header["arrays"]
            await link.send(header, {name: [array] for name, array in arrays.items()})

    with BackgroundLoop() as loop:
        yield loop.submit(serve("127.0.0.1", KEY, talk, MOST)).result(), hellos


def framed(header, arrays=None):
    return b"".join(encode(header, arrays or {}))


def answer_to(address, *parts):
    """All bytes that come back, until the other end hangs up."""
    received = b""
    # It may have hung up, and say so, before all is sent and read.
    with socket.create_connection(address, timeout=30) as stranger, suppress(ConnectionError):
        for part in parts:
            stranger.sendall(part)
        with suppress(OSError):
            stranger.shutdown(socket.SHUT_WR)
        while part := stranger.recv(65536):
            received += part
    return received


def test_what_is_sent_arrives(echoing):
    """Several pieces are one array; an array is larger than what goes out at once."""
    address, hellos = echoing
    ids = np.arange(400_000, dtype=np.int32)
    logprobs = np.array([-0.0, -np.inf, np.nan], np.float32)
    with Connection(address, KEY, {"role": "rank"}) as connection:
        for step in (1, 2):
            header, arrays = connection.ask(
                {"kind": "rows", "step": step},
                {"ids": [ids[:5], ids[5:]], "logprobs": [logprobs], "none": [ids[:0]]},
                most_bytes=MOST,
            )
            assert (header["kind"], header["step"]) == ("rows", step)
            assert arrays["ids"].tolist() == ids.tolist() and len(arrays["none"]) == 0
            assert arrays["logprobs"].tobytes() == logprobs.tobytes()
        with pytest.raises(Damaged, match=r"1600000 bytes, and 67108864 \+ 1599999 are"):
            connection.ask({"kind": "rows"}, {"ids": [ids]}, most_bytes=1_599_999)
    assert hellos == [{"role": "rank", "kind": "hello", "arrays": []}]


def test_a_link_and_its_end(echoing):
    address, _ = echoing

    async def talk():
        link = await connect(address, KEY, {"role": "verifiers"}, MOST)
        await asyncio.gather(*(link.send({"number": n}) for n in range(50)))  # none is torn apart
        found = [(await link.receive())[0]["number"] for _ in range(50)]
        link.close()
        with pytest.raises((EOFError, OSError)):
            await link.receive()
        return found

    assert asyncio.run(talk()) == list(range(50))


@pytest.mark.parametrize(
    "hello",
    [
        framed({"kind": "hello"}),
        framed({"kind": "hello", "key": ""}),
        framed({"kind": "hello", "key": KEY[:-1]}),
        framed({"kind": "hello", "key": [KEY]}),
        framed({"kind": "hello", "key": KEY}, {"more": [np.zeros(1, np.int32)]}),
        framed({"kind": "hello", "key": KEY, "long": "x" * 5000}),
        b"GET / HTTP/1.1\r\nAuthorization: Bearer of the run\r\n\r\n",
        b"",
        MAGIC,
        MAGIC + struct.pack("<IQII", 1 << 31, 1 << 62, 0, 0),
        bytes(PREFIX_BYTES),
    ],
)
def test_strangers_get_no_answer(echoing, hello):
    address, hellos = echoing
    assert answer_to(address, hello, framed({"kind": "rows", "step": 1})) == b""
    assert hellos == []


def test_a_header_that_is_no_object(echoing):
    address, hellos = echoing
    text = json.dumps([KEY]).encode()
    sizes = struct.pack("<IQ", len(text), 0)
    checksums = struct.pack("<II", zlib.crc32(text, zlib.crc32(sizes)), 0)
    assert answer_to(address, MAGIC + sizes + checksums + text) == b""
    assert hellos == []


@pytest.mark.parametrize("fault", ["oversized", "damaged", "cut"])
def test_a_broken_message_ends_its_connection_alone(echoing, fault):
    address, _ = echoing
    hello = framed({"kind": "hello", "key": KEY})
    message = bytearray(framed({"kind": "rows"}, {"ids": [np.zeros(8, np.int32)]}))
    if fault == "oversized":
        message = framed({"kind": "rows"}, {"ids": [np.zeros(MOST // 4 + 1, np.int32)]})[:200]
    elif fault == "damaged":
        message[-1] ^= 1
    else:
        message = message[:-1]
    assert answer_to(address, hello, bytes(message)) == b""
    with Connection(address, KEY, {"role": "rank"}) as connection:
        assert connection.ask({"kind": "rows"})[0]["kind"] == "rows"
