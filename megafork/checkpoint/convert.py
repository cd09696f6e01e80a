"""`megafork convert`: HF folders to megatron-core checkpoints and back, tensor by tensor.

Values are moved and not changed: every tensor keeps its dtype and its bits, unless the HF folder is
asked for in bfloat16. A megatron folder made here carries the HF folder's config and tokenizer in
hf/, so the way back needs nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megafork.checkpoint.files import files_of, rename_synced, torch_save_raises_os_error
from megafork.checkpoint.hf import HF, copy_side_files
from megafork.checkpoint.hf_stream import StreamingSafetensors, TensorInfo
from megafork.checkpoint.layout import Block, blocks, extra_states, key_of
from megafork.checkpoint.progress_bar import progress
from megafork.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megafork.config import ModelConfig, ParallelConfig
from megafork.errors import UserError
from megafork.model.hf_config import read_json
from megafork.model.hf_mapping import whole_model_rules
from megafork.model.hf_model import HfModel, check_folder
from megafork.model.shape import ModelShape, padded_vocab_size
from megafork.system.disk import sync

_COPIES = "copies.json"
"""Of hf/: tensors that the HF folder held twice, as Qwen3-0.6B holds its tied head."""


def hf_to_megatron(source: Path, target: Path, *, max_file_bytes: int) -> None:
    """Write `target`, a megatron-core checkpoint of the weights in the HF folder `source`.

    Raises UserError for a folder that cannot be converted, before anything is written.
    """
    model = check_folder(source)
    shape, folder = model.shape, model.weights
    check_one_dtype(model)
    plan = model_blocks(shape, source)
    total = sum(block.num_bytes(folder.dtype(block.rule.hf[0])) for block in plan)
    with _new_folder(target, total) as partial, progress("HF to megatron", total) as advance:
        writer = TorchDistWriter(partial, max_file_bytes)
        for block in plan:
            values = block.from_hf(folder.slice)
            writer.add(block.key, block.size, block.offsets(), values)
            advance(block.num_bytes(values.dtype))
        for key, layer in extra_states(shape):
            writer.add_object(key, layer, shape.num_layers)
        writer.close()
        (partial / HF).mkdir()
        copy_side_files(source, partial / HF)
        if model.copies:
            (partial / HF / _COPIES).write_text(json.dumps(model.copies) + "\n")


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    like: Path | None,
    max_file_bytes: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `target`, an HF folder of the weights in the megatron-core checkpoint `source`.

    like: the HF folder that lends config and tokenizer; None: source/hf, which `hf_to_megatron`
    writes. dtype: what torch rounds every tensor to; None: each keeps its own. Raises UserError for
    a checkpoint that is not of this model, before anything is written.
    """
    side = hf_side_of(source, like)
    shape = ModelShape.from_folder(side)
    plan = model_blocks(shape, side)
    reader = TorchDistReader(source)
    for block in plan:
        check_stored(reader, block)
    copies = read_json(side / _COPIES) if (side / _COPIES).is_file() else {}
    infos = _tensor_infos(reader, shape, copies)
    if dtype is not None:
        infos = [replace(info, dtype=dtype) for info in infos]
    total = sum(info.num_bytes for info in infos)
    with _new_folder(target, total) as partial, progress("megatron to HF", total) as advance:
        output = StreamingSafetensors(partial, infos, max_file_bytes)
        for block in plan:
            for name, start, stored in read_block(reader, block):
                rows = stored if dtype is None else stored.to(dtype)
                for written in (name, *(copy for copy, of in copies.items() if of == name)):
                    output.write(written, start, rows)
                    advance(rows.nbytes)
        copy_side_files(side, partial, _main_dtype(infos))


def hf_side_of(megatron: Path, like: Path | None) -> Path:
    """Return the folder with the HF config that belongs to a megatron folder."""
    side = like or megatron / HF
    if like is None and not side.is_dir():
        raise UserError(
            f"{megatron} has no {HF}/ with the model's config and tokenizer: name the HF folder "
            "that it was trained from (--like DIR)"
        )
    return side


def check_stored(reader: TorchDistReader, block: Block) -> None:
    """Raise UserError when the checkpoint holds no such tensor or one of another shape."""
    stored, expected = reader.size(block.key), block.size
    if block.padded:
        vocab = block.rule.hf_shapes[0][0]
        fits = stored[0] >= vocab and stored[1:] == expected[1:]
    else:
        fits = stored == expected
    if not fits:
        raise UserError(
            f"{reader.folder}: {block.key} has shape {list(stored)}, but the model's config.json "
            f"asks for {list(expected)}"
        )


def read_block(reader: TorchDistReader, block: Block) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (HF name, first row, rows) of a stored block; nothing where it is all padding."""
    rows = block.hf_rows()
    if rows > 0:
        yield from block.to_hf(reader.read(block.key, block.offsets(), block.sizes(rows)))


def _tensor_infos(
    reader: TorchDistReader, shape: ModelShape, copies: dict[str, str]
) -> list[TensorInfo]:
    infos = [
        TensorInfo(name, hf_shape, reader.dtype(key_of(rule)))
        for rule in whole_model_rules(shape)
        for name, hf_shape in zip(rule.hf, rule.hf_shapes, strict=True)
    ]
    by_name = {info.name: info for info in infos}
    for copy, name in copies.items():
        infos.append(TensorInfo(copy, by_name[name].shape, by_name[name].dtype))
    return infos


def check_one_dtype(model: HfModel) -> None:
    """Raise UserError where tensors that megatron stores as one are of several dtypes."""
    dtypes: dict[str, torch.dtype] = {}
    for rule in whole_model_rules(model.shape):
        for name in rule.hf:
            key, dtype = key_of(rule), model.weights.dtype(name)
            if dtypes.setdefault(key, dtype) != dtype:
                raise UserError(
                    f"{model.weights.folder}: {name} is {dtype}, others of its kind {dtypes[key]}, "
                    "and megatron stores them as one tensor: save the model in one dtype"
                )


def _main_dtype(infos: list[TensorInfo]) -> torch.dtype:
    """Return the dtype of the layers' matrices: norms and a head may be kept in another."""
    return next(info.dtype for info in infos if info.name.endswith("down_proj.weight"))


def model_blocks(shape: ModelShape, folder: Path) -> list[Block]:
    """Return the blocks of a checkpoint as one rank would write it."""
    padded = padded_vocab_size(shape, ModelConfig(path=str(folder)), ParallelConfig())
    return list(blocks(shape, padded))


@contextlib.contextmanager
def _new_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a folder to fill; it is named `target` when the block ends, and removed if it fails."""
    if os.path.lexists(target):
        raise UserError(f"{target} exists: remove it or name another folder")
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise UserError(
                f"{target} needs {num_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB "
                "left: make room or name a folder on another disk"
            )
        with torch_save_raises_os_error():
            yield partial
        for path in files_of(partial):
            sync(path)
        rename_synced(partial, target)
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error}): make room or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
