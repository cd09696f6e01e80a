"""The controller: one process of a run that decides what is generated and writes the run's files.

Rank 0 starts it and it ends with rank 0. The ranks ask it for each batch (ranks.py). It commands
the servers and the other nodes' verifiers (agents.py). Imports no torch.

    servers      the servers are up (colocated: and asleep, so that the devices are free)
    begin        the run's state is that of the checkpoint, if any; its data is read
    push_begins, join, push_ended, batch, finish    the steps (steps.py)
    rows         a batch's tokens, of the samples that are named
    goodbye      the run's report is written
"""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from megafork.config import TrainConfig
from megafork.controller.batch_source import Generation, Inputs
from megafork.controller.child import answer_rank, read_order, run_until_the_rank_ends
from megafork.controller.ranks import Answer, Question, Ranks, settings_digest
from megafork.controller.run_log import RunLog
from megafork.controller.steps import Steps
from megafork.controller.stop import Stop, Stopped
from megafork.data.prompts import lines_of
from megafork.parallel.addresses import own_address
from megafork.rollout.agents import Agents
from megafork.rollout.client import RolloutClient
from megafork.rollout.engine import api_key_of
from megafork.rollout.fleet import Fleet
from megafork.rollout.judging import Judging
from megafork.rollout.messages import Arrays, Header, Link, serve
from megafork.system.signals import SIGNALS, STOP_FILE, name_of
from megafork.verifiers.verifier import Judge

_MOST_BYTES = 64 << 20
"""The most that a rank's question takes: the uids of a batch's samples"""
_LOOK_S = 0.5
"""Between two looks for the stop file"""


def main() -> None:
    """Run the controller until its rank ends."""
    order = read_order()
    run_until_the_rank_ends(partial(_serve, order))


async def _serve(order: dict[str, Any]) -> None:
    controller = RolloutController(order)
    try:
        address = await serve(own_address(), controller.key, controller.talk, _MOST_BYTES)
        answer_rank(order, {"address": address})
        await controller.watch()
    finally:
        controller.close()


class RolloutController:
    """Answers the ranks' questions. Made on the event loop; close it."""

    def __init__(self, order: dict[str, Any]) -> None:
        """order: config, key, world_size, num_nodes."""
        self.config = config = TrainConfig.model_validate(order["config"])
        self.key = str(order["key"])
        self.stop = Stop()
        self.judge = Judge(config.reward)
        self.judge.tell = self._note
        timeout_s = config.parallel.timeout_minutes * 60
        self.ranks = Ranks(
            int(order["world_size"]),
            timeout_s,
            self._answer,
            self._rows,
            note_signal=self.stop.ask,
            note_loss=self.stop.expect_ends,
        )
        self.agents = Agents(int(order["num_nodes"]), self._note_of_servers, config.run.silence_s)
        self._loop = asyncio.get_running_loop()
        self._fleet = asyncio.create_task(self._find_servers())
        self._inputs = asyncio.create_task(asyncio.to_thread(Inputs.read, config))
        self._judging = asyncio.create_task(self._make_judging())
        self._log: RunLog | None = None
        self._steps: Steps | None = None
        """From `begin` on"""

    async def talk(self, hello: Header, link: Link) -> None:
        """Talk with a rank or an agent until its connection ends."""
        if hello["settings"] != settings_digest(self.config):
            text = f"the {hello['role']} has other settings, or another version of megafork"
            return await link.send({"kind": "error", "text": text})
        if hello["role"] == "rank":
            return await self.ranks.talk(int(hello["rank"]), link)
        await self.agents.talk(link, asyncio.shield(self._judging))

    async def watch(self) -> None:
        """Look for the stop file, for ever; our own signals ask the run to stop too."""
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self.stop.ask, name_of(number))
        path = os.environ.get(STOP_FILE)
        while path is None or not os.path.exists(path):
            await asyncio.sleep(_LOOK_S)
        self.stop.ask(signal.SIGUSR1.name)
        await asyncio.Event().wait()

    def close(self) -> None:
        self.judge.close()
        if self._steps is not None:
            self._steps.close()
        if self._log is not None:
            self._log.close()

    def _note(self, text: str) -> None:
        if self._log is not None:
            self._log.note(text)
        else:
            print(text, flush=True)

    def _note_of_servers(self, text: str) -> None:
        # A signal may have ended them too.
        if not self.stop.ends_are_expected:
            self._note(text)

    # ------------------------------------------------------------------ answers

    async def _answer(self, question: Question) -> Answer:
        try:
            return await self._decide(question)
        except Exception:  # the ranks end of it, and all that they have started
            self.stop.expect_ends()
            raise

    async def _decide(self, question: Question) -> Answer:
        if question.kind == "servers":
            return await self._servers(question)
        if question.kind == "begin":
            return await self._begin(question)
        if self._steps is None:
            raise ValueError(f"{question.kind} before begin")
        if question.kind == "goodbye":
            return await self._goodbye(question, self._steps)
        return await self._steps.answer(question)

    def _rows(self, header: Header, arrays: Arrays) -> Answer:
        if self._steps is None:
            raise ValueError("rows before begin")
        return self._steps.rows(int(header["step"]), arrays["uids"].tolist())

    async def _servers(self, question: Question) -> Answer:
        await question.by_all()
        fleet = await asyncio.shield(self._fleet)
        awake = await fleet.sleep()
        await self.agents.servers("end", awake)
        return {"kind": "ready"}, {}

    async def _begin(self, question: Question) -> Answer:
        """Bring the run to the state of its checkpoint, or to its start."""
        said = (await question.by_all())[0]
        try:
            return await self.stop.unless_asked(self._begun(said))
        except Stopped as stopped:
            return {"kind": "stop", "signal": str(stopped)}, {}

    async def _begun(self, said: Header) -> Answer:
        config, done = self.config, int(said["step"])
        inputs = await asyncio.shield(self._inputs)
        judging = await asyncio.shield(self._judging)
        shown = lines_of(inputs.prompts[0], inputs.tokenizer)
        print("\n".join(["first prompt:", *shown]), flush=True)
        opening = partial(RunLog, config, inputs.tokenizer, steps_done=done)
        self._log = log = await asyncio.to_thread(opening)  # TensorBoard's import takes a while
        fleet = await asyncio.shield(self._fleet)
        fleet.note = self._note_of_servers
        generation = Generation(config, inputs, fleet, judging, log)
        if said["state"] is not None:
            generation.restore(said["state"])
        self._steps = Steps(config, fleet, self.agents, generation, log, self.stop)
        self._steps.begin(done, said["row"])
        return {"kind": "ready", "data": inputs.data}, {}

    async def _goodbye(self, question: Question, steps: Steps) -> Answer:
        said = (await question.by_all())[0]
        final = None if said["final"] is None else Path(said["final"])
        self.ranks.is_over = True
        await asyncio.to_thread(steps.log.end, final)
        return {"kind": "ready"}, {}

    # ------------------------------------------------------------------ what it starts with

    async def _make_judging(self) -> Judging:
        inputs = await asyncio.shield(self._inputs)
        return Judging(inputs.tokenizer, self.judge, self.config.rollout.max_response_tokens)

    async def _find_servers(self) -> Fleet:
        """Wait until all servers are up. Raises UserError, with the cause, where one is not."""
        config, rollout = self.config, self.config.rollout
        agents = await self.agents.all_here(config.parallel.startup_timeout_s)
        places: list[tuple[str, Path | None]] = [(url, None) for url in rollout.urls]
        for agent in agents:
            places += agent.servers
        key = self.key if rollout.url is None else api_key_of(rollout)
        timeout_s = rollout.request_timeout_s
        fleet = Fleet(
            [RolloutClient(url, key, timeout_s=timeout_s, log_path=log) for url, log in places],
            max_num_seqs=rollout.max_num_seqs,
            max_restarts=rollout.max_restarts,
            given_up=self.agents.given_up,
            colocated=rollout.placement == "colocated",
        )
        await self.agents.servers("wait")
        await fleet.wait_until_up(
            rollout.startup_timeout_s, rollout.api_key_env, self.agents.require_all
        )
        return fleet
