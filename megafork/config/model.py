"""The model, its tokenizer and its layout."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megafork.config.section import Positive, PositiveFloat, Section


class ModelConfig(Section):
    path: str = Field(description="HF folder of the policy (config.json and safetensors)")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the trained weights and activations"
    )
    recompute: Literal["none", "full", "selective"] = Field(
        "none", description="activation recomputation: every layer, core attention only, or none"
    )
    float32_head: bool = Field(
        False, description="keep an untied head's weight in float32 where dtype is bfloat16"
    )
    vocab_divisible_by: Positive = Field(
        128, description="the vocabulary is padded to a multiple of this times tp"
    )


class TokenizerConfig(Section):
    path: str | None = Field(
        None, description="HF folder or SentencePiece .model file; unset: model.path's tokenizer"
    )


class ParallelConfig(Section):
    tp: Positive = Field(1, description="tensor-parallel size")
    pp: Positive = Field(1, description="pipeline-parallel size")
    cp: Positive = Field(1, description="context-parallel size: ranks that share each sequence")
    vpp: Positive = Field(
        1, description="virtual pipeline: model chunks on each pipeline rank (interleaved schedule)"
    )
    dp: Positive | None = Field(
        None, description="data-parallel size; unset: 1, or what torchrun's world size leaves"
    )
    sequence_parallel: bool = Field(
        False, description="shard the activations between the tensor-parallel regions too"
    )
    pipeline_layers: tuple[Positive, ...] | None = Field(
        None, description="layers of each of the pp * vpp stages, in order; unset: an even split"
    )
    timeout_minutes: PositiveFloat = Field(
        60.0,
        description="a collective that waits longer ends the run, and so does a rank that does not "
        "come when the others wait for it",
    )

    startup_timeout_s: PositiveFloat = Field(
        300.0, description="seconds for all ranks to come to the rendezvous when a run starts"
    )

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def num_stages(self) -> int:
        """Model chunks that a token passes through, one after the other."""
        return self.pp * self.vpp

    def tokens_on_one_rank(self, length: int) -> int:
        """Slots that a sequence takes on a rank: cp ranks share it in 2 cp equal chunks."""
        return length if self.cp == 1 else 2 * -(-length // (2 * self.cp))

    @property
    def world_size(self) -> int:
        """Ranks that a plainly started command launches."""
        return self.model_parallel_size * (self.dp or 1)
