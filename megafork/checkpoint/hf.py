"""Writes HF safetensors folders: tensors as they come, sharded, with an index."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megafork.data.tokenizer import SENTENCEPIECE_FILE
from megafork.model.hf_folder import INDEX, SINGLE
from megafork.system.disk import naming

HF = "hf"
"""Of a megatron folder: the HF folder's config, generation config and tokenizer."""
_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    SENTENCEPIECE_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_WEIGHTS = re.compile(r"model(-stage\d+)?(-\d+)?(-of-\d+)?\.safetensors(\.index\.json)?")


class SafetensorsWriter:
    """Writes tensors, as they come, to numbered safetensors files of one folder. Raises OSError.

    Several writers (one for each pipeline stage) may share a folder: `prefix` keeps their file
    names apart and `join_parts` makes one model of what they wrote.
    """

    def __init__(self, folder: Path, prefix: str, max_bytes: int = 4 << 30) -> None:
        self.folder, self.prefix, self.max_bytes = folder, prefix, max_bytes
        self.weight_map: dict[str, str] = {}
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self.flush()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes

    def flush(self) -> None:
        if not self._pending:
            return
        number = len(set(self.weight_map.values())) + 1
        file_name = f"{self.prefix}-{number:05d}.safetensors"
        path = self.folder / file_name
        with naming(path):
            path.touch()
        mode = path.stat().st_mode  # as the umask says; safetensors' own is 0600
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        path.chmod(mode)
        self.weight_map |= dict.fromkeys(self._pending, file_name)
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def shard_name(number: int, total: int) -> str:
    """Return the name that HF gives to a model's file, counted from 1."""
    return SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def join_parts(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Give what several writers wrote HF's own names, and an index if it is several files.

    weight_map: {tensor: file} of all of them; the files' order is that of their names.
    """
    parts = sorted(set(weight_map.values()))
    names = {part: shard_name(i, len(parts)) for i, part in enumerate(parts, 1)}
    for part, name in names.items():
        (folder / part).rename(folder / name)
    if len(parts) > 1:
        weight_map = {tensor: names[part] for tensor, part in weight_map.items()}
        write_index(folder, weight_map, total_bytes)


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    with naming(folder / INDEX):
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_side_files(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Config, generation config and tokenizer; config.json states `dtype` where one is given.

    tokenizer: an HF folder or a SentencePiece file to take in place of the source's tokenizer, of
    which nothing is copied then: two would contradict each other.
    """
    _copy(_CONFIG_FILES, source, target)
    if tokenizer is not None and Path(tokenizer).is_file():
        shutil.copyfile(tokenizer, target / SENTENCEPIECE_FILE)
    else:
        _copy(_TOKENIZER_FILES, source if tokenizer is None else Path(tokenizer), target)
    if dtype is None:
        return
    config = json.loads((target / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    if config.pop("torch_dtype", config.get("dtype")) == name:  # transformers 4 and 5
        return
    config["dtype"] = name
    with naming(target / "config.json"):
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_others_files(source: Path, target: Path) -> None:
    """Copy what is in a model's folder and is no part of the model: a user has put it there."""
    for path in source.iterdir() if source.is_dir() else ():
        if path.name in (*_CONFIG_FILES, *_TOKENIZER_FILES) or _WEIGHTS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target / path.name, symlinks=True)
        else:
            shutil.copy2(path, target / path.name, follow_symlinks=False)


def _copy(names: tuple[str, ...], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
