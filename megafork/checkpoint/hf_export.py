"""Writes the policy as an HF folder: every pipeline stage its own safetensors files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megafork.checkpoint.hf import SafetensorsWriter, copy_side_files, write_index
from megafork.model.scorer import Scorer
from megafork.parallel.topology import Topology


def export_hf(
    policy: Scorer,
    topology: Topology,
    source: Path,
    target: Path,
    tokenizer: str | Path | None = None,
) -> None:
    """Write weights, config and tokenizer of `source`'s model to `target`. Collective.

    tokenizer: the HF folder or .model file whose tokenizer goes along; None: `source`'s.
    `target` exists under its name only when it is whole; an older one is replaced.
    """
    partial = target.with_name(target.name + ".partial")
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    written: tuple[dict[str, str], int] | None = None
    if topology.is_first_replica:
        writer = SafetensorsWriter(partial, prefix=f"model-stage{topology.pp_rank:02d}")
        for name, tensor in policy.export_shards():
            writer.add(name, tensor)
        writer.flush()
        if topology.is_sender:
            written = (writer.weight_map, writer.total_bytes)
    parts = [part for part in topology.all_gather_object(written) if part is not None]
    if topology.rank == 0:
        weight_map = {name: file for files, _ in parts for name, file in files.items()}
        write_index(partial, weight_map, sum(size for _, size in parts))
        copy_side_files(source, partial, policy.dtype, tokenizer)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    torch.distributed.barrier()
