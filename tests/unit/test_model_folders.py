"""Folders that are not what would be computed are refused, and every key of a config is decided."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.configuration_utils import PreTrainedConfig

from megafork.errors import UserError
from megafork.model.hf_config import FAMILIES, ignored_keys, known_keys
from megafork.model.hf_model import check_folder, open_model
from megafork.model.shape import ModelShape
from tests.helpers import folders, reference
from tests.helpers.folders import A_LAYER, INDEX, SINGLE, Null, change, configure

LLAMA3 = reference.LLAMA3_ROPE
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A new copy of a sound model folder, by architecture and tied; made once, read-only."""
    made = {}

    def sound(tmp_path, architecture="qwen3", tied=False):
        key = architecture, tied
        if key not in made:
            target = tmp_path_factory.mktemp("sound") / "m"
            made[key] = reference.save_model(target, tied=tied, architecture=architecture)
        return folders.copy(made[key], tmp_path / "m")

    return sound


def configured(**changes):
    return lambda folder: configure(folder, **changes)


def changed(function):
    return lambda folder: change(folder, function)


def added(name, *shape, dtype=torch.float32):
    return changed(lambda t: t.update({name: torch.zeros(shape, dtype=dtype)}))


def with_file(name, content="{}"):
    return lambda folder: (folder / name).write_text(content)


def sharded(act):
    """`act` has (folder, weight_map) of a folder in two files and may change either."""
    return lambda folder: act(folder, folders.shard(folder))


REFUSED = {
    # quantised, or another's weights
    "fp8": (folders.to_fp8, "quantization_config=.*use the model that was not quantised"),
    "fp8 untold": (lambda f: folders.to_fp8(f, told=False), "F8_E4M3.*not quantised"),
    "scales of fp8": (added(A_LAYER + "_scale_inv", 1, 1), "weight_scale_inv: quantised"),
    "int8": (folders.to_int8, "up_proj.weight is of type I8"),
    "gptq": (folders.to_gptq, "holds quantize_config.json: quantised"),
    "gptq untold": (lambda f: folders.to_gptq(f, told=False), "is of type I32"),
    "dtype": (configured(dtype="float8_e4m3fn"), "dtype='float8_e4m3fn'"),
    "torch_dtype": (configured(dtype=None, torch_dtype="int8"), "torch_dtype='int8'"),
    "compressed": (configured(compression_config={"format": "int"}), "compression_config="),
    "adapter": (with_file("adapter_config.json"), "adapter_config.json: .*merge_and_unload"),
    "lora": (added("base_model.model.layers.0.lora_A.weight", 2), "lora_A.weight: quantised weig"),
    # tensors
    "extra layer": (changed(folders.add_layer), "holds 11 tensors .* model.layers.4."),
    "bias": (added("model.layers.1.self_attn.o_proj.bias", 64), "1 tensors .*o_proj.bias first"),
    "missing": (changed(lambda t: t.pop(A_LAYER)), "no tensor " + A_LAYER),
    "no head": (changed(lambda t: t.pop("lm_head.weight")), "no tensor lm_head.weight"),
    "a critic's head": (added("score.weight", 1, 64), "1 tensors .* score.weight"),
    "frequencies": (
        added("model.layers.0.self_attn.rotary_emb.inv_freq", 16),
        "inv_freq is not what config.json's rope_theta=1e.06 makes of head_dim=32",
    ),
    # files
    "stale single": (
        sharded(lambda f, m: (f / SINGLE).write_bytes((f / min(m.values())).read_bytes())),
        "model.safetensors beside model.safetensors.index.json",
    ),
    "stale shard": (
        sharded(
            lambda f, m: (f / "model-3.safetensors").write_bytes((f / min(m.values())).read_bytes())
        ),
        "holds model-3.safetensors, which model.safetensors.index.json does not name",
    ),
    "another beside the single": (
        lambda f: (f / "consolidated.safetensors").write_bytes((f / SINGLE).read_bytes()),
        "holds consolidated.safetensors, beside model.safetensors",
    ),
    "missing file": (
        sharded(lambda f, m: (f / min(m.values())).unlink()),
        "00001-of-00002.* cannot be read",
    ),
    "index says another file": (
        sharded(lambda f, m: folders.write_index(f, m | {A_LAYER: _other(m, A_LAYER)})),
        f"says that {A_LAYER} is in .*, but it is in",
    ),
    "index names what is not there": (
        sharded(lambda f, m: folders.write_index(f, m | {"model.x": min(m.values())})),
        "says that model.x is in .*, but it is not there",
    ),
    "index leaves out": (
        sharded(lambda f, m: folders.write_index(f, {n: v for n, v in m.items() if n != A_LAYER})),
        f"holds {A_LAYER}, which {INDEX} does not name",
    ),
    "in two files": (
        sharded(lambda f, m: _twice(f, m)),
        "norm.weight is in model-0000.* and in model-0000",
    ),
    "no weight_map": (
        sharded(lambda f, m: (f / INDEX).write_text('{"metadata": {}}')),
        "has no weight_map",
    ),
    "empty weight_map": (sharded(lambda f, m: folders.write_index(f, {})), "has no weight_map"),
    "a list": (sharded(lambda f, m: folders.write_index(f, [1])), "has no weight_map"),
    "index of another folder": (
        sharded(lambda f, m: folders.write_index(f, m | {"x": "../m/model.safetensors"})),
        "names '../m/model.safetensors', which is no file of its folder",
    ),
    "index is no JSON": (sharded(lambda f, m: (f / INDEX).write_text("{")), "is not valid JSON"),
    # keys
    "softcap": (configured(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    "logit scale": (configured(logit_scale=0.5), "logit_scale=0.5"),
    "multiplier": (configured(embedding_multiplier=12), "embedding_multiplier=12"),
    "mlp_bias": (configured(mlp_bias=True), "mlp_bias=True"),
    "a word for a bool": (configured(attention_bias="false"), "attention_bias='false'"),
    "partial": (configured(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "experts": (configured(num_experts=8), "num_experts=8"),
    "not causal": (configured(is_causal=False), "is_causal=False"),
    "by layer": (configured(per_layer_config={"0": {"head_dim": 16}}), "per_layer_config="),
    "nested": (configured(text_config={"tie_word_embeddings": True}), "text_config="),
    "architecture": (configured(architectures=["Qwen3MoeForCausalLM"]), "'Qwen3MoeForCausalLM'"),
    "layers": (configured(layer_types=["full_attention"]), "1 layer_types, but num_hidden_layers"),
    "mixed layers": (
        configured(layer_types=["full_attention", "sliding_attention"] * 2),
        "sliding_attention",
    ),
    "tie": (configured(tie_word_embeddings="false"), "tie_word_embeddings='false'"),
    "eps": (configured(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6'"),
    "infinite": (configured(rms_norm_eps=float("inf")), "rms_norm_eps=inf"),
    "head_dim": (configured(head_dim=64), r"q_norm.weight has shape \[32\], .*\[64\]"),
    "odd head_dim": (configured(head_dim=31), "head_dim=31: rotary"),
    "no head_dim": (configured(head_dim=0), "head_dim=0: it has to be"),
    "groups": (configured(num_key_value_heads=3), "num_key_value_heads=3 does not divide"),
    "ends": (configured(eos_token_id="<eos>"), "eos_token_id='<eos>'"),
    # rotary positions
    "yarn": (configured(rope_scaling=YARN), "rope_type='yarn'"),
    "old yarn": (configured(rope_scaling={"type": "yarn", "factor": 2.0}), "rope_type='yarn'"),
    "linear": (configured(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type='linear'"),
    "no type": (configured(rope_scaling={"factor": 2.0}), "factor=2.0 in rope_scaling"),
    "two types": (
        configured(rope_parameters={"type": "linear", "rope_type": "default", "rope_theta": 1e6}),
        "rope_type='default' and type='linear'",
    ),
    "two ropes": (configured(rope_scaling=LLAMA3), "rope_scaling=.* beside .* differ"),
    "another theta": (
        configured(rope_scaling={"rope_type": "default", "rope_theta": 5e5}),
        "and they differ",
    ),
    "theta of the other": (configured(rope_scaling={"rope_type": "default"}), "and they differ"),
    "theta twice": (configured(rope_theta=5e5), "rope_theta=500000.0, but 1000000.0 in rope_para"),
    "theta is a word": (
        configured(rope_parameters={"rope_type": "default", "rope_theta": "1e6"}),
        "rope_theta='1e6'",
    ),
    "partial inside": (
        configured(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.25}),
        "partial_rotary_factor=0.25 in rope_parameters",
    ),
    "rope by layer": (
        configured(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        "full_attention=.* in rope_parameters",
    ),
    "no object": (configured(rope_scaling="yarn"), "rope_scaling='yarn'"),
    "original positions": (
        configured(rope_parameters=LLAMA3, original_max_position_embeddings=4096),
        "original_max_position_embeddings=4096; megatron-core computes",
    ),
}


def _other(weight_map, name):
    return next(file for file in weight_map.values() if file != weight_map[name])


def _twice(folder, weight_map):
    name = "model.norm.weight"
    target = folder / _other(weight_map, name)
    tensors = folders.load_file(target) | {name: torch.ones(64)}
    folders.save_file(tensors, target)


@pytest.mark.parametrize("variant", REFUSED)
def test_what_is_not_computed_is_refused(tmp_path, folder_of, variant):
    make, message = REFUSED[variant]
    folder = folder_of(tmp_path)
    open_model(folder)
    make(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"sliding_window": 64}, "sliding_window=64"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"qkv_bias": True}, "qkv_bias=True"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias=False"),
        ("qwen2", {"qk_norm": True}, "qk_norm=True"),
        ("llama", {"num_attention_heads": 3, "head_dim": None}, "does not divide"),
        ("qwen2", {"model_type": "llama"}, "architectures=.*'Qwen2ForCausalLM'.*'llama'"),
    ],
)
def test_what_is_not_computed_of_a_family_is_refused(
    tmp_path, folder_of, architecture, changes, message
):
    folder = folder_of(tmp_path, architecture)
    configure(folder, **changes)
    with pytest.raises(UserError, match=message):
        open_model(folder)


def test_a_tied_head_may_be_repeated_and_not_changed(tmp_path, folder_of):
    folder = folder_of(tmp_path, tied=True)
    assert open_model(folder).copies == {}
    repeat = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})  # noqa: E731
    change(folder, repeat)
    assert open_model(folder).copies == {"lm_head.weight": "model.embed_tokens.weight"}
    assert open_model(folder, value_head=True).copies == open_model(folder).copies
    change(folder, folders.untie)
    for value_head in (False, True):
        with pytest.raises(UserError, match=r"ties the head .* lm_head.weight and .* differ"):
            open_model(folder, value_head=value_head)
    change(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
    with pytest.raises(UserError, match=r"ties the head .* differ"):
        open_model(folder)


def test_a_critic_has_its_own_head_or_the_vocabulary_s(tmp_path, folder_of):
    folder = folder_of(tmp_path)
    open_model(folder, value_head=True)
    change(folder, lambda t: t.update({"score.weight": torch.zeros(1, 64)}))
    open_model(folder, value_head=True)
    change(folder, lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 64)}))
    with pytest.raises(UserError, match=r"1 tensors .* v_head\.summary\.weight"):
        open_model(folder, value_head=True)


def test_what_has_no_effect_is_accepted(tmp_path, folder_of):
    folder = folder_of(tmp_path)
    configure(
        folder,
        quantization_config=Null, rope_scaling=Null, layer_types=Null, sliding_window=4096,
        partial_rotary_factor=1.0, mlp_bias=False, is_causal=True, torch_dtype="float16",
        use_mrope=False, original_max_position_embeddings=64,
    )  # fmt: skip
    model = open_model(folder)
    assert (model.shape, model.ignored) == (ModelShape.from_folder(folder), [])
    same = {"type": "default", "rope_theta": 1e6}
    configure(folder, rope_scaling=same, rope_theta=1e6)  # said twice
    assert open_model(folder).shape == model.shape
    folders.shard(folder)
    assert open_model(folder).shape == model.shape


def test_stored_frequencies_are_accepted_where_they_are_the_config_s(tmp_path, folder_of):
    """Folders of 2023 have them, in half precision."""
    folder = folder_of(tmp_path, "qwen3")
    inverse = 1e6 ** -(torch.arange(0, 32, 2) / 32)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        change(folder, lambda t, d=dtype: t.update({name: inverse.to(d)}))
        open_model(folder)
    configure(folder, rope_parameters={"rope_type": "default", "rope_theta": 9e5})
    with pytest.raises(UserError, match="inv_freq is not what"):
        open_model(folder)


def test_what_is_ignored_is_named(tmp_path, folder_of, capsys):
    folder = folder_of(tmp_path)
    capsys.readouterr()  # transformers may just have written the folder, with a progress bar
    check_folder(folder)
    assert capsys.readouterr().err == ""
    configure(folder, attention_dropout=0.1, auto_map={"AutoModel": "x.Y"}, foo=3, bar=Null)
    (folder / "pytorch_model.bin").touch()
    check_folder(folder, setting="kl.reference")
    assert capsys.readouterr().err == (
        f'note: kl.reference={folder}: ignored: attention_dropout=0.1, auto_map={{"AutoModel": '
        '"x.Y"}, foo=3, pytorch_model.bin\n'
    )


# ---- every key ----


def legacy_keys():
    """Those that transformers' configs take beside their fields, by their code."""
    sources = (transformers.configuration_utils, transformers.modeling_rope_utils)
    text = "".join(Path(module.__file__).read_text() for module in sources)
    return set(re.findall(r"kwargs\.(?:pop|get)\(\s*\"(\w+)\"", text))


NOT_OF_A_FILE = {
    *("_from_auto", "_from_pipeline", "cache_dir", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token", "trust_remote_code", "use_auth_token", "resume_download"),
    *("user_agent", "variant", "gguf_file", "_configuration_file", "return_unused_kwargs"),
    *("repo_id", "commit_message", "push_to_hub", "config_file_name"),
}
"""Arguments of from_pretrained and save_pretrained"""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_decided(family):
    config = transformers.AutoConfig.for_model(family)
    assert type(config).__name__ == f"{FAMILIES[family].name}Config"
    keys = {field.name for field in dataclasses.fields(type(config))} | set(config.to_dict())
    assert len(keys) > 30 and "rope_parameters" in keys
    assert isinstance(config, PreTrainedConfig)
    found = keys | (legacy_keys() - NOT_OF_A_FILE)
    assert {"torch_dtype", "rope_scaling", "per_layer_config"} <= found
    assert sorted(found - known_keys(FAMILIES[family])) == []


VLLM = Path(transformers.__file__).parents[1] / "vllm" / "model_executor" / "models"
NOT_A_KEY = {
    "get_text_config",
    "cache_config",
    "model_config",
    "quant_config",
    "target_layer_count",
}


@pytest.mark.skipif(not VLLM.is_dir(), reason="vLLM is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_vllm_reads_is_decided(family):
    text = (VLLM / f"{family}.py").read_text()
    found = set(re.findall(r"(?<![\w.])(?:self\.)?config\.([a-z]\w*)", text))
    found |= set(re.findall(r"getattr\(\s*(?:self\.)?(?:hf_)?config,\s*\"(\w+)\"", text))
    assert {"hidden_act", "rms_norm_eps"} <= found
    assert sorted(found - known_keys(FAMILIES[family]) - NOT_A_KEY) == []


def test_an_unknown_key_is_named_in_every_family():
    for family in FAMILIES.values():
        assert ignored_keys(family, {"new_key": 0.5, "hidden_size": 64, "other": None}) == [
            "new_key=0.5"
        ]
