"""The ranks' end of the controller: starting it, asking it, and ending with it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megafork.config import TrainConfig
from megafork.controller.child import Child
from megafork.controller.ranks import settings_digest
from megafork.data.sample import Group, Sample
from megafork.data.token_table import TokenTable, table_of
from megafork.errors import USER_ERROR, Interrupted, PeerError, UserError
from megafork.parallel.addresses import own_address
from megafork.parallel.mesh import Mesh
from megafork.rollout.frames import Damaged
from megafork.rollout.messages import Arrays, Connection, Header, Pieces, Silent
from megafork.system import failure_file

_CONTROLLER, _AGENT = "megafork.controller.process", "megafork.controller.agent"
_COLUMN_BYTES = 1 << 32
"""The most that a batch's columns and prompts take"""


@dataclass(frozen=True)
class Batch:
    """The batch that one step trains on."""

    step: int
    trained_by: int
    """The policy version that it was asked for, and that trains on it"""
    state: dict[str, Any]
    """The controller's state when the batch was full, for a checkpoint"""
    table: TokenTable
    """Without rows: `fetch_rows` gets those that a rank works on"""


class Controller:
    """The controller, as this rank sees it. Every rank asks the same questions in the same order.

    Raises what an answer says, on every rank at the same place: on rank 0 a UserError, on the
    others a PeerError, for it is rank 0's to tell. Raises UserError where the controller ends or
    hangs.
    """

    def __init__(
        self,
        mesh: Mesh,
        connection: Connection,
        process: Child | None = None,
        agent: Child | None = None,
        startup_timeout_s: float = 0.0,
    ) -> None:
        """process: the controller, for rank 0, which started it. agent: the node's, for the node's
        first rank; it has to be up within startup_timeout_s."""
        self.mesh = mesh
        self.connection = connection
        self._process, self._agent = process, agent
        self._startup_timeout_s = startup_timeout_s
        self._number = 0
        """How many questions there were so far, the same on every rank"""
        self.data: dict[str, Any] = {}
        """What a checkpoint keeps of the data"""
        self.stopped_by: str | None = None
        """The signal that ended the run early"""
        self.has_finished = False
        """All steps are done"""

    @classmethod
    @contextlib.contextmanager
    def connect(cls, config: TrainConfig, mesh: Mesh) -> Iterator[Controller]:
        """Start the controller and each node's agent, and connect this rank. Collective."""
        rank, here = mesh.rank, int(os.environ.get("LOCAL_RANK", "0"))
        with contextlib.ExitStack() as stack:
            process: Child | None = None
            agent: Child | None = None
            settings = config.model_dump(mode="json")
            key = mesh.on_rank_zero(lambda: secrets.token_urlsafe(32))
            num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
            order = {"config": settings, "key": key, "num_nodes": num_nodes}

            def start() -> tuple[str, int]:
                nonlocal process
                told = order | {"world_size": mesh.world_size}
                process = stack.enter_context(Child(_CONTROLLER, told))
                answer = process.answer(config.parallel.startup_timeout_s)
                if answer is None:
                    raise UserError(f"the controller did not start: {process.end()}")
                return tuple(answer["address"])

            address = mesh.on_rank_zero(start)

            def join() -> Connection:
                nonlocal agent
                if here == 0:
                    told = order | {
                        "address": address,
                        "node": int(os.environ.get("GROUP_RANK", "0")),
                        "host": own_address(),
                        "device": mesh.device.type,
                        "num_trainers": int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size)),
                    }
                    agent = stack.enter_context(Child(_AGENT, told))
                hello = {"role": "rank", "rank": rank, "settings": settings_digest(config)}
                try:
                    return stack.enter_context(
                        Connection(address, key, hello, silence_s=config.run.silence_s)
                    )
                except OSError as error:
                    raise UserError(
                        f"the controller is not to be reached at {address[0]}:{address[1]} "
                        f"({error}): every node of the run needs a way to the ports that rank 0's "
                        "opens"
                    ) from error

            connection: list[Connection] = []
            mesh.on_every_rank(lambda: connection.append(join()))
            timeout_s = config.parallel.startup_timeout_s
            yield cls(mesh, connection[0], process, agent, timeout_s)

    def ask(
        self,
        kind: str,
        /,
        arrays: Pieces | None = None,
        *,
        most_bytes: int = 0,
        **said: Any,
    ) -> tuple[Header, Arrays]:
        """Ask and wait for the answer. most_bytes: of its arrays."""
        if kind != "rows":  # which each replica asks for by itself
            self._number += 1
        question = said | {"kind": kind, "number": self._number}
        try:
            answer, found = self.connection.ask(question, arrays, most_bytes=most_bytes)
        except (OSError, Damaged) as error:
            raise self._lost(error) from error
        if answer["kind"] == "error":
            if answer.get("peer") or self.mesh.rank != 0:
                raise PeerError(answer["text"])
            raise UserError(answer["text"])
        return answer, found

    def tell_signal(self, name: str) -> None:
        """Tell the controller, from a signal's handler, that the run is to end."""
        with contextlib.suppress(OSError):  # the controller has ended, as the next question finds
            self.connection.interrupt({"kind": "signal", "name": name})

    def _lost(self, error: OSError | Damaged) -> UserError:
        """Return the error of a controller that has ended, or hangs, which rank 0 ends then.

        Rank 0 knows the process: what it says goes before the other ranks' words.
        """
        if self._process is None:
            how = "hangs" if isinstance(error, Silent) else "is lost"
            limit = " (run.silence_s)" if isinstance(error, Silent) else ""
            return PeerError(f"the controller {how}: {error}{limit}")
        pid = self._process.process.pid
        if isinstance(error, Silent):
            self._process.process.kill()
            told = f"hangs, {error} (run.silence_s), and was ended"
        else:
            told = f"ended: {self._process.end()} ({error})"
        message = (
            f"the controller (process {pid}) {told}. What it generated is in the journal: go on "
            "with megafork train --resume"
        )
        failure_file.leave(message, status=USER_ERROR)
        return UserError(message)

    @property
    def is_going_on(self) -> bool:
        """The run has not come to an end."""
        return self.stopped_by is None and not self.has_finished

    def wait_for_servers(self) -> None:
        """Wait until the servers are up, and asleep: their devices are the ranks' then."""
        self._require_agent()
        self.ask("servers")

    def _require_agent(self) -> None:
        """Wait until this node's agent has joined the controller. Raises UserError if not."""
        agent, self._agent = self._agent, None
        if agent is not None and agent.answer(self._startup_timeout_s) is None:
            raise UserError(f"the agent of this node did not start: {agent.end()}")

    def begin(self, step: int, state: dict[str, Any] | None) -> None:
        """Bring the run to the end of `step`. state: of a checkpoint (`Checkpoints`), if any.

        Raises Interrupted when a signal comes before the run has begun.
        """
        self._require_agent()
        found = state or {}
        answer, _ = self.ask("begin", step=step, state=found.get("collector"), row=found.get("row"))
        if answer["kind"] == "stop":
            raise Interrupted(f"stopped by {answer['signal']} while it started")
        self.data = answer["data"]

    def batch(self, step: int) -> tuple[Batch | None, bool, list[Group]]:
        """Ask for a step's batch.

        Returns the batch, None at the end of the run; whether the weights are to be pushed again
        before it can be had; and what the servers sampled to be compared, if anything.
        """
        answer, arrays = self.ask("batch", step=step, most_bytes=_COLUMN_BYTES)
        groups = probed(answer, arrays)
        if answer["kind"] == "again":
            return None, True, groups
        if answer["kind"] == "stop":
            self.note_stop(answer)
            return None, False, groups
        columns = {name: found for name, found in arrays.items() if not name.startswith("probe_")}
        batch = Batch(step, answer["trained_by"], answer["state"], table_of(columns))
        return batch, False, groups

    def note_stop(self, answer: Header) -> None:
        """Note that the run ends, as the controller's answer says, and why."""
        self.stopped_by = answer["signal"]
        self.has_finished = self.stopped_by is None

    def goodbye(self, final: str | None) -> None:
        """Have the report written. final: the last policy's folder, of a run that is complete."""
        self.ask("goodbye", final=final)


def probed(answer: Header, arrays: Arrays) -> list[Group]:
    """Return the groups of a probe, of one response each, that an answer holds."""
    described = answer.get("probe", [])
    if not described:
        return []
    ends = np.cumsum([one["num_tokens"] for one in described])[:-1]
    tokens = np.split(arrays["probe_token_ids"], ends)
    logprobs = np.split(arrays["probe_logprobs"], ends)
    return [
        Group(i, one["prompt_ids"], 0, [Sample(i, tokens[i], logprobs[i], one["truncated"])])
        for i, one in enumerate(described)
    ]
