"""The training loop. Every rank runs it; the controller does what only one process can do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

from megafork.config import TrainConfig
from megafork.config.load import settings_of
from megafork.controller.handle import Batch, Controller
from megafork.errors import Interrupted
from megafork.parallel.mesh import initialize, shutdown
from megafork.system.signals import Interruption
from megafork.trainer.checkpoints import Checkpoints
from megafork.trainer.clock import Clock
from megafork.trainer.critic import Critic
from megafork.trainer.policy import Policy
from megafork.trainer.push import WeightSync
from megafork.trainer.rows import minibatches_of
from megafork.trainer.run_dir import open_run_dir
from megafork.trainer.step import optimize
from megafork.trainer.step_record import step_record


def train(config: TrainConfig, *, resume: bool = False) -> None:
    """`megafork train` on this rank, from joining the world to the final checkpoint.

    resume: go on after the newest whole checkpoint in run.dir, or from the start where there is
    none; groups that the journal holds are not generated again. Raises Interrupted when a signal
    ended it early.
    """
    with Interruption() as interruption, contextlib.ExitStack() as stack:
        mesh = initialize(config.parallel, seed=config.training.seed)
        mesh.require_equal("settings", dict(settings_of(config)))
        run_dir = open_run_dir(config, resume=resume)
        mesh.on_rank_zero(lambda: stack.enter_context(run_dir))
        controller = stack.enter_context(Controller.connect(config, mesh))
        stack.enter_context(mesh.progress.told())
        if config.rollout.placement == "colocated":
            mesh.progress.enter("the start of the rollout servers")
            controller.wait_for_servers()
        mesh.progress.enter("the loading of the model")
        policy = Policy(config, mesh)
        critic = Critic(config, mesh) if config.algorithm.uses_critic else None
        learners = [policy] if critic is None else [policy, critic]
        checkpoints = Checkpoints(config, mesh, policy, critic)
        state = checkpoints.load_newest() if resume else None
        interruption.defer(controller.tell_signal)
        controller.begin(checkpoints.step, state)
        weights = WeightSync(config, policy, mesh, controller, learners)
        stack.callback(weights.close)
        weights.push(version=checkpoints.step + 1)
        for batch in batches(controller, weights, after=checkpoints.step):
            row = train_step(config, batch, policy, critic, controller, weights)
            checkpoints.save_if_due(batch, row, controller)  # a colocated push puts all away
            weights.push(version=batch.step + 1)
        checkpoints.save_if_unsaved()
        final = checkpoints.export() if controller.has_finished else None
        mesh.progress.enter("the report")
        controller.goodbye(None if final is None else str(final))
        if final is None:
            raise Interrupted(_stopped(config, controller, checkpoints.step))
    shutdown()


def batches(controller: Controller, weights: WeightSync, *, after: int) -> Iterator[Batch]:
    """Yield the batch of each step after `after`, until the run ends."""
    step = after + 1
    while controller.is_going_on:
        weights.mesh.progress.enter(f"generate of step {step}")
        batch, again, groups = controller.batch(step)
        if again:  # the servers were lost with the weights that they had
            weights.push(version=step)
            continue
        weights.take_back()
        weights.compare(groups)
        if batch is not None:
            yield batch
            step += 1
    weights.take_back()


def train_step(
    config: TrainConfig,
    batch: Batch,
    policy: Policy,
    critic: Critic | None,
    controller: Controller,
    weights: WeightSync,
) -> dict[str, float]:
    """Train on a rollout batch, as in the box of arXiv 2506.01939. Returns its metrics so far."""
    mesh, step = policy.mesh, batch.step
    clock = Clock(lambda phase: mesh.progress.enter(f"{phase} of step {step}"))
    lr = policy.learning_rate
    with clock.measure("exchange"):
        minibatches = minibatches_of(config, batch, policy, controller)
    done = optimize(policy, minibatches, step=step, clock=clock, critic=critic)
    record = step_record(config, batch, done, policy, critic)
    record["metrics"]["lr"] = lr
    answer, _ = controller.ask(
        "finish", step=step, seconds=clock.seconds | weights.take_seconds(), **record
    )
    return answer["row"]


def _stopped(config: TrainConfig, controller: Controller, step: int) -> str:
    """The message that says how to go on."""
    saved = ", which is saved" if step else ""
    return (
        f"stopped by {controller.stopped_by} after step {step}{saved}: go on with megafork train "
        f"--resume {config.run.dir}"
    )


class _Callable(ModuleType):
    """Lets `from megafork import train` be called, be it this module or the function."""

    def __call__(self, config: TrainConfig, *, resume: bool = False) -> None:
        train(config, resume=resume)


sys.modules[__name__].__class__ = _Callable
