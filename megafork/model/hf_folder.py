"""Reads slices of tensors from an HF safetensors folder; nothing is held that was not asked for."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megafork.errors import UserError

INDEX = "model.safetensors.index.json"


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
        index = self.folder / INDEX
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        pickled = sorted(p.name for p in self.folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickled file, save it as safetensors" if pickled else ""
        raise UserError(f"{self.folder} holds no model.safetensors and no {INDEX}{hint}")

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({error}): copy the file again"
            ) from None
