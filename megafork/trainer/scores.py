"""The scores of a mini-batch, or what makes it unfit to train on; the same on all ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from megafork.data.token_table import TokenTable
from megafork.model.scorer import Scores
from megafork.parallel.mesh import Mesh
from megafork.trainer.policy import Policy


def _data_fault(table: TokenTable, mesh: Mesh) -> str | None:
    """Return why a mini-batch cannot be trained on, before it is scored; the same on all ranks."""
    bad_B = ~table.reward_B.isfinite()
    if bad_B.any():
        uid, reward = int(table.uid_B[bad_B][0]), float(table.reward_B[bad_B][0])
        return f"a reward of response {uid} is {reward}"
    bad_R = ~table.rollout_logprob_R.isfinite()
    if not mesh.any_rank(bool(bad_R.any())):
        return None
    found = zip(
        table.sample_R[bad_R].tolist(), table.rollout_logprob_R[bad_R].tolist(), strict=True
    )
    everywhere = [one for one in mesh.all_gather_object(next(found, None)) if one is not None]
    sample, logprob = min(everywhere, key=lambda one: one[0])
    return f"a rollout_logprob of response {int(table.uid_B[sample])} is {logprob}"


def score_first(policy: Policy, table: TokenTable) -> Scores | str:
    """Return the scores of the policy before the batch's first update, as far as anything needs
    them."""
    entropies = policy.needs_entropies and policy.forking.entropy_of == "old"
    if entropies or not policy.ratio_to_engine:
        return score(policy, table)
    return _data_fault(table, policy.mesh) or policy.unscored(table)


def score(policy: Policy, table: TokenTable, whose: str = "policy") -> Scores | str:
    """Return the scores, or what is wrong with them; the same on all ranks."""
    fault = _data_fault(table, policy.mesh)
    if fault is not None:
        return fault
    scores = policy.score(table)
    finite = scores.old_logprobs_N.isfinite().all() and scores.entropy_N.isfinite().all()
    if policy.mesh.any_rank(not finite):
        return f"a log-probability or an entropy of the {whose} is not finite"
    return scores


def score_again(policy: Policy, table: TokenTable, scores: Scores | str) -> Scores | str:
    """Return the scores with those of the reference, whose weights the policy has now."""
    if isinstance(scores, str):
        return scores
    reference = score(policy, table, whose="reference policy")
    if isinstance(reference, str):
        return reference
    assert torch.equal(reference.rows_N, scores.rows_N), "another packing"
    return replace(scores, reference=reference)
