"""Small folders to convert, and what must come back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from megafork.checkpoint.convert import hf_to_megatron, megatron_to_hf
from tests.helpers import reference

FILE_BYTES = 100_000  # four or five files for each of these models


LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2-pp2": {"tp": 2, "pp": 2}}


def make(path, architecture="qwen3", tied=False, dtype=torch.bfloat16):
    return reference.save_model(path, tied=bool(tied), architecture=architecture, dtype=dtype)


def to_megatron(source, target):
    hf_to_megatron(source, target, max_file_bytes=FILE_BYTES)
    return target


def to_hf(source, target, like=None):
    megatron_to_hf(source, target, like=like, max_file_bytes=FILE_BYTES)
    return target


def read_all(folder):
    return {
        name: tensor
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(before, after):
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
