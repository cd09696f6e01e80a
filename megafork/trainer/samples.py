"""A few responses of a step with every token's entropy and whether it was selected, to be read.

Which responses is a function of their uids and the step, the same at every layout. Their values
come from the ranks that hold their tokens, by the reductions of entropy_record.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megafork.config import ForkingConfig
from megafork.data.token_table import TokenTable, hash64
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.trainer.outcome import Optimized


@dataclass(frozen=True)
class Picked:
    """A response of one of the step's mini-batches."""

    minibatch: int
    sample: int
    uid: int
    group: int
    is_right: bool


def is_sampled(step: int, *, every: int, last: int) -> bool:
    """Tell whether a step's responses are kept: every so many, the first and the last; 0: never."""
    return every > 0 and (step in (1, last) or step % every == 0)


def pick_responses(tables: Sequence[TokenTable], count: int, *, step: int) -> list[Picked]:
    """Return responses in the order of a hash of uid and step.

    The first right one and the first wrong one of another group come first, where there are such,
    then one of each further group, then any. Responses in the loss come before those that overlong
    filtering has taken out of it.
    """
    candidates = [
        (not in_loss, order, Picked(number, sample, uid, group, accuracy >= 1.0))
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


def response_columns(done: Optimized, one: Picked) -> Tensor:
    """Return this rank's part of a response's rows, float64 [6, R], each value exact.

    Entropy, whether selected, id, rollout_logprob, whether in the loss, advantage. A token is on
    one rank of dp_cp and zero on the others, so the sum over the ranks has its bits.
    """
    table, scores = done.tables[one.minibatch], done.scores[one.minibatch]
    columns = torch.zeros(6, int(table.response_lengths_B[one.sample]), dtype=torch.float64)
    here_N = table.sample_R[scores.rows_N] == one.sample
    rows = scores.rows_N[here_N]
    columns[:, table.position_R[rows]] = torch.stack(
        [
            scores.entropy_N[here_N].double(),
            done.masks[one.minibatch][here_N].double(),
            table.token_R[rows].double(),
            table.rollout_logprob_R[rows].double(),
            table.loss_mask_R[rows].double(),
            table.advantage_R[rows].double(),
        ]
    )
    return columns


def response_row(
    done: Optimized, one: Picked, forking: ForkingConfig, columns: Tensor, step: int
) -> dict[str, Any]:
    """Return a response's row of samples.jsonl but for its text.

    columns: the sum of `response_columns` over the ranks. reward, accuracy and advantage are as
    trained on (advantage: the mean over the response's tokens with a critic, null where there are
    none), entropies those that the tokens were selected by or null where they are unknown,
    rollout_logprobs the engine's. threshold is the one that the response's tokens were compared
    with, null where entropy decides nothing. loss: whether the response takes part in the loss.
    """
    table = done.tables[one.minibatch]
    entropy_R, selected_R, id_R, rollout_logprob_R, in_loss_R, advantage_R = columns
    has_entropies = done.scores[one.minibatch].has_entropies
    threshold = _threshold(done, one, forking, entropy_R.float(), in_loss_R.bool())
    advantage = float(advantage_R.mean())
    return {
        "step": step,
        "uid": one.uid,
        "group": one.group,
        "prompt_ids": table.prompt(one.sample).tolist(),
        "token_ids": id_R.long().tolist(),
        "entropies": _shortest(entropy_R) if has_entropies else None,
        "selected": selected_R.bool().tolist(),
        "rollout_logprobs": _shortest(rollout_logprob_R),
        "reward": _shortest(table.reward_B)[one.sample],
        "accuracy": float(table.accuracy_B[one.sample]),
        "advantage": None if math.isnan(advantage) else advantage,
        "threshold": None if math.isnan(threshold) else _shortest(torch.tensor([threshold]))[0],
        "truncated": bool(table.truncated_B[one.sample]),
        "loss": bool(in_loss_R.any()),
    }


def _threshold(
    done: Optimized,
    one: Picked,
    forking: ForkingConfig,
    entropy_R: Tensor,
    in_loss_R: Tensor,
) -> float:
    """Return the response's threshold, NaN where there is none; with scope = "sequence" it is
    computed again, for the selection knows only the mean."""
    if forking.scope == "batch":
        return done.selections[0].threshold
    selection = done.selections[one.minibatch]
    if forking.scope == "minibatch" or math.isnan(selection.threshold):
        return selection.threshold
    if not in_loss_R.any():
        return math.nan
    return float(top_fraction_threshold(entropy_R, in_loss_R, selection.rho).threshold)


def _shortest(values: Tensor) -> list[float]:
    """Return float32 values in as few digits as tell them apart, half of what JSON writes."""
    return [float(str(value)) for value in values.float().numpy()]
