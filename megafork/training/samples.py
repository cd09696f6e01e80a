"""A few responses of a step with every token's entropy and whether it was selected, to be read.

Which responses is a function of their uids and the step; their values come from the ranks that hold
their tokens. The same at every layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.config import ForkingConfig
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.parallel.topology import Topology
from megafork.training.step import Optimized
from megafork.types import TokenTable, hash64


@dataclass(frozen=True)
class _Picked:
    """A response of one of the step's mini-batches."""

    minibatch: int
    sample: int
    uid: int
    group: int
    is_right: bool


def is_sampled(step: int, *, every: int, last: int) -> bool:
    """Every so many steps, and the first and the last of the run; with 0 never."""
    return every > 0 and (step in (1, last) or step % every == 0)


def sampled_responses(
    done: Optimized, count: int, forking: ForkingConfig, topology: Topology, *, step: int
) -> list[dict[str, Any]]:
    """`count` responses on every rank, all ranks together; one all-reduce of their tokens.

    reward, accuracy and advantage are as trained on (advantage: the mean over the response's tokens
    with a critic, null where there are none), entropies those that the tokens were selected by or
    null where they are unknown, rollout_logprobs the engine's. threshold is the one that the
    response's tokens were compared with, null where entropy decides nothing. loss: whether the
    response takes part in the loss.
    """
    picked = pick_responses(done.tables, count, step=step)
    responses = None
    if picked and topology.is_last_stage:
        values = _gathered(done, picked, topology)
        responses = [
            _response(done, one, forking, entropy_R, selected_R.bool(), step)
            for one, (entropy_R, selected_R) in zip(picked, values, strict=True)
        ]
    return topology.broadcast_object(responses, src=topology.last_stage_rank) or []


def pick_responses(tables: Sequence[TokenTable], count: int, *, step: int) -> list[_Picked]:
    """In the order of a hash of uid and step: the first right and the first wrong one of another
    group where there are such, then one of each further group, then any.

    Responses in the loss come before those that overlong filtering has taken out of it.
    """
    candidates = [
        (not in_loss, order, _Picked(number, sample, uid, group, accuracy >= 1.0))
        for number, table in enumerate(tables)
        for sample, (order, uid, group, accuracy, in_loss) in enumerate(
            zip(
                hash64(torch.tensor(step), table.uid_B).tolist(),
                table.uid_B.tolist(),
                table.group_B.tolist(),
                table.accuracy_B.tolist(),
                (table.num_loss_tokens_B > 0).tolist(),
                strict=True,
            )
        )
    ]
    ordered = [one for *_, one in sorted(candidates, key=lambda c: (c[0], c[1], c[2].uid))]
    right = next((one for one in ordered if one.is_right), None)
    wrong = [one for one in ordered if not one.is_right]
    elsewhere = (one for one in wrong if right is None or one.group != right.group)
    picked = [one for one in (right, next(elsewhere, wrong[0] if wrong else None)) if one]
    for may_repeat in (False, True):
        for one in ordered:
            if len(picked) >= count:
                break
            if one not in picked and (may_repeat or all(one.group != p.group for p in picked)):
                picked.append(one)
    return picked[:count]


def _gathered(done: Optimized, picked: Sequence[_Picked], topology: Topology) -> list[Tensor]:
    """Of each response [2, tokens]: its entropies, and 1 where a token is selected.

    Every token is on one rank of dp_cp and zero on the others, so the sum has its bits.
    """
    own = []
    for one in picked:
        table, scores = done.tables[one.minibatch], done.scores[one.minibatch]
        rows = table.rows(one.sample)
        here_N = (scores.rows_N >= rows.start) & (scores.rows_N < rows.stop)
        values = torch.zeros(2, rows.stop - rows.start)
        values[:, scores.rows_N[here_N] - rows.start] = torch.stack(
            [scores.entropy_N[here_N], done.masks[one.minibatch][here_N].float()]
        )
        own.append(values)
    summed = torch.cat(own, 1).to(topology.device)
    dist.all_reduce(summed, group=topology.groups.dp_cp)
    return list(summed.cpu().split([values.shape[1] for values in own], 1))


def _response(
    done: Optimized,
    one: _Picked,
    forking: ForkingConfig,
    entropy_R: Tensor,
    selected_R: Tensor,
    step: int,
) -> dict[str, Any]:
    table = done.tables[one.minibatch]
    rows = table.rows(one.sample)
    has_entropies = done.scores[one.minibatch].has_entropies
    in_loss_R = table.loss_mask_R[rows]
    threshold = _threshold(done, one, forking, entropy_R, in_loss_R, step)
    advantage = float(table.advantage_R[rows].double().mean())
    return {
        "step": step,
        "uid": one.uid,
        "group": one.group,
        "prompt_ids": table.prompt(one.sample).tolist(),
        "token_ids": table.token_R[rows].tolist(),
        "entropies": _shortest(entropy_R) if has_entropies else None,
        "selected": selected_R.tolist(),
        "rollout_logprobs": _shortest(table.rollout_logprob_R[rows]),
        "reward": _shortest(table.reward_B)[one.sample],
        "accuracy": float(table.accuracy_B[one.sample]),
        "advantage": None if math.isnan(advantage) else advantage,
        "threshold": None if math.isnan(threshold) else _shortest(torch.tensor([threshold]))[0],
        "truncated": bool(table.truncated_B[one.sample]),
        "loss": bool(in_loss_R.any()),
    }


def _threshold(
    done: Optimized,
    one: _Picked,
    forking: ForkingConfig,
    entropy_R: Tensor,
    in_loss_R: Tensor,
    step: int,
) -> float:
    """NaN where there is none; with scope = "sequence" the selection knows only their mean."""
    if forking.scope == "batch":
        return done.selections[0].threshold
    threshold = done.selections[one.minibatch].threshold
    if forking.scope == "minibatch" or math.isnan(threshold):
        return threshold
    if not in_loss_R.any():
        return math.nan
    return float(top_fraction_threshold(entropy_R, in_loss_R, forking.rho_at(step)).threshold)


def _shortest(values: Tensor) -> list[float]:
    """Of float32, in as few digits as tell them apart: half of what JSON writes of them."""
    return [float(str(value)) for value in values.float().numpy()]
