"""Writes HF safetensors folders: tensors as they come, sharded, with an index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megafork.data.tokenizer import SENTENCEPIECE_FILE
from megafork.model.hf_folder import INDEX
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


class SafetensorsWriter:
    """Writes tensors, as they come, to numbered safetensors files of one folder. Raises OSError.

    Several writers (one for each pipeline stage) may share a folder: `prefix` keeps their file
    names apart and `write_index` joins what they wrote.
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
        try:
            save_file(self._pending, self.folder / file_name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{self.folder / file_name}: {error}") from error
        self.weight_map |= dict.fromkeys(self._pending, file_name)
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


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


def _copy(names: tuple[str, ...], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
