"""HF safetensors folders: read slices of tensors, write shards with an index.

No rank ever holds the whole model: reading maps the files and copies the slices it needs, writing
takes tensors one at a time and closes a file when it has reached the size limit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megafork.errors import UserError

_INDEX = "model.safetensors.index.json"
_CARRIED_OVER = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class SafetensorsFolder:
    """The tensors of a folder with model.safetensors or a sharded index."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = {name: self._open(name) for name in self._file_names()}
        self._file_of = {key: name for name, file in self._files.items() for key in file.keys()}

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def slice(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) [start, stop) of a tensor; dim None is all of it."""
        if name not in self._file_of:
            raise UserError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete")
        file = self._files[self._file_of[name]]
        if dim is None:
            return file.get_tensor(name)
        view = file.get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def _file_names(self) -> list[str]:
        index = self.folder / _INDEX
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        pickled = sorted(p.name for p in self.folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickled file, save it as safetensors" if pickled else ""
        raise UserError(f"{self.folder} holds no model.safetensors and no {_INDEX}{hint}")

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({error}): copy the file again"
            ) from None


class SafetensorsWriter:
    """Writes tensors, as they come, to numbered safetensors files of one folder.

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
        save_file(self._pending, self.folder / file_name, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self._pending, file_name)
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_side_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Config, generation config and tokenizer; config.json states the dtype that is written."""
    for name in _CARRIED_OVER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_complete(names: Iterable[str], available: set[str], folder: Path) -> None:
    missing = sorted(set(names) - available)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} has no tensor {missing[0]}{more}: the checkpoint is incomplete")
