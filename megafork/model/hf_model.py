"""The one way to the weights of an HF folder: it is what this stack would compute, or refused.

Every reader (train, score, eval, generate, kl.reference, critic.path, convert, plan) comes through
`open_model`, so that all of them accept and refuse the same folders with the same words.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megafork.errors import UserError
from megafork.model.hf_config import FAMILIES, ignored_keys, read_json
from megafork.model.hf_folder import SafetensorsFolder
from megafork.model.hf_mapping import whole_model_rules
from megafork.model.shape import ModelShape

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SCALES = re.compile(
    r"(weight_scale(_inv|_2)?|input_scale|qweight|qzeros|scales|g_idx|absmax|quant_map|SCB|"
    r"quant_state\..*|weight_(packed|shape|zero_point)|lora_[AB]\..*)$"
)
"""How FP8, GPTQ, AWQ, bitsandbytes, compressed-tensors and adapters call what is of a weight"""


@dataclass(frozen=True)
class HfModel:
    shape: ModelShape
    weights: SafetensorsFolder
    copies: dict[str, str]
    """{tensor: tensor that it repeats}: a tied head that is stored, as Qwen3-0.6B's"""
    ignored: list[str]
    """What the folder says or holds and nothing here reads, for the user to know"""


def has_weights(folder: str | Path) -> bool:
    """Return whether the folder has safetensors files; a plan needs none."""
    return any(Path(folder).glob("*.safetensors*"))


def open_model(
    folder: str | Path, *, setting: str = "model.path", value_head: bool = False
) -> HfModel:
    """The model in `folder`, every tensor of its files accounted for. Raises UserError.

    setting: what the user calls the folder. value_head: a critic is built of it, whose head the
    folder may have or not; a vocabulary's head is then of no account.
    """
    shape = ModelShape.from_folder(folder, setting=setting)
    weights = SafetensorsFolder(folder)
    known: set[str] = set()
    for rule in whole_model_rules(shape, value_head=value_head):
        if rule.optional and not weights.names.issuperset(rule.hf):
            continue
        for name, expected in zip(rule.hf, rule.hf_shapes, strict=True):
            weights.check_holds(name)
            weights.check_shape(name, expected)
            known.add(name)
    unknown = weights.names - known
    if value_head and not shape.tied_embeddings:
        unknown.discard(HEAD)
    copies = {HEAD: EMBEDDING} if shape.tied_embeddings and HEAD in unknown else {}
    frequencies = {name for name in unknown if _FREQUENCIES.fullmatch(name)}
    _refuse_unknown(weights, unknown - set(copies) - frequencies)
    _check_frequencies(weights, frequencies, shape)
    for copy, name in copies.items():
        if not weights.same_bits(copy, name):
            raise UserError(
                f"{weights.folder}: config.json ties the head to the embedding, but {copy} and "
                f"{name} differ: set tie_word_embeddings to false if the head is one of its own"
            )
    return HfModel(shape, weights, copies, _ignored(Path(folder)))


def check_folder(
    folder: str | Path, *, setting: str = "model.path", value_head: bool = False
) -> HfModel:
    """`open_model` before anything starts, which tells on stderr what of the folder is ignored."""
    model = open_model(folder, setting=setting, value_head=value_head)
    if model.ignored:
        print(f"note: {setting}={folder}: ignored: {', '.join(model.ignored)}", file=sys.stderr)
    return model


def _refuse_unknown(weights: SafetensorsFolder, unknown: set[str]) -> None:
    if not unknown:
        return
    first = min(unknown)
    scales = [name for name in sorted(unknown) if _SCALES.search(name)]
    if scales:
        raise UserError(
            f"{weights.folder} holds {scales[0]}: quantised weights and adapters are not "
            "supported; use the model that was not quantised, with its adapters merged"
        )
    raise UserError(
        f"{weights.folder} holds {len(unknown)} tensors that this architecture does not have, "
        f"{first} first: they would be lost; is config.json that of another model?"
    )


def _check_frequencies(
    weights: SafetensorsFolder, frequencies: set[str], shape: ModelShape
) -> None:
    """Folders of 2023 store the rotary frequencies, in any dtype, beside what they follow from."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    expected = shape.rope_theta**-exponents
    for name in sorted(frequencies):
        stored = weights.slice(name, None, 0, 0).double()
        same = stored.shape == expected.shape and torch.allclose(stored, expected, 1e-2, 1e-7)
        if not same or shape.rope_factor is not None:
            raise UserError(
                f"{weights.folder}: {name} is not what config.json's rope_theta="
                f"{shape.rope_theta:g} makes of head_dim={shape.head_dim}: correct config.json, or "
                "remove the tensor"
            )


def _ignored(folder: Path) -> list[str]:
    raw = read_json(folder / "config.json")
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    return ignored_keys(FAMILIES[raw["model_type"]], raw) + pickled
