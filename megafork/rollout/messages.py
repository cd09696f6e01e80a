"""Messages between the processes of a run: frames (frames.py) over TCP, behind the run's key.

A connection begins with the caller's hello, which holds the key and says who calls. Whoever does
not know the key gets no answer and is hung up on. After it a message is a JSON header with a
"kind", and arrays. Nothing is unpickled, and no end reads more than it expects. Messages of the
kind "alive" say only that the sender runs, and no receiver sees them. Imports no torch.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import numpy as np

from megafork.rollout.frames import PREFIX_BYTES, Damaged, Prefix, encode

_log = logging.getLogger(__name__)
Header = dict[str, Any]
Arrays = dict[str, np.ndarray]
Pieces = Mapping[str, Sequence[np.ndarray]]
MAX_HEADER_BYTES = 64 << 20
_HELLO_BYTES = 4096
_HELLO_S = 30.0
_CONNECT_S = 30.0
_PART = 1 << 20
ALIVE = {"kind": "alive"}
ALIVE_S = 1.0
"""Seconds between two of them"""
_LOOKS = 3
"""Looks in a row without a word; then the other end is silent. One would not do: this process may
itself have been stopped for a while, and find at its first look that the time is over."""


class Silent(OSError):
    """The other end has not said for too long that it runs."""


class Link:
    """An end of a connection, on an event loop. A message may bring `most_bytes` of arrays.

    silence_s: for how long the other end may send nothing; None is for ever.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        most_bytes: int,
        silence_s: float | None = None,
    ) -> None:
        self._reader, self._writer, self._most_bytes = reader, writer, most_bytes
        self.silence_s = silence_s
        self._sending = asyncio.Lock()
        _set_up(writer.get_extra_info("socket"))

    async def receive(self) -> tuple[Header, Arrays]:
        """Wait for a message. Raises EOFError or OSError at the end of the connection, Silent after
        silence_s without one, and Damaged for what is none."""
        while True:
            receiving = asyncio.create_task(self._receive())
            try:
                await self._wait_for(receiving)
            finally:
                receiving.cancel()
            header, arrays = receiving.result()
            if header.get("kind") != ALIVE["kind"]:
                return header, arrays

    async def _wait_for(self, receiving: asyncio.Task[tuple[Header, Arrays]]) -> None:
        if self.silence_s is None:
            await asyncio.wait({receiving})
            return
        for _ in range(_LOOKS):
            await asyncio.wait({receiving}, timeout=self.silence_s / _LOOKS)
            if receiving.done():
                return
        raise Silent(f"nothing was heard of it for {self.silence_s:g} s")

    async def say_alive(self) -> None:
        """Tell the other end every second that this process runs, until the connection ends."""
        with suppress(OSError):
            while True:
                await self.send(ALIVE)
                await asyncio.sleep(ALIVE_S)

    async def _receive(self) -> tuple[Header, Arrays]:
        prefix = Prefix.parse(await self._reader.readexactly(PREFIX_BYTES))
        _check(prefix, MAX_HEADER_BYTES, self._most_bytes)
        header = prefix.header(await self._reader.readexactly(prefix.header_bytes))
        return header, prefix.arrays(header, await self._reader.readexactly(prefix.arrays_bytes))

    async def send(self, header: Header, arrays: Pieces | None = None) -> None:
        """Return when the message is on its way; arrays are not copied as a whole.

        It is sent to its end also where the caller is cancelled: half a message would be damage.
        """
        await asyncio.shield(self._send(header, arrays))

    async def _send(self, header: Header, arrays: Pieces | None) -> None:
        async with self._sending:
            for part in encode(header, arrays or {}):
                view = memoryview(part).cast("B")
                for start in range(0, len(view), _PART):
                    self._writer.write(view[start : start + _PART])
                    await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


Talk = Callable[[Header, Link], Awaitable[None]]


async def serve(host: str, key: str, talk: Talk, most_bytes: int) -> tuple[str, int]:
    """Listen on the running event loop, for as long as it runs. Returns the address.

    talk: is called with the hello of each caller that knows the key, and the connection, which is
    closed when it returns.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(EOFError, OSError, ValueError):  # a stranger
                header = await asyncio.wait_for(_hello(reader), _HELLO_S)
                if hmac.compare_digest(str(header.pop("key", "")).encode(), key.encode()):
                    await _talk(talk, header, Link(reader, writer, most_bytes))
        finally:
            writer.close()

    answering: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(answer(reader, writer))
        answering.add(task)
        task.add_done_callback(answering.discard)

    server = await asyncio.start_server(accept, host, 0, backlog=4096)
    found, port = server.sockets[0].getsockname()[:2]
    return found, port


async def connect(address: tuple[str, int], key: str, hello: Header, most_bytes: int) -> Link:
    """Connect to an address of `serve`, on an event loop, and say hello. Raises OSError."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(*address), _CONNECT_S)
    link = Link(reader, writer, most_bytes)
    await link.send(hello | {"kind": "hello", "key": key})
    return link


class Connection:
    """A caller's end without an event loop, for one question at a time. Close it. Raises OSError.

    silence_s: for how long the other end may send nothing while an answer is awaited; None is for
    ever.
    """

    def __init__(
        self,
        address: tuple[str, int],
        key: str,
        hello: Header,
        *,
        silence_s: float | None = None,
    ) -> None:
        self._socket = socket.create_connection(address, _CONNECT_S)
        self._socket.settimeout(silence_s and silence_s / _LOOKS)
        self._silence_s = silence_s
        self._sending = False
        self._postponed: Header | None = None
        _set_up(self._socket)
        self.send(hello | {"kind": "hello", "key": key})

    def ask(
        self, header: Header, arrays: Pieces | None = None, *, most_bytes: int = 0
    ) -> tuple[Header, Arrays]:
        """Send a message and wait for its answer. most_bytes: of the answer's arrays.

        Raises OSError when the other end is gone, Silent when it hangs, Damaged for an answer that
        is none.
        """
        self.send(header, arrays)
        return self.receive(most_bytes=most_bytes)

    def send(self, header: Header, arrays: Pieces | None = None) -> None:
        """Send a message; arrays are not copied as a whole."""
        self._sending = True
        try:
            for part in encode(header, arrays or {}):
                self._socket.sendall(part)
        except TimeoutError as error:
            raise Silent("it takes nothing that is sent to it") from error
        finally:
            self._sending = False
        if self._postponed is not None:
            postponed, self._postponed = self._postponed, None
            self.send(postponed)

    def interrupt(self, header: Header) -> None:
        """Send a message from a signal's handler, after the one that is being sent, if any."""
        if self._sending:
            self._postponed = header
        else:
            self.send(header)

    def receive(self, *, most_bytes: int = 0) -> tuple[Header, Arrays]:
        """Wait for a message. Raises as `ask`."""
        while True:
            prefix = Prefix.parse(self._received(PREFIX_BYTES))
            _check(prefix, MAX_HEADER_BYTES, most_bytes)
            header = prefix.header(self._received(prefix.header_bytes))
            arrays = prefix.arrays(header, self._received(prefix.arrays_bytes))
            if header.get("kind") != ALIVE["kind"]:
                return header, arrays

    def _received(self, num_bytes: int) -> bytearray:
        received = bytearray(num_bytes)
        view, start = memoryview(received), 0
        while start < num_bytes:
            count = self._read(view[start:])
            if not count:
                raise ConnectionResetError("connection closed")
            start += count
        return received

    def _read(self, view: memoryview) -> int:
        for _ in range(_LOOKS):
            with suppress(TimeoutError):
                return self._socket.recv_into(view)
        raise Silent(f"nothing was heard of it for {self._silence_s:g} s")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


async def _talk(talk: Talk, hello: Header, link: Link) -> None:
    """Talk until the other end hangs up; whatever else ends the talk is a fault, and logged."""
    try:
        await talk(hello, link)
    except (EOFError, OSError):
        pass
    except Exception as error:
        _log.warning("hung up on %s: %r", hello.get("role", "a caller"), error)


def _set_up(connection: socket.socket) -> None:
    """Have a machine that is gone found out within a minute, and a message's parts sent at once:
    else they wait for each other, 50 ms for each question."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform.startswith("linux"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)  # ms


async def _hello(reader: asyncio.StreamReader) -> Header:
    prefix = Prefix.parse(await reader.readexactly(PREFIX_BYTES))
    _check(prefix, _HELLO_BYTES, 0)
    header = prefix.header(await reader.readexactly(prefix.header_bytes))
    if not isinstance(header, dict):
        raise Damaged("its header is no object")
    return header


def _check(prefix: Prefix, header_bytes: int, arrays_bytes: int) -> None:
    if prefix.header_bytes > header_bytes or prefix.arrays_bytes > arrays_bytes:
        raise Damaged(
            f"a message of {prefix.header_bytes} + {prefix.arrays_bytes} bytes, and "
            f"{header_bytes} + {arrays_bytes} are the most that is expected"
        )
