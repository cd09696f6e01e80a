"""How much there is to compute: lengths of responses, parameters, FLOPs. Pure arithmetic.

A product of [m, k] and [k, n] is 2 m k n FLOPs. Norms, rotary embedding, SwiGLU's elementwise part
and softmax are left out, as everywhere: they are bound by memory, and part of the efficiencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megafork.errors import UserError
from megafork.model.shape import ModelShape


@dataclass(frozen=True)
class Lengths:
    """Response lengths: exponential, cut at the longest, with this mean after the cut.

    One parameter, a long tail, and a mass at the cut: what reasoning models' responses look like
    when nothing but their mean is known.
    """

    prompt: int
    mean: float
    longest: int

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise UserError(
                f"rollout.max_response_tokens={self.longest} leaves no length to plan with: raise "
                "it to 2 or more"
            )
        if not 1 <= self.mean < self.longest:
            raise UserError(
                f"a mean response of {self.mean:g} tokens does not fit responses of 1 to "
                f"rollout.max_response_tokens={self.longest}: give one between them"
            )

    def responses(self, count: int) -> list[int]:
        """`count` lengths at evenly spaced quantiles, ascending; their mean is `mean`."""
        scale = self._scale()
        quantiles = ((i + 0.5) / count for i in range(count))
        return [
            min(self.longest, max(1, round(-scale * math.log1p(-quantile))))
            for quantile in quantiles
        ]

    def _scale(self) -> float:
        """Of the exponential s with mean(min(s, longest)) = s (1 - exp(-longest / s)) = mean."""
        low, high = self.mean, self.longest * 1e4
        for _ in range(100):
            middle = (low + high) / 2
            if -middle * math.expm1(-self.longest / middle) < self.mean:
                low = middle
            else:
                high = middle
        return low


def layer_parameters(shape: ModelShape) -> int:
    """Of one layer's matrices (norms and biases are negligible)."""
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (query + 2 * key) + query * shape.hidden_size
    return attention + 3 * shape.hidden_size * shape.intermediate_size


def num_parameters(shape: ModelShape) -> int:
    """Of the whole model's matrices, embedding and head included."""
    vocabulary = shape.vocab_size * shape.hidden_size
    return shape.num_layers * layer_parameters(shape) + vocabulary * (2 - shape.tied_embeddings)


def matrix_flops(shape: ModelShape, num_tokens: float) -> float:
    """Forward through one layer's matrices."""
    return 2.0 * layer_parameters(shape) * num_tokens


def attention_flops(shape: ModelShape, sum_of_squares: float) -> float:
    """Forward through one layer's causal attention: scores and their product with the values.

    sum_of_squares: of the lengths of the sequences. A causal kernel does half of the square.
    """
    return 2.0 * shape.num_heads * shape.head_dim * sum_of_squares


def head_flops(shape: ModelShape, num_rows: float) -> float:
    """Forward through the head."""
    return 2.0 * shape.vocab_size * shape.hidden_size * num_rows


def kv_bytes_per_token(shape: ModelShape, bytes_per_value: int) -> int:
    """Keys and values of all layers, on all of a server's GPUs together."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * bytes_per_value
