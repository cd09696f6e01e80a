"""Writes the policy as an HF folder: every pipeline stage its own safetensors files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megafork.checkpoint.files import files_of, rename_synced
from megafork.checkpoint.hf import (
    SafetensorsWriter,
    copy_others_files,
    copy_side_files,
    join_parts,
)
from megafork.checkpoint.model_card import CARD, is_unchanged
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
    *,
    dtype: torch.dtype | None = None,
    card: Callable[[], str] | None = None,
) -> None:
    """Write weights, config and tokenizer of `source`'s model to `target`. Collective.

    tokenizer: the HF folder or .model file whose tokenizer goes along; None: `source`'s. dtype: of
    the weights, which torch rounds to it; None: the policy's. card: makes the text of its
    README.md, on rank 0; None: there is none. `target` exists under its name only when it is
    whole; an older one is replaced, but for files that are not the model's and a README.md that
    someone has changed. Raises UserError when it cannot be written; an older one is then untouched.
    """
    partial = target.with_name(target.name + ".partial")
    dtype = dtype or policy.dtype

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def end() -> None:
        for _, _, problem in parts:
            if problem is not None:
                raise problem
        weight_map = {name: file for files, _, _ in parts for name, file in files.items()}
        join_parts(partial, weight_map, sum(size for _, size, _ in parts))
        copy_side_files(source, partial, dtype, tokenizer)
        copy_others_files(target, partial)
        if card is not None:
            _write_card(partial / CARD, card)
        for path in files_of(partial):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        rename_synced(partial, target)

    try:
        mesh.on_rank_zero(begin)
        parts = mesh.all_gather_object(_write_own(policy, mesh, partial, dtype))
        mesh.on_rank_zero(end)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{target} could not be written ({error}): make room and go on with megafork train "
            "--resume"
        ) from error


def _write_card(path: Path, card: Callable[[], str]) -> None:
    """Write the card, unless there is one that someone has written or changed.

    A run that is trained to its end does not fail for want of a card.
    """
    if path.is_symlink() or (
        path.exists() and not is_unchanged(path.read_text(encoding="utf-8", errors="replace"))
    ):
        print(f"note: {path.name} of the model before was changed by hand: it is kept", flush=True)
        return
    try:
        text = card()
    except Exception as error:
        print(f"warning: no {path.name}: {type(error).__name__}: {error}", flush=True)
        return
    path.write_text(text, encoding="utf-8")


def _write_own(
    policy: Scorer, mesh: Mesh, partial: Path, dtype: torch.dtype
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
                    writer.add(name, tensor.to(dtype))
            except OSError as error:
                problem = error
    try:
        if problem is None:
            writer.flush()
    except OSError as error:
        problem = error
    return writer.weight_map, writer.total_bytes, problem
