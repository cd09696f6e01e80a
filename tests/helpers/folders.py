"""Model folders that are not what their config.json says, made from one that is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
A_LAYER = "model.layers.0.mlp.up_proj.weight"


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def configure(folder: Path, **changes) -> None:
    """Change keys of config.json; None removes one, and Null is JSON's null."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    raw = {key: None if value is Null else value for key, value in raw.items() if value is not None}
    path.write_text(json.dumps(raw))


class Null:
    """JSON's null, where None means that the key is to go."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


def change(folder: Path, function) -> None:
    """`function` changes the dictionary of the folder's tensors in place."""
    tensors = tensors_of(folder)
    function(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def shard(folder: Path, num_files: int = 2) -> dict[str, str]:
    """In place of one file, several and an index; returns its weight_map."""
    tensors = tensors_of(folder)
    (folder / SINGLE).unlink()
    weight_map = {}
    for index in range(num_files):
        file = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[index::num_files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def to_fp8(folder: Path, *, told: bool = True) -> None:
    """Every matrix of the layers in FP8 with a scale for each block, as DeepSeek's and Qwen's."""

    def quantise(tensors):
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            scale = tensors[name].abs().max() / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale.float().reshape(1, 1)

    change(folder, quantise)
    if told:
        settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        configure(folder, quantization_config=settings)


def to_gptq(folder: Path, *, told: bool = True) -> None:
    """One matrix packed four bits to a value, as AutoGPTQ and AutoAWQ store them."""

    def quantise(tensors):
        rows, columns = tensors.pop(A_LAYER).shape
        stem = A_LAYER.removesuffix("weight")
        tensors[stem + "qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[stem + "scales"] = torch.ones(1, rows, dtype=torch.float16)

    change(folder, quantise)
    if told:
        (folder / "quantize_config.json").write_text('{"bits": 4}')


def to_int8(folder: Path) -> None:
    """The layers' matrices in eight bits, without a word in config.json."""
    change(folder, lambda t: t.update({A_LAYER: t[A_LAYER].to(torch.int8)}))


def add_layer(tensors) -> None:
    """A fifth layer's tensors, which config.json does not count."""
    for name in [n for n in tensors if n.startswith("model.layers.3.")]:
        tensors[name.replace("layers.3.", "layers.4.")] = tensors[name].clone()


def untie(tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][200, 3] += 1
