"""Reads slices of tensors from an HF safetensors folder; nothing is held that was not asked for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megafork.errors import UserError

INDEX = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TO_SAFETENSORS = (
    "import sys; from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained(sys.argv[1], use_safetensors=False).save_pretrained(sys.argv[1])"
)


class SafetensorsFolder:
    """The tensors of a folder with model.safetensors or a sharded index.

    A file is open while a slice is read and no longer: the pages of an open one stay with the
    process, up to the size of the model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        for file_name in self._file_names():
            with self._open(file_name) as file:
                for key in file.keys():
                    self._file_of[key] = file_name
                    self._shape[key] = tuple(file.get_slice(key).get_shape())
                    self._dtype[key] = file.get_slice(key).get_dtype()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def slice(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) [start, stop) of a tensor; dim None is all of it."""
        self.check_holds(name)
        with self._open(self._file_of[name]) as file:
            if dim is None:
                return file.get_tensor(name)
            view = file.get_slice(name)
            return view[start:stop] if dim == 0 else view[:, start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for one that no weight has (quantised files)."""
        if self._dtype[name] not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{self.folder}: {name} is of type {self._dtype[name]}; weights are of "
                f"{', '.join(SAFETENSORS_DTYPES)}: use the model that was not quantised"
            )
        return SAFETENSORS_DTYPES[self._dtype[name]]

    def check_holds(self, name: str) -> None:
        if name not in self._file_of:
            raise UserError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete")

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raises UserError when the files and config.json disagree."""
        if self.shape(name) != expected:
            raise UserError(
                f"{self.folder}: {name} has shape {list(self.shape(name))}, but its config.json "
                f"asks for {list(expected)}"
            )

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        pickled = sorted(p.name for pattern in _PICKLED for p in self.folder.glob(pattern))
        hint = ""
        if pickled:
            command = f"python -c {shlex.quote(_TO_SAFETENSORS)} {shlex.quote(str(self.folder))}"
            hint = (
                f". {pickled[0]} is a pickled file, and loading one can run any code: if you trust "
                f"it, save it as safetensors with\n  {command}"
            )
        raise UserError(f"{self.folder} holds no model.safetensors and no {INDEX}{hint}")

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({error}): copy the file again"
            ) from None
