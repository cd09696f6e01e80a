"""Moves the rows of a token table to the ranks that work on them.

Each data-parallel replica gets the rows of its own samples and of no others: an all-to-all between
the replicas' first ranks, then a broadcast inside each replica. What a rank receives is a function
of the samples' lengths, which all ranks know, so no sizes are exchanged.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.topology import Topology
from megafork.types import TokenTable

_COLUMNS = {
    "token_R": torch.int32,
    "rollout_logprob_R": torch.float32,
    "policy_version_R": torch.int32,
    "loss_mask_R": torch.uint8,
}
"""What travels, and as what: 13 bytes a row."""


def redistribute(
    table: TokenTable, source_B: Tensor, replica_B: Tensor, topology: Topology
) -> TokenTable:
    """The table with this replica's rows, those of the samples with replica_B == dp_rank.

    source_B: int64, the data-parallel rank whose first rank holds a sample's rows now; replica_B:
    int64, the one that is to have them, below 0 for none. Both are the same on all ranks, and all
    call together. Advantages do not travel. Bytes sent: 13 for each row between replicas.
    """
    wanted_B = replica_B == topology.dp_rank
    num_rows = int(table.response_lengths_B[wanted_B].sum())
    columns: dict[str, Tensor] = {}
    for name, dtype in _COLUMNS.items():
        column = getattr(table, name)
        if topology.is_replica_leader:
            moved = _between_replicas(column.to(dtype), table, source_B, replica_B, topology)
        else:
            moved = torch.empty(num_rows, dtype=dtype, device=topology.device)
        columns[name] = _inside_replica(moved, topology).to(column)
    return table.with_rows(wanted_B, advantage_R=torch.full((num_rows,), torch.nan), **columns)


def _between_replicas(
    column_R: Tensor, table: TokenTable, source_B: Tensor, replica_B: Tensor, topology: Topology
) -> Tensor:
    """One column's rows for this replica, on the device, in the samples' order."""
    mine_B, wanted_B = source_B == topology.dp_rank, replica_B == topology.dp_rank
    assert table.held_B[mine_B & (replica_B >= 0)].all(), "a source lacks its rows"
    lengths_B = table.response_lengths_B
    outgoing = [_samples(mine_B & (replica_B == rank)) for rank in range(topology.dp_size)]
    incoming = [_samples(wanted_B & (source_B == rank)) for rank in range(topology.dp_size)]
    sent = torch.cat([column_R[table.rows_of(samples)] for samples in outgoing])
    received = sent.new_empty(int(lengths_B[wanted_B].sum())).to(topology.device)
    dist.all_to_all_single(
        received,
        sent.to(topology.device),
        output_split_sizes=[int(lengths_B[samples].sum()) for samples in incoming],
        input_split_sizes=[int(lengths_B[samples].sum()) for samples in outgoing],
        group=topology.groups.dp,
    )
    arrived = torch.cat(incoming)
    parts = received.split(lengths_B[arrived].tolist())
    return torch.cat([received[:0], *(parts[i] for i in arrived.argsort().tolist())])


def _inside_replica(column: Tensor, topology: Topology) -> Tensor:
    """The first rank's column on all tp * pp * cp ranks of its replica."""
    groups = topology.groups
    if topology.cp_size > 1 and topology.tp_rank == topology.pp_rank == 0:
        dist.broadcast(column, src=dist.get_global_rank(groups.cp, 0), group=groups.cp)
    if topology.tp_size * topology.pp_size > 1:
        dist.broadcast(column, src=dist.get_global_rank(groups.mp, 0), group=groups.mp)
    return column


def _samples(mask_B: Tensor) -> Tensor:
    return mask_B.nonzero()[:, 0]
