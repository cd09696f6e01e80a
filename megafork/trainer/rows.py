"""The rows of a batch: from the collector to the ranks that work on them, as arrays.

The first rank of each data-parallel replica asks for the rows of its replica's samples, and sends
them to the other ranks of the replica, which know the samples' lengths.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.advantages import check_advantages, group_advantages
from megafork.config import AlgorithmConfig, TrainConfig
from megafork.config.learning import ADVANTAGES
from megafork.controller.handle import Batch, Controller
from megafork.data.token_table import TokenTable
from megafork.errors import UserError
from megafork.parallel.mesh import Mesh
from megafork.system.plugins import load_plugin
from megafork.trainer.policy import Policy

_TOKEN_BYTES = 8
_RUN_BYTES = 8
"""A token's id and log-probability; a policy version and the number of tokens that it sampled"""
_COLUMNS = {
    "token_R": torch.int32,
    "rollout_logprob_R": torch.float32,
    "policy_version_R": torch.int32,
}
"""What is sent inside a replica, and as what: 12 bytes a row"""


def minibatches_of(
    config: TrainConfig, batch: Batch, policy: Policy, controller: Controller
) -> list[TokenTable]:
    """Return the batch's mini-batches, of whole groups, with the rows that this rank works on.

    Nobody gets the rows of a mini-batch that overlong filtering has emptied. Advantages are there
    unless a critic gives them.
    """
    training, known = config.training, batch.table
    samples = known.minibatch_samples(
        training.prompts_per_minibatch, seed=training.seed + batch.step
    )
    replica_B = torch.full((known.num_samples,), -1)
    for picked in samples:
        if (part := known.take(picked)).num_loss_tokens:
            replica_B[picked] = policy.replicas(part)
    if not (replica_B >= 0).any():
        raise UserError(
            f"step {batch.step}: every response was cut at rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens} and algorithm.overlong_filtering left nothing "
            "to train on: raise the one or turn off the other"
        )
    source = controller if policy.mesh.is_replica_leader else None
    table = fetch_rows(known, replica_B, batch.step, source, policy.mesh)
    if not config.algorithm.uses_critic:
        table = with_advantages(table, config.algorithm)
    return [table.take(picked) for picked in samples]


def with_advantages(table: TokenTable, algorithm: AlgorithmConfig) -> TokenTable:
    """Return the table with the advantages of the rows that are here, from all samples' rewards.

    Raises UserError for what a plug-in of `algorithm.advantages` returns in their place.
    """
    if algorithm.advantages == "group":
        advantages_B = group_advantages(
            table.reward_B, table.group_B, normalize=algorithm.normalize_advantage
        )
        return table.with_columns(advantage_R=advantages_B[table.sample_R])
    function = load_plugin("algorithm.advantages", algorithm.advantages, ADVANTAGES)
    advantage_R = function(table.reward_B, table.group_B, table)
    checked_R = check_advantages(algorithm.advantages, advantage_R, table.num_rows)
    return table.with_columns(advantage_R=checked_R)


def fetch_rows(
    table: TokenTable,
    replica_B: Tensor,
    step: int,
    source: Controller | None,
    mesh: Mesh,
) -> TokenTable:
    """Return the table with this replica's rows, those of the samples with replica_B == dp_rank.

    table: what every rank knows of the batch; replica_B: int64, the data-parallel rank that is to
    have a sample's rows, below 0 for none: the same on all ranks, and all call together. source:
    of each replica's first rank. A response is in the loss mask as a whole or not at
    all. Raises UserError, on every rank, where one does not get its rows.
    """
    wanted_B = replica_B == mesh.dp_rank
    lengths_B = table.response_lengths_B[wanted_B]
    num_rows = int(lengths_B.sum())
    columns: dict[str, Tensor] = {}

    def ask() -> None:
        if source is not None:
            columns.update(_asked(source, step, table.uid_B[wanted_B], num_rows))

    mesh.on_every_rank(ask)
    for name, dtype in _COLUMNS.items():
        if source is None:
            columns[name] = torch.empty(num_rows, dtype=dtype)
        sent = _inside_replica(columns[name].to(mesh.device), mesh)
        columns[name] = sent.to(getattr(table, name))
    in_loss_B = (table.num_loss_tokens_B > 0)[wanted_B]
    return table.with_rows(
        wanted_B,
        loss_mask_R=torch.from_numpy(np.repeat(in_loss_B.numpy(), lengths_B.numpy())),
        advantage_R=torch.full((num_rows,), torch.nan),
        **columns,
    )


def columns_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the columns of _COLUMNS that a message with rows holds."""
    versions, counts = arrays["runs"].reshape(-1, 2).T
    return {
        "token_R": torch.from_numpy(arrays["token_ids"]),
        "rollout_logprob_R": torch.from_numpy(arrays["logprobs"]),
        "policy_version_R": torch.from_numpy(np.repeat(versions, counts)),
    }


def _asked(source: Controller, step: int, uid_B: Tensor, num_rows: int) -> dict[str, Tensor]:
    _, arrays = source.ask(
        "rows",
        {"uids": [uid_B.numpy()]},
        step=step,
        most_bytes=(_TOKEN_BYTES + _RUN_BYTES) * num_rows + _RUN_BYTES * len(uid_B),
    )
    columns = columns_of(arrays)
    if any(len(column) != num_rows for column in columns.values()):
        lengths = [len(column) for column in columns.values()]
        raise UserError(f"the rows of step {step} are not {num_rows}, but {lengths}")
    return columns


def _inside_replica(column: Tensor, mesh: Mesh) -> Tensor:
    """Return the first rank's column on all tp * pp * cp ranks of its replica."""
    groups = mesh.groups
    if mesh.cp_size > 1 and mesh.tp_rank == mesh.pp_rank == 0:
        dist.broadcast(column, src=dist.get_global_rank(groups.cp, 0), group=groups.cp)
    if mesh.tp_size * mesh.pp_size > 1:
        dist.broadcast(column, src=dist.get_global_rank(groups.mp, 0), group=groups.mp)
    return column
