"""The meaning of every key of an HF folder's config.json to this stack. Imports no torch.

A key is implemented, known to be without effect on what the model computes, refused unless it has a
value that changes nothing, or ignored; `ignored_keys` names the last. The tests compare the tables
with transformers' config classes and with the keys that vLLM's models read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafork.errors import UserError


@dataclass(frozen=True)
class Family:
    """A model_type of config.json, with the properties that set it apart from other families."""

    name: str
    """Of transformers' classes: <name>Config, <name>ForCausalLM"""
    qkv_bias: bool
    qk_norm: bool
    without_effect: frozenset[str] = frozenset()

    @property
    def architectures(self) -> tuple[str, ...]:
        """The causal model, its stack without a head, and what a critic is saved as."""
        kinds = "ForCausalLM", "Model", "ForTokenClassification", "ForSequenceClassification"
        return tuple(self.name + kind for kind in kinds)


_WINDOWS = frozenset({"sliding_window", "max_window_layers"})
"""Of Qwen: read where use_sliding_window is true, which is refused. vLLM's Llama reads the first
without being told to."""
FAMILIES = {
    "qwen3": Family("Qwen3", qkv_bias=False, qk_norm=True, without_effect=_WINDOWS),
    "qwen2": Family("Qwen2", qkv_bias=True, qk_norm=False, without_effect=_WINDOWS),
    "llama": Family("Llama", qkv_bias=False, qk_norm=False),
}
"""By model_type. Qwen2.5 is 'qwen2', Llama 3 is 'llama'."""

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
IMPLEMENTED = frozenset(
    {
        *SIZES,
        *("model_type", "architectures", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
        *("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"),
        *("eos_token_id", "dtype", "torch_dtype", "layer_types"),
    }
)
WITHOUT_EFFECT = frozenset(
    {
        # Of how the model is made, saved, run or trained elsewhere.
        *("transformers_version", "initializer_range", "use_cache", "pretraining_tp"),
        *("name_or_path", "_name_or_path", "_commit_hash", "_attn_implementation_autoset"),
        *("attn_implementation", "_attn_implementation", "experts_implementation"),
        *("_attn_implementation_internal", "_experts_implementation_internal"),
        *("_experts_implementation", "chunk_size_feed_forward"),
        # Of what a call gives back.
        *("return_dict", "use_return_dict", "output_hidden_states", "output_attentions"),
        *("tie_last_hidden_states",),
        # Of classifiers: the tensors say how many outputs there are.
        *("id2label", "label2id", "num_labels", "problem_type"),
        # The tokenizer's own files say which tokens begin a text and fill a batch.
        *("bos_token_id", "pad_token_id", "tokenizer_class"),
    }
)
_REFUSED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "bias": (False,),
    "attention_out_bias": (False,),
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "use_sliding_window": (False,),
    "sliding_window": (),
    "attention_chunk_size": (),
    "dual_chunk_attention_config": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "per_layer_config": ({},),
    "mlp_layer_types": (),
    "layers_block_type": (),
    "block_configs": (),
    "attn_type_list": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "mrope_section": (),
    "alibi": (False,),
    "clip_qkv": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "lm_head_multiplier": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "moe_intermediate_size": (0,),
    "num_nextn_predict_layers": (0,),
    "mtp_num_hidden_layers": (0,),
    "kv_lora_rank": (),
    "text_config": (),
    "llm_config": (),
    "vision_config": (),
    "audio_config": (),
    "encoder": (),
    "decoder": (),
}
"""Keys that change what some model or engine computes, with the values that change nothing; null
never does."""
_DROPOUTS = ("attention_dropout", "attn_pdrop", "hidden_dropout", "resid_pdrop", "embd_pdrop")
_QUANTISED = ("quantization_config", "compression_config")
_QUANTISERS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Of AutoGPTQ, AutoAWQ and ModelOpt, which need not say it in config.json"""
_ADAPTER = "adapter_config.json"
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Constants in megatron-core's RotaryEmbedding, and those of every Llama 3 model."""
_DEFAULT_THETA = 10000.0
"""transformers', where a config names none"""
_ROPE_KEYS = {
    "default": frozenset[str](),
    "llama3": frozenset({"factor", *_LLAMA3_ROPE}),
}
"""What each rope_type reads beside its own name and rope_theta."""


def known_keys(family: Family) -> frozenset[str]:
    """Every key of config.json that is decided upon."""
    named = {*IMPLEMENTED, *WITHOUT_EFFECT, *family.without_effect, *_QUANTISED, *_DROPOUTS}
    return frozenset({*named, *_REFUSED, "qkv_bias", "qk_norm"})


def ignored_keys(family: Family, raw: dict[str, Any]) -> list[str]:
    """ "key=value" of what is set and not computed here: dropout, and keys that nobody knows."""
    unknown = [key for key in raw if key not in known_keys(family)]
    said = [key for key in raw if key in _DROPOUTS] + unknown
    return [f"{key}={json.dumps(raw[key])[:80]}" for key in said if raw[key]]


def check_config(path: Path, raw: dict[str, Any]) -> Family:
    """Return the family of a config.json. Raises UserError for what this stack would compute
    otherwise.

    path: for messages. raw: the file's content.
    """
    family = FAMILIES.get(raw["model_type"]) if isinstance(raw.get("model_type"), str) else None
    if family is None:
        raise UserError(
            f"{path} has model_type={raw.get('model_type')!r}; megafork trains the dense models "
            f"{', '.join(map(repr, FAMILIES))}"
        )
    _refuse_quantised(path, raw)
    _check_architectures(path, raw, family)
    refused = _REFUSED | {"qkv_bias": (family.qkv_bias,), "qk_norm": (family.qk_norm,)}
    for key, neutral in refused.items():
        value = raw.get(key)
        if key in family.without_effect or value is None or value in neutral:
            continue
        wanted = " or ".join([*map(repr, neutral), "none"])
        raise UserError(
            f"{path} has {key}={value!r}, which is not supported: megafork would compute another "
            f"model; it takes {wanted}"
        )
    _check_numbers(path, raw)
    _check_layer_types(path, raw)
    return family


def _refuse_quantised(path: Path, raw: dict[str, Any]) -> None:
    for key in _QUANTISED:
        if raw.get(key) is not None:
            raise UserError(
                f"{path} has {key}={json.dumps(raw[key])[:80]}: quantised weights are not "
                "supported; use the model that was not quantised"
            )
    for key in ("dtype", "torch_dtype"):
        value = raw.get(key, "auto")
        if value not in (None, "auto", "float64", "float32", "float16", "bfloat16"):
            raise UserError(
                f"{path} has {key}={value!r}: weights are float32, bfloat16, float16 or float64; "
                "use the model that was not quantised"
            )


def refuse_side_files(folder: Path) -> None:
    """Raise UserError for a folder that other programs read as more than its config and weights."""
    for name in _QUANTISERS_FILES:
        if (folder / name).is_file():
            raise UserError(
                f"{folder} holds {name}: quantised weights are not supported; use the model that "
                "was not quantised, or remove the file if its weights are not"
            )
    if (folder / _ADAPTER).is_file():
        raise UserError(
            f"{folder} holds {_ADAPTER}: adapters are not supported; merge the adapter into its "
            "base model (merge_and_unload of peft) and give the folder of the result"
        )


def _check_architectures(path: Path, raw: dict[str, Any], family: Family) -> None:
    named = raw.get("architectures")
    if named is None:
        return
    if not isinstance(named, list) or not set(map(str, named)) <= set(family.architectures):
        raise UserError(
            f"{path} has architectures={named!r}, but model_type={raw['model_type']!r}, whose are "
            f"{', '.join(family.architectures)}: they are two models; correct the one that is wrong"
        )


def _check_numbers(path: Path, raw: dict[str, Any]) -> None:
    """Raise UserError for a size that is none. Absent keys are checked elsewhere."""
    for key in SIZES:
        _check_size(path, key, raw.get(key, 1))
    if raw.get("head_dim") is not None:
        _check_size(path, "head_dim", raw["head_dim"])
    for key in ("rope_theta", "rms_norm_eps"):
        _check_positive(path, key, raw.get(key, 1.0))
    if not isinstance(raw.get("tie_word_embeddings", False), bool):
        raise UserError(
            f"{path} has tie_word_embeddings={raw['tie_word_embeddings']!r}: it has to be true or "
            "false"
        )
    heads, kv_heads = raw.get("num_attention_heads", 1), raw.get("num_key_value_heads", 1)
    if heads % kv_heads:
        raise UserError(
            f"{path} has num_attention_heads={heads}, which num_key_value_heads={kv_heads} does "
            "not divide: correct the one that is wrong"
        )


def _check_size(path: Path, key: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{path} has {key}={value!r}: it has to be a whole number from 1 up")


def _check_positive(path: Path, key: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise UserError(f"{path} has {key}={value!r}: it has to be a number above 0")


def _check_layer_types(path: Path, raw: dict[str, Any]) -> None:
    types = raw.get("layer_types") or []
    if not isinstance(types, list):
        raise UserError(f"{path} has layer_types={types!r}: it has to be a list of a layer's each")
    others = sorted({str(kind) for kind in types} - {"full_attention"})
    if others:
        raise UserError(f"{path} has layer_types {others}: only full_attention is supported")
    if types and len(types) != raw.get("num_hidden_layers", len(types)):
        raise UserError(
            f"{path} has {len(types)} layer_types, but num_hidden_layers="
            f"{raw['num_hidden_layers']}: correct the one that is wrong"
        )


def head_dim(path: Path, raw: dict[str, Any], family: Family) -> int:
    """Return the head dimension. Raises UserError where it is missing or has no two halves."""
    size = raw.get("head_dim")
    if size is None:
        if family.name == "Qwen3":
            raise UserError(f"{path} lacks the key 'head_dim'")
        size, rest = divmod(raw["hidden_size"], raw["num_attention_heads"])
        if rest:
            raise UserError(
                f"{path} has no head_dim, and num_attention_heads={raw['num_attention_heads']} "
                f"does not divide hidden_size={raw['hidden_size']}: add head_dim"
            )
    if size % 2:
        raise UserError(f"{path} has head_dim={size}: rotary positions need an even number")
    return size


def rope(path: Path, raw: dict[str, Any]) -> tuple[float, float | None]:
    """(theta, Llama 3's factor or None) of the rotary positions, as transformers 5 takes them.

    A rope_scaling that is not empty takes the place of rope_parameters as a whole; what the one
    that counts lacks of rope_theta stands beside it. Raises UserError for other kinds, and where
    two places say different things, since older readers take the other one.
    """
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        settings = raw.get(key) or {}
        if not isinstance(settings, dict):
            raise UserError(f"{path} has {key}={settings!r}: it has to be an object")
        if settings:
            found[key] = _rope_of(path, raw, key, settings)
    if len(set(found.values())) > 1:
        raise UserError(
            f"{path} has rope_scaling={json.dumps(raw['rope_scaling'])} beside rope_parameters="
            f"{json.dumps(raw['rope_parameters'])}, and they differ (transformers takes "
            "rope_scaling, with the rope_theta beside it): remove the one that the model was not "
            "made with"
        )
    if found:
        return next(iter(found.values()))
    return float(raw["rope_theta"]), None


def _rope_of(
    path: Path, raw: dict[str, Any], where: str, settings: dict[str, Any]
) -> tuple[float, float | None]:
    """(theta, Llama 3's factor or None); a theta that is nowhere is transformers' own."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(f"{path} has rope_type={kind!r}; 'default' and 'llama3' are supported")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    for key, value in settings.items():
        if key not in known and value is not None:
            raise UserError(
                f"{path} has {key}={value!r} in {where}, which rope_type={kind!r} does not read: "
                "remove it, or name the rope_type that the model was made with"
            )
    if settings.get("type", kind) != kind:
        raise UserError(
            f"{path} has rope_type={kind!r} and type={settings['type']!r} in {where}: correct the "
            "one that is wrong"
        )
    if settings.get("partial_rotary_factor", 1) not in (1, None):
        raise UserError(
            f"{path} has partial_rotary_factor={settings['partial_rotary_factor']!r} in {where}: "
            "only heads that are rotated as a whole are supported"
        )
    theta = settings.get("rope_theta", raw.get("rope_theta", _DEFAULT_THETA))
    _check_positive(path, "rope_theta", theta)
    if raw.get("rope_theta", theta) != theta:
        raise UserError(
            f"{path} has rope_theta={raw['rope_theta']!r}, but {theta!r} in {where}, which "
            "transformers takes: remove the one that the model was not made with"
        )
    return float(theta), _llama3_factor(path, raw, settings) if kind == "llama3" else None


def _llama3_factor(path: Path, raw: dict[str, Any], settings: dict[str, Any]) -> float:
    outer = "original_max_position_embeddings"
    if raw.get(outer) is not None:  # transformers lets it win
        settings = settings | {outer: raw[outer]}
    for key, value in _LLAMA3_ROPE.items():
        if settings[key] != value:
            raise UserError(
                f"{path} has {key}={settings[key]}; megatron-core computes Llama 3's rotary "
                f"embedding with {value}"
            )
    _check_positive(path, "factor", settings["factor"])
    return float(settings["factor"])


def eos_token_ids(path: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that config.json or generation_config.json calls an end; it may name none."""
    named = raw.get("eos_token_id")
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if any(type(token) is not int for token in ids):
        raise UserError(f"{path} has eos_token_id={named!r}: it has to be an id or a list of ids")
    return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder. Raises UserError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy the model again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object: copy the model again")
    return raw
