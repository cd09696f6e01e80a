"""The steps of a run, as the controller decides them: pushes, batches, metrics.

What can be mended (a lost server, a node's verifiers) is mended here, and no rank hears of it. Only
weights that the servers lack are the ranks asked to push again. Imports no torch.

    push_begins    send; join, where the ranks make their senders anew first; leave, where all of a
                   colocated trainer's memory is needed to start a server; again; stop
    join           send; again; stop
    push_ended     done; again; stop
    batch          a batch; again, for the servers were lost with their weights; stop
    finish         ready
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from megafork.config import TrainConfig
from megafork.controller.batch_source import Generation, probe_message
from megafork.controller.pushes import Pushes, PushFailed
from megafork.controller.ranks import Answer, Question
from megafork.controller.run_log import SKIPPED, RunLog
from megafork.controller.stop import Stop, Stopped
from megafork.data.sample import known_columns
from megafork.errors import UserError
from megafork.rollout.agents import Agents
from megafork.rollout.batch_metrics import lag_metrics, overlap_metrics, rollout_metrics
from megafork.rollout.collector import RolloutBatch
from megafork.rollout.fleet import Fleet
from megafork.rollout.messages import Header, Pieces

T = TypeVar("T")
_AGAIN: Answer = ({"kind": "again"}, {})


class ServersLost(Exception):
    """No server is left that has the policy's weights: they have to be pushed again."""


@dataclass
class _Row:
    """A step's row of metrics.jsonl, until its push and its evaluation are done."""

    step: int
    metrics: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    batch: RolloutBatch | None = None
    """Without its groups; None: the row is a checkpoint's"""
    started: float = 0.0
    pushed: float | None = None
    """When its push was done, on time.monotonic's clock"""

    def complete(self) -> dict[str, float]:
        """Return what metrics.jsonl gets of the step, as far as it is known."""
        if self.batch is None:
            return self.metrics | {f"time/{name}": value for name, value in self.seconds.items()}
        total = (self.pushed or time.monotonic()) - self.started
        seconds = self.seconds | {"total": total}
        tokens, generated = self.metrics["tokens"], self.batch.num_generated_tokens
        return (
            self.metrics
            | overlap_metrics(self.batch, seconds)
            | {
                "throughput/tokens_per_second": tokens / total,
                "throughput/generated_tokens_per_second": generated / total,
            }
            | {f"time/{name}": value for name, value in seconds.items()}
        )


class Steps:
    """Answers the ranks' questions from the first push on. Close it."""

    def __init__(
        self,
        config: TrainConfig,
        fleet: Fleet,
        agents: Agents,
        generation: Generation,
        log: RunLog,
        stop: Stop,
    ) -> None:
        self.config, self.fleet, self.agents = config, fleet, agents
        self.generation, self.log, self.stop = generation, log, stop
        self.colocated = config.rollout.placement == "colocated"
        self.pushes = Pushes(
            fleet,
            workers_of_each=config.rollout.tensor_parallel,
            timeout_s=config.sync.timeout_s,
            in_flight=config.rollout.in_flight_update,
            colocated=self.colocated,
        )
        self._batch: RolloutBatch | None = None
        self._batch_step = 0
        self._batch_started = self._batch_seconds = 0.0
        self._row: _Row | None = None
        self._push_seconds: dict[str, float] = {}
        """Seconds of each phase of the push that is under way"""
        self._version = 0
        self._has_pushed = self._probe_is_due = False
        self._to_evaluate: int | None = None
        self._deaths = 0
        """How often all servers were lost together, since something was generated"""
        self._death: Exception | None = None
        """The cause of the last, until the servers are replaced"""
        self._has_started_again = False
        """Lost servers of a colocated run, for the push that is under way"""

    def begin(self, step: int, row: dict[str, float] | None) -> None:
        """Go on after this step. row: the step's metrics from its checkpoint, if any.

        The row is written if metrics.jsonl lacks it, because the run ended before.
        """
        if row is not None and not self.log.has_row(step):
            self._row = _Row(step, row)
        if self._evaluation_is_due(step) and not self.log.has_evaluated(step):
            self._to_evaluate = step

    def close(self) -> None:
        self.generation.close()

    async def answer(self, question: Question) -> Answer:
        """Decide the answer to a question; `Ranks` calls it once for each."""
        decide: dict[str, Callable[[Question], Awaitable[Answer]]] = {
            "push_begins": self._push_begins,
            "join": self._join,
            "push_ended": self._push_ended,
            "batch": self._next_batch,
            "finish": self._finish,
        }
        try:
            return await decide[question.kind](question)
        except Stopped:
            return await self._stopped()
        except ServersLost:
            return _AGAIN
        finally:
            if self.stop.ends_are_expected:
                self._write_row()

    async def _stopped(self) -> Answer:
        await self.generation.give_up()
        if self.colocated:
            await self.agents.servers("stop")  # or they hold what the ranks need to save
        self._write_row()
        return {"kind": "stop", "signal": self.stop.signal}, {}

    # ------------------------------------------------------------------ pushes

    async def _push_begins(self, question: Question) -> Answer:
        said = (await question.by_all())[0]
        self.stop.check()
        self._version = int(said["version"])
        if self._death is not None and not self.colocated:
            await self.stop.unless_asked(self._replace_servers())
        lost = self.fleet.silent()
        if self.colocated and lost and not self._has_started_again:
            if not said["left"]:
                return {"kind": "leave"}, {}
            await self.stop.unless_asked(self._start_again(lost))
            return _AGAIN
        if lost and not self.colocated:
            await self.agents.servers("restart", lost)
        return await self._pushing(self.stop.unless_asked(self.pushes.begins()))

    async def _join(self, question: Question) -> Answer:
        said = await question.by_all()
        return await self._pushing(self.pushes.joined([header["offer"] for header in said]))

    async def _pushing(self, work: Coroutine[Any, Any, Header]) -> Answer:
        started = time.monotonic()
        try:
            return await work, {}
        except UserError as error:
            return await self._push_failed(PushFailed.of(error))
        finally:
            self._took("sync", time.monotonic() - started)

    async def _push_ended(self, question: Question) -> Answer:
        said = await question.by_all()
        started = time.monotonic()
        for phase, seconds in said[0]["seconds"].items():
            self._took(phase, seconds)
        try:
            await self.pushes.ended(self._version, [header["failure"] for header in said])
        except UserError as error:
            return await self._push_failed(error)
        self._has_started_again = False
        await self.agents.servers("forgive")
        self._pushed(started)
        self.stop.check()
        every, step = self.config.sync.check_every, self._version - 1
        self._probe_is_due |= not self._has_pushed or bool(every and step % every == 0)
        self._has_pushed = True
        if self.colocated:
            return {"kind": "done"}, {}
        started = time.monotonic()
        described, arrays = await self.stop.unless_asked(self._probe())
        self._pushed(started)
        return self._delivered({"kind": "done"} | described, arrays)

    def _took(self, phase: str, seconds: float) -> None:
        """Count seconds of the push that is under way, of attempts that failed too."""
        self._push_seconds[phase] = self._push_seconds.get(phase, 0.0) + seconds

    def _pushed(self, started: float) -> None:
        """Note what the newest step's push took, the last part of it since `started`."""
        now = time.monotonic()
        self._took("sync", now - started)
        if self._row is not None and self._row.batch is not None:
            self._row.pushed = now
            for phase, seconds in self._push_seconds.items():
                self._row.seconds[phase] = self._row.seconds.get(phase, 0.0) + seconds
        self._push_seconds = {}

    def _delivered(self, header: Header, arrays: Pieces) -> Answer:
        """Return the answer, after which a probe that it holds is not due any more."""
        if "probe" in header:
            self._probe_is_due = False
        return header, arrays

    async def _push_failed(self, cause: UserError) -> Answer:
        """Have the push done again, if servers were lost and others are left to push to.

        Raises the cause if none was lost, and ServersLost if all were.
        """
        self.stop.check()
        num_lost = await self.fleet.mark_lost()
        await self._look_for_deaths(cause)
        if not num_lost:
            raise cause
        if self.colocated:
            await self._sleep()
        return _AGAIN

    async def _look_for_deaths(self, cause: Exception) -> None:
        """Look, after a failure, whether a server is left; one that does not answer counts as dead.

        Raises ServersLost where none is left, UserError where they died too often.
        """
        if await self.fleet.health():
            return
        self.stop.check()  # the signal may have ended the servers too
        self._deaths += 1
        most = self.config.rollout.max_restarts
        if self._deaths > most:
            raise UserError(
                f"the rollout server died, and rollout.max_restarts={most} new ones did not do: "
                f"{cause}"
            ) from cause
        self.log.note(f"warning: the rollout server died and is replaced. {cause}")
        await self.generation.give_up()
        self._death, self._has_started_again = cause, False
        if self.colocated:
            await self._sleep()
        raise ServersLost(str(cause)) from cause

    async def _replace_servers(self) -> None:
        await self.agents.servers("restart", self.fleet.silent())
        timeout_s = self.config.rollout.startup_timeout_s
        await self.fleet.wait_for_one(timeout_s)
        self._death = None

    async def _start_again(self, lost: list[str]) -> None:
        """Start lost colocated servers again; a new one takes all of its memory at once."""
        await self.agents.servers("start_again", lost)
        await self.fleet.look_again()
        await self._sleep()
        self._has_started_again, self._death = True, None

    async def _sleep(self) -> None:
        """Have the servers give up their memory; those that do not are ended."""
        awake = await self.fleet.sleep()
        if awake:
            self.stop.check()
            await self.agents.servers("end", awake)

    # ------------------------------------------------------------------ batches

    async def _next_batch(self, question: Question) -> Answer:
        return await self.stop.unless_asked(self._batch_of(int(question.first["step"])))

    async def _batch_of(self, step: int) -> Answer:
        self._batch = None  # its tokens were trained on
        if self._to_evaluate is None:
            self._write_row()
        probe, arrays = await self._probe() if self.colocated else ({}, {})
        await self._evaluate()
        self._write_row()
        if step > self.config.training.steps:
            self.stop.expect_ends()
            if self.colocated:
                await self._sleep()
            return self._delivered({"kind": "stop", "signal": None} | probe, arrays)
        self._batch_started = time.monotonic()
        batch = await self._generated(self.generation.batch(step, self._version))
        self._batch_seconds = time.monotonic() - self._batch_started
        if self.colocated:
            await self._sleep()
        self._batch, self._batch_step = batch, step
        filtering = self.config.algorithm.overlong_filtering
        columns = known_columns(batch.groups, overlong_filtering=filtering)
        header = {"kind": "batch", "trained_by": self._version, "state": batch.state}
        pieces = {name: [found] for name, found in columns.items()}
        return self._delivered(header | probe, {**arrays, **pieces})

    def rows(self, step: int, uids: Sequence[int]) -> Answer:
        """Return the rows of the batch's samples with these uids. Raises KeyError, ValueError."""
        if self._batch is None or step != self._batch_step:
            raise ValueError(f"step {self._batch_step} is trained on now")
        return {"kind": "rows"}, self._batch.rows(uids)

    async def _probe(self) -> Answer:
        """Sample what the ranks are to compare with what they compute, if that is due."""
        if not self._probe_is_due:
            return {}, {}
        groups = await self._generated(self.generation.probe())
        described, arrays = probe_message(groups)
        return {"probe": described}, arrays

    def _evaluation_is_due(self, step: int) -> bool:
        every, last = self.config.eval.every, self.config.training.steps
        is_due = step in (0, last) or bool(every and step % every == 0)
        return is_due and self.config.data.eval is not None

    async def _evaluate(self) -> None:
        step = self._to_evaluate
        if step is None:
            return
        started = time.monotonic()
        accuracy = await self._generated(self.generation.evaluate(step))
        self._to_evaluate = None
        if self._row is not None and self._row.step == step:
            self._row.metrics["eval/accuracy"] = accuracy
            self._row.seconds["eval"] = time.monotonic() - started

    async def _generated(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what is generated. Raises ServersLost where that cannot go on."""
        try:
            found = await work
        except Exception as error:
            await self.generation.give_up()
            self.stop.check()
            await self._look_for_deaths(error)
            raise
        self._deaths = 0
        return found

    # ------------------------------------------------------------------ metrics

    async def _finish(self, question: Question) -> Answer:
        """Take a step's metrics; its row is written when its push and evaluation are done."""
        said = (await question.by_all())[0]
        step, batch = int(said["step"]), self._batch
        assert batch is not None
        if said["skipped"]:
            await asyncio.to_thread(self.log.skipped, step, said["skipped"], batch.groups)
            if said["is_exhausted"]:
                raise self._too_many_skipped(step, said["skipped"][-1]["reason"])
        await asyncio.to_thread(self.log.tokens, step, said)
        metrics = said["metrics"] | rollout_metrics(batch, self._version)
        metrics |= lag_metrics(batch.groups, self._version)
        seconds = said["seconds"] | {
            "generate": self._batch_seconds,
            "reward": batch.reward_seconds,
        }
        light = replace(batch, groups=[], generated=[])
        self._row = _Row(step, metrics, seconds, said["notes"], light, self._batch_started)
        if self._evaluation_is_due(step):
            self._to_evaluate = step
        return {"kind": "ready", "row": self._row.complete()}, {}

    def _write_row(self) -> None:
        if self._row is None:
            return
        row, self._row = self._row, None
        if row.batch is not None and (replayed := row.batch.num_replayed):
            self.log.note(f"step {row.step:>4}  {replayed} groups were in the journal")
        self.log.row(row.step, row.complete() | self.fleet.counts())
        for note in row.notes:
            self.log.note(note)

    def _too_many_skipped(self, step: int, reason: str) -> UserError:
        config = self.config
        return UserError(
            f"step {step}: training.max_skipped={config.training.max_skipped} updates in a row "
            f"were skipped, the last for {reason}. The groups are in "
            f"{self.log.run_dir / SKIPPED}, the weights as they were before: mend the cause (the "
            "verifier, training.lr, training.spike_factor) and go on with megafork train "
            f"--resume {config.run.dir}"
        )
