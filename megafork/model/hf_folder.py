"""Reads slices of tensors from an HF safetensors folder; nothing is held that was not asked for."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megafork.errors import UserError
from megafork.model.hf_config import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TO_SAFETENSORS = (
    "import sys; from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained(sys.argv[1], use_safetensors=False, trust_remote_code=False)"
    ".save_pretrained(sys.argv[1])"
)


class SafetensorsFolder:
    """The tensors of a folder with model.safetensors or a sharded index.

    A file is open while a slice is read and no longer: the pages of an open one stay with the
    process, up to the size of the model. Raises UserError where the index and the files disagree,
    where a file is read by some programs and not by others, and for quantised tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        index = self._index()
        for file_name in self._file_names(index):
            with self._open(file_name) as file:
                for key in file.keys():
                    if key in self._file_of:
                        raise UserError(
                            f"{self.folder}: {key} is in {self._file_of[key]} and in {file_name}: "
                            "remove the file that is not the model's"
                        )
                    self._file_of[key] = file_name
                    self._shape[key] = tuple(file.get_slice(key).get_shape())
                    self._dtype[key] = file.get_slice(key).get_dtype()
        if index is not None:
            self._compare(index)
        for name in sorted(self._dtype):
            self.dtype(name)

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
        """Return a tensor's dtype. Raises UserError for one that no weight has (quantised)."""
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
        """Raise UserError when the files and config.json disagree."""
        if self.shape(name) != expected:
            raise UserError(
                f"{self.folder}: {name} has shape {list(self.shape(name))}, but its config.json "
                f"asks for {list(expected)}"
            )

    def same_bits(self, name: str, other: str) -> bool:
        """Return whether two matrices have the same bits; they are read in blocks of rows."""
        if (self._shape[name], self._dtype[name]) != (self._shape[other], self._dtype[other]):
            return False
        rows, columns = self._shape[name]
        step = max(1, (64 << 20) // columns)
        return all(
            same_bits(*(self.slice(n, 0, start, start + step) for n in (name, other)))
            for start in range(0, rows, step)
        )

    def _index(self) -> dict[str, str] | None:
        """{tensor: file} of the sharded index; None where there is none."""
        path = self.folder / INDEX
        if not path.is_file():
            return None
        weight_map = read_json(path).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) and file for file in weight_map.values())
        ):
            raise UserError(f"{path} has no weight_map of tensors to files: copy the file again")
        for file in weight_map.values():
            if Path(file).name != file:
                raise UserError(f"{path} names {file!r}, which is no file of its folder")
        return weight_map

    def _file_names(self, index: dict[str, str] | None) -> list[str]:
        """The files to read, which must be all that there are: some programs read all of them."""
        there = {path.name for path in self.folder.glob("*.safetensors")}
        if index is None and SINGLE not in there:
            raise UserError(f"{self.folder} holds no {SINGLE} and no {INDEX}{self._pickled_hint()}")
        wanted = {SINGLE} if index is None else set(index.values())
        if len(wanted) > 1 and SINGLE in there:
            raise UserError(
                f"{self.folder} holds {SINGLE} beside {INDEX}, which names other files, and "
                "transformers reads the first alone: remove the one that is not the model's"
            )
        if unread := sorted(there - wanted):
            by = "beside model.safetensors" if index is None else f"which {INDEX} does not name"
            raise UserError(
                f"{self.folder} holds {unread[0]}, {by}: some programs read it and some do not; "
                "remove it"
            )
        return sorted(wanted)

    def _compare(self, index: dict[str, str]) -> None:
        for name in sorted(index.keys() | self.names):
            said, found = index.get(name), self._file_of.get(name)
            if said == found:
                continue
            if said is None:
                raise UserError(
                    f"{self.folder}: {found} holds {name}, which {INDEX} does not name: copy the "
                    "model again"
                )
            raise UserError(
                f"{self.folder}: {INDEX} says that {name} is in {said}, but "
                f"{f'it is in {found}' if found else 'it is not there'}: copy the model again"
            )

    def _pickled_hint(self) -> str:
        pickled = sorted(p.name for pattern in _PICKLED for p in self.folder.glob(pattern))
        if not pickled:
            return ""
        command = f"python -c {shlex.quote(_TO_SAFETENSORS)} {shlex.quote(str(self.folder))}"
        return (
            f". {pickled[0]} is a pickled file, and loading one can run any code: if you trust "
            f"it, save it as safetensors with\n  {command}"
        )

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({error}): copy the file again"
            ) from None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype and bits: NaN equals itself, 0 differs from
    -0."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
