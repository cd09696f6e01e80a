"""The training loop: generate, score, select, update, sync.

Rank 0 decides what is generated and writes the run's files. Of a batch every rank learns what the
samples are, and gets the rows of those that it works on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from megafork.algorithms.advantages import group_relative_advantages
from megafork.algorithms.forking import warn_of_ties
from megafork.checkpoint.hf_export import export_hf
from megafork.checkpoint.store import CheckpointStore
from megafork.config import TrainConfig
from megafork.errors import Interrupted, ServerDied, UserError
from megafork.interruption import Interruption
from megafork.parallel.topology import Topology
from megafork.rollout import batch_metrics
from megafork.rollout.messages import Connection
from megafork.sample import Group
from megafork.training import telemetry
from megafork.training.critic import Critic
from megafork.training.front import Front
from megafork.training.histogram import entropy_histogram
from megafork.training.policy import Policy
from megafork.training.rows import fetch_rows
from megafork.training.samples import is_sampled, sampled_responses
from megafork.training.servers import RunServers
from megafork.training.step import Clock, Optimized, optimize
from megafork.training.token_report import token_report
from megafork.training.turns import Turns
from megafork.types import TokenTable
from megafork.weight_sync import agreement
from megafork.weight_sync.push import WeightSync

T = TypeVar("T")


class Trainer:
    """The loop on one rank. `front` is None on every rank but 0, `rows` (the connection to it) on
    those that are not a replica's first."""

    def __init__(
        self,
        config: TrainConfig,
        topology: Topology,
        policy: Policy,
        sync: WeightSync,
        front: Front | None,
        store: CheckpointStore,
        interruption: Interruption,
        servers: RunServers,
        rows: Connection | None,
        critic: Critic | None = None,
    ) -> None:
        self.config, self.topology, self.policy = config, topology, policy
        self.critic = critic
        self.sync, self.front, self.store = sync, front, store
        self.turns = Turns(
            [policy] if critic is None else [policy, critic],
            self._on_front,
            servers.stop,
            shared=config.rollout.placement == "colocated",
        )
        self.interruption, self.servers, self.rows = interruption, servers, rows
        self.steps_done = self._saved_step = 0
        self.policy_version = 0
        self._stopping = False

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a checkpoint, whose weights and optimizers policy and critic already have."""
        self.steps_done = self._saved_step = state["step"]
        self.policy.restore(state["policy"])
        if self.critic is not None:
            self.critic.restore(state["critic"])
        self.policy_version = state["policy_version"] - 1  # the first push gives it again
        if self.front is not None:
            self.front.restore(state["collector"])

    def run(self) -> None:
        """All steps that are left, and the HF folder of the last policy.

        Raises Interrupted after a signal, when the checkpoint is written.
        """
        self.interruption.defer()
        try:
            self._steps()
        except Interrupted:
            raise Interrupted(self._leave()) from None
        self._on_front(Front.expect_ends)
        self.store.finish()
        self._export()

    def _steps(self) -> None:
        last = self.config.training.steps
        self._push(check=True)
        self._stop_if_asked()
        if self._evaluation_is_due(self.steps_done) and not self._on_front(
            lambda front: front.has_evaluated(self.steps_done)
        ):
            self._evaluate(self.steps_done)
        for step in range(self.steps_done + 1, last + 1):
            metrics, clock = self.train_step(step)
            self.steps_done = step
            if self._evaluation_is_due(step) and not self._stopping:
                try:
                    with clock.measure("eval"):
                        metrics |= self._evaluate(step)
                except Interrupted:  # when the step is in the log
                    self._stopping = True
            self._log(step, metrics, clock)
            every = self.config.checkpoint.every
            if step == last or (every and step % every == 0):
                self._save(step)
            else:
                self.store.poll()
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self._stopping:
            raise Interrupted

    def _leave(self) -> str:
        """Save what was learnt since the last checkpoint; says what to do next."""
        self._on_front(Front.expect_ends)
        if self._saved_step != self.steps_done:
            self._save(self.steps_done)
        self.store.finish()
        self.topology.whereabouts.enter("the report")
        self._on_front(lambda front: front.write_report())
        saved = ", which is saved" if self.steps_done else ""
        return (
            f"stopped by {self.interruption.received or 'a signal'} after step {self.steps_done}"
            f"{saved}: go on with megafork train --resume {self.config.run.dir}"
        )

    def _save(self, step: int) -> None:
        self.topology.whereabouts.enter(f"checkpoint of step {step}")
        state = None
        if self.front is not None:
            state = {
                "step": step,
                "policy": self.policy.state(),
                "policy_version": self.policy_version,
                "collector": self.front.state,
                "data": self.front.data,
            }
            if self.critic is not None:
                state["critic"] = self.critic.state()
        self.store.save(step, self.policy.stages, self.policy.optimizer, state, self.critic)
        self._saved_step = step

    def _export(self) -> None:
        self.topology.whereabouts.enter("the export of the last policy")
        target = Path(self.config.run.dir) / "checkpoints" / "final"
        source, tokenizer = self.config.model.path, self.config.tokenizer.path
        export_hf(self.policy, self.topology, Path(source), target, tokenizer)
        if self.front is not None:
            self.front.tell_end(target)

    def train_step(self, step: int) -> tuple[dict[str, float], Clock]:
        """One rollout batch: the paper's algorithm box."""
        config, policy, topology = self.config, self.policy, self.topology
        started = time.monotonic()
        clock = Clock(lambda phase: topology.whereabouts.enter(f"{phase} of step {step}"))
        self.turns.clock = clock
        trained_by = self.policy_version
        lr = policy.learning_rate
        with clock.measure("generate"):
            known = self._with_server(
                lambda: self._on_front(lambda front: front.collect(step, trained_by))
            )
        with clock.measure("exchange"):
            minibatches = self._minibatches(known, step)
        done = optimize(policy, minibatches, step=step, clock=clock, critic=self.critic)
        if done.skipped:
            is_last = policy.guard.is_exhausted
            self._on_front(lambda front: front.keep_skipped(step, done.skipped, is_last=is_last))
        with clock.measure("sync"):
            every = config.sync.check_every
            self._push(check=bool(every) and step % every == 0)
        report = token_report(done, config.forking, topology)
        if self.front is not None:
            self.front.report_tokens(step, report)
        self._keep_entropies(done, step)
        metrics = self._metrics(done, known, clock, started=started, trained_by=trained_by)
        return metrics | {"lr": lr}, clock

    def _keep_entropies(self, done: Optimized, step: int) -> None:
        config, topology = self.config, self.topology
        histogram = entropy_histogram(done, topology)
        responses: list[dict[str, Any]] = []
        if is_sampled(step, every=config.run.samples_every, last=config.training.steps):
            responses = sampled_responses(
                done, config.run.samples, config.forking, topology, step=step
            )
        if self.front is not None:
            self.front.keep_entropies(step, histogram, responses)

    def _metrics(
        self,
        done: Optimized,
        known: TokenTable,
        clock: Clock,
        *,
        started: float,
        trained_by: int,
    ) -> dict[str, float]:
        """Of a step that has ended; what the rollout tells is rank 0's alone. Ends the clock."""
        config, policy, topology = self.config, self.policy, self.topology
        metrics: dict[str, float] = {}
        if topology.is_last_stage:
            metrics = telemetry.token_metrics(
                done.tables,
                done.scores,
                done.masks,
                done.selections,
                policy_version=trained_by,
                large_difference=config.mismatch.large_difference,
                topology=topology,
            ) | telemetry.update_metrics(done.updates, policy.terms)
            metrics |= telemetry.reference_metrics(done, config.kl.tokens, topology)
            if self.critic is not None:
                metrics |= telemetry.critic_metrics(done.values, done.critic_updates)
        metrics = topology.broadcast_object(metrics, src=topology.last_stage_rank)
        clock.seconds["total"] = time.monotonic() - started
        if self.front is not None and self.front.batch is not None:
            batch = self.front.batch
            clock.seconds["reward"] = batch.reward_seconds
            metrics |= batch_metrics.rollout_metrics(batch, trained_by)
            metrics |= batch_metrics.overlap_metrics(batch, clock.seconds)
            metrics |= batch_metrics.lag_metrics(batch.groups, trained_by)
            metrics |= self.front.client.counts()
            metrics["throughput/generated_tokens_per_second"] = (
                batch.num_generated_tokens / clock.seconds["total"]
            )
        return metrics | {
            "tokens": known.num_tokens,
            "throughput/tokens_per_second": known.num_tokens / clock.seconds["total"],
            "policy_version": self.policy_version,
            "update/skipped": len(done.skipped),
            "update/empty": done.num_empty,
        }

    def _minibatches(self, known: TokenTable, step: int) -> list[TokenTable]:
        """By whole groups, each with the rows that this rank works on and their advantages.

        known: what every rank knows of the batch. Nobody gets the rows of a mini-batch that
        overlong filtering has emptied.
        """
        training = self.config.training

        def in_order(table: TokenTable) -> list[TokenTable]:
            return table.minibatches(training.prompts_per_minibatch, seed=training.seed + step)

        replica_of: dict[int, int] = {}
        for part in in_order(known):
            if part.num_loss_tokens:
                replicas = self.policy.replicas(part).tolist()
                replica_of.update(zip(part.uid_B.tolist(), replicas, strict=True))
        if not replica_of:
            raise UserError(
                f"step {step}: every response was cut at rollout.max_response_tokens="
                f"{self.config.rollout.max_response_tokens} and algorithm.overlong_filtering left "
                "nothing to train on: raise the one or turn off the other"
            )
        replica_B = torch.tensor([replica_of.get(uid, -1) for uid in known.uid_B.tolist()])
        table = fetch_rows(known, replica_B, step, self.rows, self.topology)
        if self.critic is None:
            advantages_B = group_relative_advantages(
                table.reward_B, table.group_B, normalize=self.config.algorithm.normalize_advantage
            )
            table = table.with_columns(advantage_R=advantages_B[table.sample_R])
        return in_order(table)

    def _log(self, step: int, metrics: dict[str, float], clock: Clock) -> None:
        if self.front is None or self.front.batch is None:
            return
        log = self.front.log
        if replayed := self.front.batch.num_replayed:
            log.note(f"step {step:>4}  {replayed} groups were in the journal")
        log.write(step, metrics | {f"time/{name}": value for name, value in clock.seconds.items()})
        warning = warn_of_ties(
            metrics["forking/kept_fraction"],
            metrics["forking/wanted_fraction"],
            metrics["forking/rho"],
        )
        if warning is not None:
            log.note(f"warning: {warning}")

    def _push(self, *, check: bool) -> None:
        """Give the server the policy's weights as the next version, unless the run is to end.

        Without a check, one that shares our devices gets them with its next turn.
        """
        self.policy_version += 1
        self._stopping = self.topology.any_rank(self.interruption.received is not None)
        if self._stopping:
            return
        groups: list[Group] = []
        try:
            if check:
                groups = self._with_server(lambda: self._on_front(lambda front: front.probe()))
            elif not self.turns.shared:
                self._with_server(lambda: None)
        except Interrupted:  # when the step is in the log
            self._stopping = True
        if groups:
            found = agreement.measure(groups, self.policy, self.topology)
            agreement.require(found, self.config.sync, self.config.model.dtype)

    def _with_server(self, work: Callable[[], T]) -> T:
        """`work`, which all ranks do together, with a server that has the policy's weights.

        Where the server died, a new one gets the weights, and the work is done again.
        """

        def synced() -> T:
            if self.sync.version != self.policy_version:
                self._sync()
            return work()

        with self.turns.generation(self._sleep):
            return self._whoever_dies(synced)

    def _whoever_dies(self, work: Callable[[], T]) -> T:
        """`work`, again with a new server where one died of it."""
        death = None
        for _ in range(1 + self.config.rollout.max_restarts):
            try:
                if death is not None:
                    self._replace_server(death)
                return work()
            except ServerDied as error:
                death = error
        assert death is not None
        return self._on_front(lambda front: front.give_up(death))

    def _replace_server(self, death: ServerDied) -> None:
        silent = self._on_front(lambda front: front.give_up_server(death))
        if self.turns.shared:  # new ones come with the next push
            return self._sleep()
        self.servers.restart(silent)
        self._on_front(lambda front: front.wait_for_server())
        self.sync.forget()

    def _sync(self) -> None:
        """A push to all servers; where it loses some of them, again to the others."""
        lost = self._on_front(lambda front: front.client.silent())
        if not self.turns.shared:
            self.servers.restart(lost)
        elif lost:
            self.turns.leave()  # a new one takes all of its memory at once
            self.servers.start_again(lost, self.interruption)
            self._sleep()
        while not self._pushed():
            if self.turns.shared:
                self._sleep()
        self.servers.forgive()

    def _sleep(self) -> None:
        self.sync.forget()
        self.servers.put_to_sleep(self.interruption)

    def _pushed(self) -> bool:
        """False: servers were lost, and others are left to push to."""
        try:
            self.turns.hand_over(partial(self.sync.push, self.policy_version))
        except UserError as error:
            if not self._on_front(partial(Front.drop_lost_servers, cause=error)):
                raise
            return False
        return True

    def _evaluation_is_due(self, step: int) -> bool:
        every, last = self.config.eval.every, self.config.training.steps
        is_due = step in (0, last) or bool(every and step % every == 0)
        return is_due and self.config.data.eval is not None

    def _evaluate(self, step: int) -> dict[str, float]:
        self.turns.clock = Clock()  # its turn is part of the evaluation
        self.topology.whereabouts.enter(f"the evaluation of step {step}")
        value = self._with_server(lambda: self._on_front(lambda front: front.evaluate(step)))
        return {"eval/accuracy": value}

    def _on_front(self, function: Callable[[Front], T]) -> T:
        """`function(front)` on rank 0; its value on every rank."""

        def call() -> T:
            assert self.front is not None
            return function(self.front)

        return self.topology.on_rank_zero(call)
