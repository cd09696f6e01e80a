"""Writes the policy as an HF folder: every pipeline stage its own safetensors files."""

from __future__ import annotations

import shutil
from pathlib import Path

from megafork.checkpoint.files import files_of, rename_synced
from megafork.checkpoint.hf import SafetensorsWriter, copy_side_files, write_index
from megafork.errors import UserError
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import Mesh
from megafork.system.disk import sync


def export_hf(
    policy: Scorer,
    mesh: Mesh,
    source: Path,
    target: Path,
    tokenizer: str | Path | None = None,
) -> None:
    """Write weights, config and tokenizer of `source`'s model to `target`. Collective.

    tokenizer: the HF folder or .model file whose tokenizer goes along; None: `source`'s.
    `target` exists under its name only when it is whole; an older one is replaced. Raises UserError
    when it cannot be written; an older one is then untouched.
    """
    partial = target.with_name(target.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def end() -> None:
        for _, _, problem in parts:
            if problem is not None:
                raise problem
        weight_map = {name: file for files, _, _ in parts for name, file in files.items()}
        write_index(partial, weight_map, sum(size for _, size, _ in parts))
        copy_side_files(source, partial, policy.dtype, tokenizer)
        for path in files_of(partial):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        rename_synced(partial, target)

    try:
        mesh.on_rank_zero(begin)
        parts = mesh.all_gather_object(_write_own(policy, mesh, partial))
        mesh.on_rank_zero(end)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{target} could not be written ({error}): make room and go on with megafork train "
            "--resume"
        ) from error


def _write_own(
    policy: Scorer, mesh: Mesh, partial: Path
) -> tuple[dict[str, str], int, OSError | None]:
    """({tensor: file}, bytes, what went wrong) of this rank.

    It takes part in collecting the weights to their end, whatever went wrong.
    """
    writer = SafetensorsWriter(partial, prefix=f"model-stage{mesh.pp_rank:02d}")
    problem: OSError | None = None
    if mesh.is_first_replica:
        for name, tensor in policy.export_shards():
            try:
                if problem is None:
                    writer.add(name, tensor)
            except OSError as error:
                problem = error
    try:
        if problem is None:
            writer.flush()
    except OSError as error:
        problem = error
    return writer.weight_map, writer.total_bytes, problem
