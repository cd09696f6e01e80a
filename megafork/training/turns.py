"""Whose turn it is, where trainer and servers share their devices (rollout.placement=colocated).

    trainer    policy and critic are whole, the servers sleep: no weights, no cache
    handover   the policy's weights are beside the servers', which take them; nothing else is there
    servers    the servers are awake, nothing of the trainer's is left

Every generation is one round through the three. The servers are given the weights each time, so
that between two turns they need no copy of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from megafork.errors import Interrupted
from megafork.training.front import Front
from megafork.training.learner import Learner
from megafork.training.step import Clock

OnFront = Callable[[Callable[[Front], Any]], Any]


class Turns:
    """On every rank, which all go through it together; the trainer's turn is the first.

    learners: the policy, and the critic if there is one. shared: False is the disaggregated
    placement, in which it is always everyone's turn. on_front: `Trainer._on_front`, whose failures
    all ranks see. stop: ends the servers of all nodes.

    Where a generation ends with the run (an exception other than Interrupted), the turn is left as
    it is: then the ranks may not be together any more.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        on_front: OnFront,
        stop: Callable[[], None],
        *,
        shared: bool,
    ) -> None:
        self.policy, *self.others = learners
        self.on_front, self.stop, self.shared = on_front, stop, shared
        self.turn: Literal["trainer", "handover", "servers"] = "trainer"
        self.clock = Clock()
        """Of what it does: the phases offload, sync and onload"""
        self._generating = False

    @contextmanager
    def generation(self, sleep: Callable[[], None]) -> Iterator[None]:
        """Inside, `hand_over` gives the servers their turn; after it, it is the trainer's again.

        sleep: puts the servers to sleep, and ends those that cannot be. A signal has all of them
        ended, for it may have reached them too and nothing is generated after it. Inside another
        one it does nothing.
        """
        if not self.shared or self._generating:
            yield
            return
        self._generating = True
        try:
            yield
            if self.turn != "trainer":
                sleep()
        except Interrupted:
            self.stop()
            self._take_back()
            raise
        finally:
            self._generating = False
        self._take_back()

    def hand_over(self, push: Callable[[], None]) -> None:
        """The servers' turn, who sleep, with the policy's weights, which `push` gives them."""
        if not self.shared:
            return push()
        self._leave_but_weights()
        self.on_front(lambda front: front.client.wake_up("weights"))
        with self.clock.measure("sync"):
            push()
        self.leave()
        self.on_front(lambda front: front.client.wake_up("kv_cache"))
        self.turn = "servers"

    def leave(self) -> None:
        """Nothing of the trainer's stays on shared devices: the servers' turn, or a new one's."""
        if not self.shared:
            return
        with self.clock.measure("offload"):
            for learner in (*self.others, self.policy):
                learner.offload()
        self._until_all_have()
        self.turn = "handover"

    def _leave_but_weights(self) -> None:
        with self.clock.measure("offload"):
            for other in self.others:
                other.offload()
            self.policy.offload(weights=False)
        self._until_all_have()
        self.turn = "handover"
        with self.clock.measure("onload"):
            self.policy.onload(optimizer=False)  # where a server's death came between

    def _until_all_have(self) -> None:
        """A server is told to take memory on devices of several ranks, by the first of them."""
        self.policy.topology.any_rank(False)

    def _take_back(self) -> None:
        with self.clock.measure("onload"):
            for learner in (self.policy, *self.others):
                learner.onload()
        self.turn = "trainer"
