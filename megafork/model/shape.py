"""The shape of a dense model, read from an HF folder's config.json. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafork.config import ModelConfig, ParallelConfig
from megafork.errors import UserError

FAMILIES = ("qwen3", "qwen2", "llama")
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""model_type of config.json. Qwen2.5 is 'qwen2': biases of q, k and v, no norm of q and k; Llama 3
is 'llama': neither; Qwen3 has the norms."""
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Constants in megatron-core's RotaryEmbedding, and those of every Llama 3 model."""
_UNSUPPORTED = ("attention_bias", "mlp_bias", "use_sliding_window")


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

    @classmethod
    def from_folder(cls, folder: str | Path, *, setting: str = "model.path") -> ModelShape:
        """Read `folder`/config.json. Raises UserError for what megafork does not train.

        setting: what the user calls the folder.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not folder.is_dir():
            raise UserError(f"{setting}={folder} is not a folder: give an HF model folder")
        if not path.is_file():
            raise UserError(f"{setting}={folder} holds no config.json: give an HF model folder")
        raw = read_json(path)
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"{path} has model_type={family!r}; megafork trains the dense models "
                f"{', '.join(map(repr, FAMILIES))}"
            )
        _refuse_unsupported(path, raw)
        _check_numbers(path, raw)
        # transformers 5 nests the rope settings, 4 kept them at the top level.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        head_dim = raw.get("head_dim")
        if head_dim is None and family == "qwen3":
            raise UserError(f"{path} lacks the key 'head_dim'")
        try:
            return cls(
                num_layers=raw["num_hidden_layers"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_heads=raw["num_attention_heads"],
                num_kv_heads=raw["num_key_value_heads"],
                head_dim=head_dim or raw["hidden_size"] // raw["num_attention_heads"],
                vocab_size=raw["vocab_size"],
                max_positions=raw["max_position_embeddings"],
                rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else raw["rope_theta"]),
                rope_factor=_rope_factor(path, rope),
                rms_norm_eps=raw["rms_norm_eps"],
                tied_embeddings=raw["tie_word_embeddings"],
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
                eos_token_ids=_eos_token_ids(folder, raw),
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


def _check_numbers(path: Path, raw: dict[str, Any]) -> None:
    """Raises UserError for a size that is none. Absent keys are another's business."""
    for key in _SIZES:
        value = raw.get(key, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"{path} has {key}={value!r}: it has to be a whole number from 1 up")
    for key in ("rope_theta", "rms_norm_eps"):
        value = raw.get(key, 1.0)
        if type(value) not in (int, float) or not value > 0:
            raise UserError(f"{path} has {key}={value!r}: it has to be a number above 0")


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    for key in _UNSUPPORTED:
        if raw.get(key):
            raise UserError(f"{path} sets {key}: not supported")
    kinds = set(raw.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise UserError(f"{path} has layer_types {sorted(kinds)}: only full_attention is supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path} has hidden_act={raw['hidden_act']!r}; only 'silu' is supported")


def _rope_factor(path: Path, rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path} has rope_type={kind!r}; 'default' and 'llama3' are supported")
    for key, value in _LLAMA3_ROPE.items():
        if rope[key] != value:
            raise UserError(
                f"{path} has {key}={rope[key]}; megatron-core computes Llama 3's rotary embedding "
                f"with {value}"
            )
    return float(rope["factor"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UserError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy the model again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object: copy the model again")
    return raw


def _eos_token_ids(folder: Path, raw: dict) -> tuple[int, ...]:
    """generation_config.json wins over config.json, as in transformers."""
    path = folder / "generation_config.json"
    if path.is_file():
        raw = raw | read_json(path)
    ids = raw.get("eos_token_id")
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
