"""The choice of a request's server: the one with the fewest outstanding tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Request:
    """A request for n responses to one prompt."""

    tokens: int
    """Tokens of the prompt, and as many as the responses may have"""
    num_responses: int
    server: int | None = None
    """Number of the server that has it; None: it waits for room"""


class Assignment:
    """The queue of requests: first come, first served, as soon as an open server has room.

    So a quick server gets more of them than a slow one, and one that joins late gets its share.
    max_responses: the most outstanding responses of a server; with twice what it runs at once it is
    never idle. A server without any takes a request of whatever size. Ties go to the first server.
    """

    def __init__(self, num_servers: int, max_responses: int) -> None:
        self.tokens = [0] * num_servers
        self.num_responses = [0] * num_servers
        self.is_open = [False] * num_servers
        self.waiting: deque[Request] = deque()
        self._max_responses = max_responses

    def enter(self, request: Request) -> list[Request]:
        """Add a request. Returns the requests that got a server by it."""
        self.waiting.append(request)
        return self._place()

    def leave(self, request: Request) -> list[Request]:
        """Remove a request that is over, or given up. Returns those that got a server by it."""
        if request.server is None:
            self.waiting.remove(request)
        else:
            self.tokens[request.server] -= request.tokens
            self.num_responses[request.server] -= request.num_responses
        return self._place()

    def open(self, server: int) -> list[Request]:
        self.is_open[server] = True
        return self._place()

    def close(self, server: int) -> None:
        """Give the server nothing more; the requests that it has still have to `leave`."""
        self.is_open[server] = False

    def _place(self) -> list[Request]:
        placed = []
        while self.waiting:
            request = self.waiting[0]
            with_room = [s for s in range(len(self.tokens)) if self._has_room(s, request)]
            if not with_room:
                break
            server = min(with_room, key=lambda s: self.tokens[s])
            request.server = server
            self.tokens[server] += request.tokens
            self.num_responses[server] += request.num_responses
            placed.append(self.waiting.popleft())
        return placed

    def _has_room(self, server: int, request: Request) -> bool:
        then = self.num_responses[server] + request.num_responses
        is_idle = self.num_responses[server] == 0
        return self.is_open[server] and (is_idle or then <= self._max_responses)
