"""The shape of a dense model, read from an HF folder's config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafork.config import ModelConfig, ParallelConfig
from megafork.errors import UserError
from megafork.model.hf_config import (
    check_config,
    eos_token_ids,
    head_dim,
    read_json,
    refuse_side_files,
    rope,
)


@dataclass(frozen=True)
class ModelShape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    rope_factor: float | None
    """Llama 3's stretching of the low rotary frequencies; None: not stretched."""
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    """Every end that generation_config.json and config.json name and that the vocabulary has"""

    @classmethod
    def from_folder(cls, folder: str | Path, *, setting: str = "model.path") -> ModelShape:
        """Read `folder`/config.json. Raises UserError for what megafork does not train.

        setting: what the user calls the folder.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not folder.is_dir():
            raise UserError(f"{setting}={folder} is not a folder: give an HF model folder")
        refuse_side_files(folder)
        if not path.is_file():
            raise UserError(f"{setting}={folder} holds no config.json: give an HF model folder")
        raw = read_json(path)
        family = check_config(path, raw)
        try:
            theta, factor = rope(path, raw)
            return cls(
                num_layers=raw["num_hidden_layers"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_heads=raw["num_attention_heads"],
                num_kv_heads=raw["num_key_value_heads"],
                head_dim=head_dim(path, raw, family),
                vocab_size=raw["vocab_size"],
                max_positions=raw["max_position_embeddings"],
                rope_theta=theta,
                rope_factor=factor,
                rms_norm_eps=raw["rms_norm_eps"],
                tied_embeddings=raw["tie_word_embeddings"],
                qkv_bias=family.qkv_bias,
                qk_norm=family.qk_norm,
                eos_token_ids=_in_vocabulary(ends_of_configs(folder, raw), raw["vocab_size"]),
            )
        except KeyError as error:
            raise UserError(f"{path} lacks the key {error}") from None

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Raise UserError with key, value and fix when the model cannot be built this way."""
        if model.float32_head and self.tied_embeddings:
            raise UserError(
                "model.float32_head=true, but this model's head is its embedding (tied): turn it "
                "off; its product is float32 anyway"
            )
        self.check_layout(parallel)

    def check_same_build(self, folder: str | Path, *, setting: str) -> None:
        """Raise UserError where the weights of `folder` do not belong into this model."""
        for name, theirs in vars(ModelShape.from_folder(folder, setting=setting)).items():
            ours = getattr(self, name)
            if name not in ("eos_token_ids", "max_positions") and theirs != ours:
                raise UserError(
                    f"{setting}={folder} has {name}={theirs}, but model.path has {ours}: give a "
                    "model of the same shape and vocabulary"
                )

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raise UserError with key, value and fix when the model cannot be split this way."""
        for name, value in (
            ("num_kv_heads", self.num_kv_heads),
            ("num_heads", self.num_heads),
            ("intermediate_size", self.intermediate_size),
        ):
            if value % parallel.tp:
                fits = [d for d in range(1, self.num_kv_heads + 1) if self.num_kv_heads % d == 0]
                raise UserError(
                    f"parallel.tp={parallel.tp} must divide model.{name}={value}: "
                    f"use {', '.join(map(str, fits[:-1]))}{' or ' if fits[:-1] else ''}{fits[-1]}"
                )
        layers, stages = parallel.pipeline_layers, parallel.num_stages
        if parallel.vpp > 1 and parallel.pp == 1:
            raise UserError(f"parallel.vpp={parallel.vpp} needs parallel.pp > 1: raise pp")
        if layers is not None:
            if len(layers) != stages or sum(layers) != self.num_layers:
                raise UserError(
                    f"parallel.pipeline_layers={list(layers)} must have pp * vpp={stages} "
                    f"entries that sum to model.num_layers={self.num_layers}"
                )
        elif self.num_layers % stages:
            what = f"parallel.pp={parallel.pp}"
            if parallel.vpp > 1:
                what += f" * vpp={parallel.vpp}"
            raise UserError(
                f"{what} must divide model.num_layers={self.num_layers}: "
                "use a divisor, or give the layers of each stage in parallel.pipeline_layers"
            )
        if parallel.sequence_parallel and parallel.tp == 1:
            raise UserError(
                "parallel.sequence_parallel=true needs parallel.tp > 1: raise tp or turn it off"
            )

    def stage_layers(self, parallel: ParallelConfig) -> list[range]:
        """The layers of each of the pp * vpp stages, in order; stage s is on rank s % pp."""
        stages = parallel.num_stages
        sizes = parallel.pipeline_layers or (self.num_layers // stages,) * stages
        starts = [sum(sizes[:stage]) for stage in range(stages)]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def padded_vocab_size(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> int:
    """Megatron's rule: a multiple of vocab_divisible_by * tp, so that every shard is equal."""
    multiple = model.vocab_divisible_by * parallel.tp
    return -(-shape.vocab_size // multiple) * multiple


def ends_of_configs(folder: Path, raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{file: its eos_token_id} of generation_config.json and of config.json, which is `raw`."""
    ends = {}
    path = folder / "generation_config.json"
    if path.is_file():
        ends[path.name] = eos_token_ids(path, read_json(path))
    return ends | {"config.json": eos_token_ids(folder / "config.json", raw)}


def _in_vocabulary(ends: dict[str, tuple[int, ...]], vocab_size: int) -> tuple[int, ...]:
    """Return the distinct ids that are in the vocabulary, in their order."""
    return tuple(dict.fromkeys(i for ids in ends.values() for i in ids if 0 <= i < vocab_size))
