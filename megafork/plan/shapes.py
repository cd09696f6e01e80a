"""Published shapes by name, so that a plan needs no download.

From config.json of Qwen/Qwen3-8B-Base, Qwen/Qwen3-14B-Base and Qwen/Qwen3-32B on the Hugging Face
hub. There is no published base model of 32B; all three have the same family, vocabulary and head
dimension, and heads that are not tied to the embedding. The base models were trained for 32,768
positions, the 32B for 40,960.
"""

from __future__ import annotations

from pathlib import Path

from megafork.errors import UserError
from megafork.model.shape import ModelShape


def _qwen3(
    layers: int, hidden: int, inner: int, heads: int, positions: int, eos: int
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_positions=positions,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        rope_factor=None,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        eos_token_ids=(eos,),
    )


SHAPES = {
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, 32768, 151643),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, 32768, 151643),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, 40960, 151645),
}


def named_shape(name: str, *, setting: str = "--model") -> ModelShape:
    """One of SHAPES, or that of an HF folder (config.json is enough; weights that are there are
    checked). Raises UserError.

    setting: what the user calls it.
    """
    if name in SHAPES:
        return SHAPES[name]
    if not name or not Path(name).is_dir():
        raise UserError(
            f"{setting}={name} is neither one of {', '.join(SHAPES)} nor a folder with a "
            "config.json"
        )
    from megafork.model.hf_model import check_folder, has_weights

    if has_weights(name):
        return check_folder(name, setting=setting).shape
    return ModelShape.from_folder(name, setting=setting)
