"""Small random models and what plain transformers and torch say about them.

Nothing here uses megafork's model, packing, selection or loss: one sequence at a time, full
logits, autograd, sorting.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from megafork.data.sample import Group, Sample
from tests.helpers import reference

VOCAB = 251  # not a multiple of anything: megatron pads it
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ARCHITECTURES = {
    "qwen3": (Qwen3Config, {"head_dim": 32, "rope_theta": 1e6}),  # not hidden / heads
    "qwen2": (Qwen2Config, {"rope_theta": 1e6}),
    # Of the 16 rotary frequencies some are stretched, one or two smoothed, some left alone.
    "llama": (
        LlamaConfig,
        {
            "head_dim": 32,
            "max_position_embeddings": 16384,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
}


def save_model(
    folder: Path,
    *,
    tied: bool,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 4,
    kv_heads: int = 2,
    architecture: str = "qwen3",
    **sizes: int,
) -> Path:
    """A random model with GQA (and, as its architecture has it, QK-norm or biases of q, k and v);
    weights big enough to give uneven entropies. kv_heads: TP divides them, 4 is no GQA. sizes: of
    the config, where they are to be others."""
    config_class, settings = ARCHITECTURES[architecture]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    config = config_class(**(common | settings | sizes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                parameter.mul_(4.0)  # once for a tied pair: it is one parameter
    model.save_pretrained(folder)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def response_logits(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]
) -> Tensor:
    """[len(response), V]: the logits that each response token was drawn from."""
    ids = torch.tensor([[*prompt, *response]])
    return model(ids).logits[0, len(prompt) - 1 : -1]


def logprobs_and_entropies(logits: Tensor, response: Sequence[int]) -> tuple[Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0], entropies


def make_groups(
    num_groups: int, group_size: int, *, seed: int = 0, longest: int = 12
) -> list[Group]:
    """Random prompts and responses with rewards 0 and 1; no logic shared with the project."""
    rng = random.Random(seed)
    groups = []
    for index in range(num_groups):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randrange(2, 9))]
        samples = []
        for i in range(group_size):
            response = [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, longest))]
            reward = float(rng.random() < 0.5)
            logprobs = [-rng.random() for _ in response]
            uid = index * group_size + i
            samples.append(Sample(uid, response, logprobs, False, reward, reward))
        groups.append(Group(index, prompt, 1, samples))
    return groups


def top_threshold(entropies: Tensor, rho: float) -> float:
    ordered = entropies.sort(descending=True).values
    return float(ordered[math.ceil(rho * len(ordered) - 1e-9) - 1])


def near(folder, output, seed=8):
    """A model that differs from the one in `folder` by a few percent of each weight."""
    model = reference.load_model(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(output)
    return output
