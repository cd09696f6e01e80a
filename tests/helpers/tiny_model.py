"""A small Qwen3 in plain torch, with a cache of keys and values.

R rows (sequences), P positions of each, T positions of the cache, H hidden, K key heads, D of a
head, V vocabulary. What a row computes does not depend, to the last bit, on the rows beside it:
every sum has the same number of terms whatever the batch is, and no matrix has so few rows that
torch takes another kernel for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

_FEWEST = 32
"""Rows of a matrix, from which on products are the same to the last bit: measured, 11 are enough"""

Attended = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys_RPKD, values_RPKD) -> keys and values [R, K, T, D] to attend to"""


class TinyModel:
    """The model of a Hugging Face folder, and a cache of `num_rows` for `capacity` tokens each.

    `weights` has a tensor for each name of the checkpoint; what is copied into it is used from then
    on. A tied head is no name of its own.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, num_rows: int, capacity: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        if config["architectures"] != ["Qwen3ForCausalLM"]:
            raise ValueError(f"{folder} is no Qwen3: {config['architectures']}")
        self.dtype, self.capacity = dtype, capacity
        self.vocab_size: int = config["vocab_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.eps: float = config["rms_norm_eps"]
        self.tied: bool = config["tie_word_embeddings"]
        self.weights: dict[str, Tensor] = {}
        self._fused: dict[str, Tensor] = {}
        self._load(folder)
        rope = config.get("rope_parameters") or config
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        frequencies = 1.0 / rope["rope_theta"] ** exponents
        angles = torch.arange(capacity)[:, None] * frequencies
        self._cos_TD = torch.cat([angles.cos()] * 2, -1).to(dtype)
        self._sin_TD = torch.cat([angles.sin()] * 2, -1).to(dtype)
        num_rows = max(num_rows, _FEWEST)  # what is spare computes along
        shape = (self.num_layers, num_rows, self.num_kv_heads, capacity, self.head_dim)
        self._keys, self._values = torch.zeros(2, *shape, dtype=dtype)

    def _load(self, folder: Path) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    self.weights[name] = file.get_tensor(name).to(self.dtype)
        if self.tied:
            self.weights.pop("lm_head.weight", None)
        for layer in range(self.num_layers):
            for part, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
                self._fuse([f"model.layers.{layer}.{part}.{n}_proj.weight" for n in names])

    def _fuse(self, names: list[str]) -> None:
        """One matrix for several projections; the weights of their names become views of it."""
        parts = [self.weights[name] for name in names]
        fused = self._fused[names[0]] = torch.cat(parts)
        for name, view in zip(names, fused.split([len(part) for part in parts]), strict=True):
            self.weights[name] = view

    def forget_weights(self) -> None:
        """What is sampled before all weights were copied again is NaN."""
        for weight in self.weights.values():
            weight.fill_(torch.nan)

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[Sequence[int]], rows: list[int]) -> None:
        """Compute the cache of `rows` anew, each row's from its token ids."""
        number: dict[tuple[int, ...], int] = {}
        source_R = torch.tensor([number.setdefault(tuple(i), len(number)) for i in token_ids])
        longest = max(map(len, number))
        if longest == 0:
            return
        longest = min(max(longest, _FEWEST), self.capacity)
        ids_RP = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in number])
        rows_R = torch.tensor(rows)

        def into_the_cache(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            attended = []
            for cache, fresh_RPKD in ((self._keys, keys), (self._values, values)):
                shape = (len(number), self.num_kv_heads, self.capacity, self.head_dim)
                whole_RKTD = torch.zeros(shape, dtype=self.dtype)
                whole_RKTD[:, :, :longest] = fresh_RPKD.transpose(1, 2)
                cache[layer, rows_R] = whole_RKTD[source_R]
                attended.append(whole_RKTD)
            return attended[0], attended[1]

        self._forward(ids_RP, torch.arange(longest).expand_as(ids_RP), into_the_cache)

    @torch.inference_mode()
    def decode(self, last_ids: list[int], positions: list[int]) -> Tensor:
        """[R, V]: float32 logits after the last ids of the rows 0 ... R - 1; they are cached."""
        num_rows, spare = len(positions), max(_FEWEST - len(positions), 0)
        position_R = torch.tensor([*positions, *[0] * spare])
        rows_R = torch.arange(len(position_R))

        def of_the_cache(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self._keys[layer, rows_R, :, position_R] = keys[:, 0]
            self._values[layer, rows_R, :, position_R] = values[:, 0]
            return self._keys[layer, : len(rows_R)], self._values[layer, : len(rows_R)]

        ids_RP = torch.tensor([*last_ids, *[0] * spare])[:, None]
        hidden_RH = self._forward(ids_RP, position_R[:, None], of_the_cache)[:, 0]
        head = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        return F.linear(hidden_RH, self.weights[head]).float()[:num_rows]

    def move(self, source: int, row: int) -> None:
        """Let `row` of the cache be what the row `source` is."""
        self._keys[:, row] = self._keys[:, source]
        self._values[:, row] = self._values[:, source]

    def _forward(self, ids_RP: Tensor, position_RP: Tensor, attended: Attended) -> Tensor:
        """[R, P, H]: the hidden states under the head."""
        x_RPH = self.weights["model.embed_tokens.weight"][ids_RP]
        rotation = self._cos_TD[position_RP][:, :, None], self._sin_TD[position_RP][:, :, None]
        visible_RPT = torch.arange(self.capacity) <= position_RP[..., None]
        bias_RPT = torch.zeros(visible_RPT.shape, dtype=self.dtype)
        bias_RPT.masked_fill_(~visible_RPT, -torch.inf)
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}"
            normed_RPH = self._norm(x_RPH, f"{name}.input_layernorm")
            x_RPH = x_RPH + self._attention(layer, normed_RPH, rotation, bias_RPT, attended)
            normed_RPH = self._norm(x_RPH, f"{name}.post_attention_layernorm")
            gate_up = F.linear(normed_RPH, self._fused[f"{name}.mlp.gate_proj.weight"])
            gate, up = gate_up.chunk(2, -1)
            x_RPH = x_RPH + F.linear(
                F.silu(gate) * up, self.weights[f"{name}.mlp.down_proj.weight"]
            )
        return self._norm(x_RPH, "model.norm")

    def _attention(
        self,
        layer: int,
        x_RPH: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias_RPT: Tensor,
        attended: Attended,
    ) -> Tensor:
        name = f"model.layers.{layer}.self_attn"
        rows, length, _ = x_RPH.shape
        kv_heads, dim = self.num_kv_heads, self.head_dim
        qkv = F.linear(x_RPH, self._fused[f"{name}.q_proj.weight"]).unflatten(-1, (-1, dim))
        q, k, v = qkv.split([self.num_heads, kv_heads, kv_heads], dim=2)
        q = _rotated(self._norm(q, f"{name}.q_norm"), rotation)
        k = _rotated(self._norm(k, f"{name}.k_norm"), rotation)
        keys_RKTD, values_RKTD = attended(layer, k, v)
        # The query heads of one key head are consecutive: [R, K, queries of K * P, D].
        q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        queries = q.shape[2]
        scores = q.reshape(rows, kv_heads, queries * length, dim) @ keys_RKTD.transpose(-1, -2)
        scores = scores.unflatten(2, (queries, length)) * dim**-0.5 + bias_RPT[:, None, None]
        probabilities = scores.float().softmax(-1).to(self.dtype).flatten(2, 3)
        mixed = (probabilities @ values_RKTD).unflatten(2, (queries, length))
        mixed = mixed.permute(0, 3, 1, 2, 4).flatten(2)
        return F.linear(mixed, self.weights[f"{name}.o_proj.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.eps)


def _rotated(x_RPKD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x_RPKD.chunk(2, -1)
    return x_RPKD * cos + torch.cat([-second, first], -1) * sin
