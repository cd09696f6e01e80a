"""An update of the policy and its critic: both learn from a mini-batch, or neither does."""

from __future__ import annotations

from megafork.trainer.critic import Critic
from megafork.trainer.outcome import Optimized
from megafork.trainer.policy import Policy
from megafork.trainer.update_guard import UpdateRefused


def update_both(
    policy: Policy, critic: Critic | None, done: Optimized, index: int, step: int
) -> str | None:
    """Make the updates on the index-th of the selected mini-batches; return why there were none."""
    learners: list[tuple[Policy | Critic, list[dict[str, float]]]] = []
    if critic is None or step > critic.config.alone_steps:
        learners.append((policy, done.updates))
    if critic is not None:
        learners.append((critic, done.critic_updates))
    parts = done.tables[index], done.scores[index], done.masks[index]
    try:
        judged = [learner.judged_update(*parts, step=step) for learner, _ in learners]
    except UpdateRefused as refusal:
        return str(refusal)
    for (learner, updates), update in zip(learners, judged, strict=True):
        updates.append(learner.apply(update))
    policy.guard.went_on()  # also where the critic alone has learnt
    return None
