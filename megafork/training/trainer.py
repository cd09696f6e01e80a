"""The training loop: generate, score, select, update, sync.

Rank 0 talks to the rollout server and writes the run's files; what it collects is broadcast, and
from then on every rank computes from the same token table.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from megafork.algorithms.advantages import group_relative_advantages
from megafork.algorithms.forking import warn_of_ties
from megafork.checkpoint.hf_export import export_hf
from megafork.checkpoint.store import CheckpointStore
from megafork.config import TrainConfig, save_config
from megafork.data.prompts import Prompt, PromptStream, read_prompts
from megafork.data.tokenizer import load_tokenizer
from megafork.errors import UserError
from megafork.evaluation.heldout import accuracy
from megafork.logging.figure import draw_curves
from megafork.logging.metrics import MetricsLog, read_rows
from megafork.parallel.topology import Topology, initialize, shutdown
from megafork.rewards.verifier import Judge
from megafork.rollout.client import RolloutClient
from megafork.rollout.collector import Collector, RolloutBatch
from megafork.rollout.engine import host_of, rollout_server
from megafork.rollout.sampling import Sampling
from megafork.training import telemetry
from megafork.training.policy import Policy
from megafork.training.step import Clock, optimize
from megafork.types import Group, TokenTable, token_table
from megafork.weight_sync import agreement
from megafork.weight_sync.push import WeightSync

T = TypeVar("T")


class Front:
    """What only rank 0 has: the server's client, the data, the verifier, the run's files."""

    def __init__(
        self,
        config: TrainConfig,
        client: RolloutClient,
        eos: tuple[int, ...],
        *,
        steps_done: int = 0,
    ) -> None:
        self.config, self.client = config, client
        self.run_dir = Path(config.run.dir)
        self.sampling = Sampling(
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_response_tokens,
            stop_token_ids=eos,
        )
        tokenizer = load_tokenizer(config, chat_template=config.data.chat_template)
        prompts = read_prompts(config.data.train, config.data, tokenizer.encode)
        self.collector = Collector(
            client=client,
            prompts=PromptStream(prompts, config.data.seed),
            tokenizer=tokenizer,
            judge=Judge(config.reward),
            rollout=config.rollout,
            sampling=self.sampling,
            journal_dir=self.run_dir / "rollouts",
        )
        self.heldout: list[Prompt] = []
        if config.data.eval is not None:
            heldout = read_prompts(config.data.eval, config.data, tokenizer.encode)
            self.heldout = heldout[: config.eval.prompts]
        self.probe_prompts = prompts[: config.sync.check_prompts]
        self.log = MetricsLog(
            self.run_dir,
            config.training.steps,
            tensorboard=config.run.tensorboard,
            steps_done=steps_done,
        )
        self.batch: RolloutBatch | None = None

    def collect(self, step: int, policy_version: int) -> list[Group]:
        self.batch = self.collector.collect(step, policy_version)
        return self.batch.groups

    def probe(self) -> list[Group]:
        return agreement.probe(self.client, self.probe_prompts, self.sampling)

    def evaluate(self, step: int) -> float:
        """Held-out accuracy, also written to eval.jsonl."""
        collector, config = self.collector, self.config.eval
        sampling = replace(self.sampling, temperature=config.temperature)
        value = accuracy(
            self.client,
            self.heldout,
            collector.tokenizer,
            collector.judge,
            sampling,
            config.samples,
        )
        self.log.evaluation(step, value, len(self.heldout) * config.samples)
        return value


class Trainer:
    """The loop on one rank. `front` is None on every rank but 0."""

    def __init__(
        self,
        config: TrainConfig,
        topology: Topology,
        policy: Policy,
        sync: WeightSync,
        front: Front | None,
        store: CheckpointStore,
    ) -> None:
        self.config, self.topology, self.policy = config, topology, policy
        self.sync, self.front, self.store = sync, front, store
        self.steps_done = 0
        self.policy_version = 0

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after a checkpoint, whose weights and optimizer the policy already has."""
        self.steps_done = state["step"]
        self.policy.num_updates = state["num_updates"]
        self.policy_version = state["policy_version"] - 1  # the first push gives it again
        if self.front is not None:
            self.front.collector.restore(state["collector"])

    def run(self) -> None:
        config, last = self.config, self.config.training.steps
        self._push(check=True)
        if self.steps_done == 0:
            self._evaluate(0)
        for step in range(self.steps_done + 1, last + 1):
            metrics, clock = self.train_step(step)
            every = config.eval.every
            if step == last or (every and step % every == 0):
                with clock.measure("eval"):
                    metrics |= self._evaluate(step)
            if self.front is not None:
                assert self.front.batch is not None
                if replayed := self.front.batch.num_replayed:
                    self.front.log.note(f"step {step:>4}  {replayed} groups were in the journal")
                times = {f"time/{phase}": value for phase, value in clock.seconds.items()}
                self.front.log.write(step, metrics | times)
                warning = warn_of_ties(
                    metrics["forking/kept_fraction"],
                    metrics["forking/wanted_fraction"],
                    config.forking.rho,
                )
                if warning is not None:
                    self.front.log.note(f"warning: {warning}")
            self._checkpoint(step)
        self.store.finish()
        target = Path(config.run.dir) / "checkpoints" / "final"
        source, tokenizer = config.model.path, config.tokenizer.path
        export_hf(self.policy, self.topology, Path(source), target, tokenizer)
        if self.front is not None:
            self.front.log.note(f"checkpoint  {target}")
            self.front.log.note(f"curves      {draw_curves(Path(config.run.dir))}")
            evaluations = read_rows(Path(config.run.dir) / "eval.jsonl")
            if evaluations:
                first, final = (evaluations[i]["eval/accuracy"] for i in (0, -1))
                self.front.log.note(f"held-out accuracy  {first:.1%} before, {final:.1%} after")

    def _checkpoint(self, step: int) -> None:
        every, last = self.config.checkpoint.every, self.config.training.steps
        if step != last and not (every and step % every == 0):
            self.store.poll()
            return
        state = None
        if self.front is not None:
            state = {
                "step": step,
                "num_updates": self.policy.num_updates,
                "policy_version": self.policy_version,
                "collector": self.front.collector.state(),
            }
        self.store.save(step, self.policy.stages, self.policy.optimizer, state)

    def train_step(self, step: int) -> tuple[dict[str, float], Clock]:
        """One rollout batch: the paper's algorithm box."""
        config, policy, topology = self.config, self.policy, self.topology
        started = time.monotonic()
        clock = Clock()
        sampled_by = self.policy_version
        lr = policy.learning_rate
        with clock.measure("generate"):
            groups = self._on_front(lambda front: front.collect(step, sampled_by))
        table = token_table(groups, overlong_filtering=config.algorithm.overlong_filtering)
        advantages = group_relative_advantages(
            table.reward_B, table.group_B, normalize=config.algorithm.normalize_advantage
        )
        table = table.with_columns(advantage_B=advantages)
        minibatches = self._minibatches(table, step)
        done = optimize(policy, minibatches, step=step, clock=clock)
        with clock.measure("sync"):
            every = config.sync.check_every
            self._push(check=bool(every) and step % every == 0)
        metrics: dict[str, float] = {}
        if topology.is_last_stage:
            metrics = telemetry.token_metrics(
                minibatches,
                done.scores,
                done.masks,
                done.selections,
                policy_version=sampled_by,
                topology=topology,
            ) | telemetry.update_metrics(done.updates)
        metrics = topology.broadcast_object(metrics, src=topology.last_stage_rank)
        if self.front is not None and self.front.batch is not None:
            metrics |= telemetry.rollout_metrics(self.front.batch, sampled_by)
            clock.seconds["reward"] = self.front.batch.reward_seconds
        clock.seconds["total"] = time.monotonic() - started
        metrics |= {
            "lr": lr,
            "tokens": table.num_rows,
            "throughput/tokens_per_second": table.num_rows / clock.seconds["total"],
            "policy_version": self.policy_version,
        }
        return metrics, clock

    def _minibatches(self, table: TokenTable, step: int) -> list[TokenTable]:
        """By whole groups; one that overlong filtering has emptied is left out."""
        training = self.config.training
        minibatches = table.minibatches(training.prompts_per_minibatch, seed=training.seed + step)
        minibatches = [m for m in minibatches if m.num_loss_tokens]
        if not minibatches:
            raise UserError(
                f"step {step}: every response was cut at rollout.max_response_tokens="
                f"{self.config.rollout.max_response_tokens} and algorithm.overlong_filtering left "
                "nothing to train on: raise the one or turn off the other"
            )
        return minibatches

    def _push(self, *, check: bool) -> None:
        self.policy_version += 1
        self.sync.push(self.policy_version)
        if check:
            groups = self._on_front(lambda front: front.probe())
            found = agreement.measure(groups, self.policy, self.topology)
            agreement.require(found, self.config.sync, self.config.model.dtype)

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.config.data.eval is None:
            return {}
        return {"eval/accuracy": self._on_front(lambda front: front.evaluate(step))}

    def _on_front(self, function: Callable[[Front], T]) -> T:
        """`function(front)` on rank 0; its value on every rank."""

        def call() -> T:
            assert self.front is not None
            return function(self.front)

        return self.topology.on_rank_zero(call)


def train(config: TrainConfig, *, resume: bool = False) -> None:
    """`megafork train` on this rank, from joining the world to the final checkpoint.

    resume: go on after the newest whole checkpoint in run.dir, or from the start where there is
    none; groups that the journal holds are not generated again.
    """
    topology = initialize(config.parallel, seed=config.training.seed)
    run_dir = Path(config.run.dir)
    topology.on_rank_zero(lambda: (reopen_run_dir if resume else make_run_dir)(config, run_dir))
    store = CheckpointStore(run_dir / "checkpoints", topology, config.checkpoint)
    with contextlib.ExitStack() as stack:
        wait_for_server = None
        if topology.rank == 0:  # the server loads while the policy does
            device = topology.device.type
            wait_for_server = stack.enter_context(
                rollout_server(config, device, run_dir / "vllm.log")
            )
        policy = Policy(
            config.model,
            config.parallel,
            topology,
            training=config.training,
            algorithm=config.algorithm,
            forking=config.forking,
            temperature=config.rollout.temperature,
        )
        state = _load_newest(store, policy) if resume else None
        front = None

        def open_front() -> None:
            nonlocal front
            assert wait_for_server is not None
            front = Front(
                config,
                wait_for_server(),
                policy.shape.eos_token_ids,
                steps_done=state["step"] if state is not None else 0,
            )
            stack.callback(front.log.close)

        topology.on_rank_zero(open_front)
        sync = WeightSync(
            policy,
            topology,
            front.client if front is not None else None,
            config.sync,
            num_workers=config.rollout.tensor_parallel,
            server_host=host_of(config.rollout),
        )
        stack.callback(sync.close)
        trainer = Trainer(config, topology, policy, sync, front, store)
        if state is not None:
            trainer.restore(state)
        trainer.run()
    shutdown()


def _load_newest(store: CheckpointStore, policy: Policy) -> dict[str, Any] | None:
    path = store.newest()
    if path is None:
        return None
    if policy.topology.rank == 0:
        print(f"resuming from {path}", flush=True)
    return store.load(path, policy.stages, policy.optimizer)


def make_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Create the run's folder with its resolved config.

    Raises UserError when it holds another run's groups or metrics, or cannot be written. A start
    that failed before the first group left nothing that matters.
    """
    if any((run_dir / "rollouts").glob("*.jsonl")):
        raise UserError(
            f"run.dir={run_dir} holds another run (rollouts): go on with it (megafork train "
            f"--resume {run_dir}), choose another folder or remove it"
        )
    try:
        for folder in ("rollouts", "checkpoints"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.toml")
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from None


def reopen_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Keep the resumed run's resolved config; the one before it, if it differs, as .old.toml."""
    path = run_dir / "config.toml"
    try:
        before = path.read_text()
        save_config(config, path)
        if path.read_text() != before:
            path.with_suffix(".old.toml").write_text(before)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from None
