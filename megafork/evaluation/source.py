"""The model that is evaluated: an HF folder, a run, or one of a run's checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.metrics.log import read_rows
from megafork.model.hf_config import read_json
from megafork.model.shape import ModelShape

_HF = "hf"
"""A megatron checkpoint's folder with config and tokenizer, as in checkpoint/hf.py, which imports
torch"""
_WEIGHTS = ("*.safetensors", "*.distcp", "*.pt")


@dataclass(frozen=True)
class ModelSource:
    folder: Path
    """HF folder, or megatron-core checkpoint"""
    side: Path
    """HF folder of its config and tokenizer"""

    @property
    def is_megatron(self) -> bool:
        return self.folder != self.side

    def shape(self) -> ModelShape:
        return ModelShape.from_folder(self.side)

    def check_weights(self) -> None:
        """Raises UserError for an HF folder that is not what megafork would compute. Imports torch.

        The conversion of a megatron checkpoint checks what it reads.
        """
        if not self.is_megatron:
            from megafork.model.hf_model import check_folder

            check_folder(self.folder)

    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype that config.json names; bfloat16 where it names any but float32."""
        raw = read_json(self.side / "config.json")
        named = raw.get("dtype") or raw.get("torch_dtype")  # transformers 5, 4
        return "float32" if named == "float32" else "bfloat16"

    def fingerprint(self) -> str:
        """Names, sizes and times of the weight files: it changes when one is written anew."""
        found = [path for pattern in _WEIGHTS for path in self.folder.glob(pattern)]
        stats = [(path.name, path.stat()) for path in sorted(found)]
        return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)

    @contextlib.contextmanager
    def as_hf(self, scratch: Path) -> Iterator[Path]:
        """The HF folder to serve; a megatron checkpoint is converted into `scratch`, which goes."""
        if not self.is_megatron:
            yield self.folder
            return
        from megafork.checkpoint.convert import megatron_to_hf

        shutil.rmtree(scratch, ignore_errors=True)
        try:
            megatron_to_hf(self.folder, scratch, like=None, max_file_bytes=5_000_000_000)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def find_model(path: str | Path, option: str = "--model") -> ModelSource:
    """Find the model that `path`, the value of a command's `option`, names.

    Raises UserError for what is no model, and for a run without its final policy.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{option} {folder} is not a folder: give an HF folder, a run's folder, or one of its "
            "checkpoints"
        )
    if (folder / "config.json").is_file():
        return ModelSource(folder, folder)
    if (folder / _HF / "config.json").is_file():
        return ModelSource(folder, folder / _HF)
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(
            f"{option} {folder} holds no config.json (an HF folder), no {_HF}/config.json (a "
            "megatron checkpoint) and no checkpoints/ (a run): give one of these"
        )
    final = checkpoints / "final"
    if not (final / "config.json").is_file():
        steps = ", ".join(str(p) for p in sorted(checkpoints.glob("step_*")) if not p.suffix)
        raise UserError(
            f"{option} {folder}: the run has no final checkpoint; give one of its others: "
            f"{steps or 'there is none'}"
        )
    _refuse_outdated(folder, final, option)
    return ModelSource(final, final)


def _refuse_outdated(run: Path, final: Path, option: str) -> None:
    """Refuse a run that was made longer: it keeps the final model of before until it ends again."""
    rows, config = read_rows(run / "metrics.jsonl"), run / "config.toml"
    if not rows or not config.is_file():
        return
    done, steps = rows[-1]["step"], load_config(TrainConfig, config, []).training.steps
    if done < steps:
        raise UserError(
            f"{option} {run} has done {done} of training.steps={steps}, so {final} is not its last "
            f"policy: end the run first (megafork train --resume), or name {final} itself"
        )
