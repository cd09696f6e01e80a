"""The policy as a megatron-core GPTModel that stops before the head.

The last stage returns hidden states instead of logits: the loss decides which rows the head runs
on, and takes log-probabilities and entropies from the vocabulary shards (ops/vocab_parallel.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.model.layers import PackedAttention, RMSNorm
from megafork.model.shape import ModelShape, padded_vocab_size
from megafork.parallel import backend
from megafork.parallel.mesh import Mesh

Head = Literal["vocabulary", "value"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HiddenStatesHead(ColumnParallelLinear):
    """Owns the head's weight under megatron's name; forward hands the hidden states through."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: Any = None
    ) -> tuple[Tensor, None]:
        return input_, None


class ValueHead(torch.nn.Module):
    """A critic's head: one number for each hidden state. Whole on every tp rank, always float32.

    Zero until it is loaded or learnt, so that no layout starts with other values. forward hands
    the hidden states through, as HiddenStatesHead does.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: Any = None
    ) -> tuple[Tensor, None]:
        return input_, None

    def values(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N]"""
        return F.linear(hidden_NH.float(), self.weight, self.bias)[:, 0]


def build_chunks(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    head: Head = "vocabulary",
) -> list[GPTModel]:
    """This rank's pipeline stages (vpp of them), on its device, parameters not yet loaded."""
    config = transformer_config(shape, model, parallel)
    refuse_unsafe_sends(config)
    return [
        _build_stage(index, config, shape, model, parallel, mesh, head)
        for index in range(parallel.vpp)
    ]


def _build_stage(
    chunk: int,
    config: TransformerConfig,
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    head: Head,
) -> GPTModel:
    stage = chunk * mesh.pp_size + mesh.pp_rank
    is_last = stage == parallel.num_stages - 1
    num_layers = len(shape.stage_layers(parallel)[stage])
    vocab_size, tied = padded_vocab_size(shape, model, parallel), shape.tied_embeddings
    if head == "value":
        # GPTModel builds a vocabulary head in any case. On the embedding's own stage a tied one
        # holds nothing; on another stage it is one row for each rank.
        tied = stage == 0 and is_last
        vocab_size = vocab_size if stage == 0 else parallel.tp
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(num_layers, qk_norm=shape.qk_norm),
        vocab_size=vocab_size,
        max_sequence_length=shape.max_positions,
        pre_process=stage == 0,
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_factor is not None,
        rope_scaling_factor=shape.rope_factor or 1.0,
        pg_collection=mesh.groups,
        vp_stage=chunk if parallel.vpp > 1 else None,
    )
    if is_last and head == "value":
        gpt.output_layer = ValueHead(shape.hidden_size)
        gpt.share_embeddings_and_output_weights = False
    elif is_last:
        # The layer is built (weight, tying, sharding attributes) by GPTModel; only its forward
        # changes. Replacing the module would lose the attributes, copying _postprocess would
        # break with every release.
        gpt.output_layer.__class__ = HiddenStatesHead
        if model.float32_head:
            gpt.output_layer.float()
    return gpt.to(mesh.device)


def head_weight(gpt: GPTModel) -> Tensor:
    """This rank's [V/tp, H] shard of the head on the last stage (the embedding's when tied)."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


def head_input(gpt: GPTModel, hidden_1TH: Tensor, slots_N: Tensor) -> Tensor:
    """[N, H], the same on all tp ranks: the wanted rows of the last stage's output.

    slots_N: ascending. Under sequence parallelism the output is [1, T/tp, H]; each rank takes the
    wanted rows of its part, padded to the largest number that any rank has, and only those are
    gathered. For heads whose gradient of the rows is whole on every tp rank, as that of
    linear_logprob_and_entropy (summed over the vocabulary shards) and of ValueHead: backward it is
    split and not reduced again.
    """
    if not gpt.config.sequence_parallel:
        return hidden_1TH[0][slots_N]
    group, length = gpt.pg_collection.tp, hidden_1TH.shape[1]
    holder_N = slots_N // length
    counts = torch.bincount(holder_N, minlength=group.size())
    longest = max(1, int(counts.max()))
    own = slots_N[holder_N == group.rank()] - group.rank() * length
    padded = F.pad(hidden_1TH[0][own], (0, 0, 0, longest - len(own)))
    gathered = gather_from_sequence_parallel_region(
        padded, tensor_parallel_output_grad=False, group=group
    )
    first = holder_N * longest - (counts.cumsum(0) - counts)[holder_N]
    return gathered[first + torch.arange(len(slots_N), device=slots_N.device)]


def transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """Return the HF shape and our settings as megatron-core's config."""
    dtype = DTYPES[model.dtype]
    on_gpu, te = backend.has_cuda(), backend.has_transformer_engine()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        # Packs differ in length, so stages tell each other the shape. Dense models are allowed
        # to only with this dispatcher, which they never use.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The loss comes divided by the global token count already (trainer/policy.py).
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=te,
        apply_rope_fusion=te,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=False,
        **_optional_settings(model, parallel),
    )


def refuse_unsafe_sends(config: TransformerConfig) -> None:
    """Raise ValueError for a virtual pipeline with batched sends.

    With them the interleaved schedule of two ranks mixes up neighbours, without an error.
    """
    virtual = (config.virtual_pipeline_model_parallel_size or 1) > 1
    if virtual and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        raise ValueError(
            f"a virtual pipeline with batch_p2p_comm={config.batch_p2p_comm} and overlap_p2p_comm="
            f"{config.overlap_p2p_comm} computes wrong values: use False and True"
        )


def _optional_settings(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return megatron-core's settings for recomputation and pipeline, where they are asked for."""
    optional: dict[str, Any] = {}
    if model.recompute != "none":
        optional["recompute_granularity"] = model.recompute
    if model.recompute == "full":
        optional |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.vpp > 1:
        optional |= {
            "virtual_pipeline_model_parallel_size": parallel.vpp,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    if parallel.pipeline_layers is not None:
        layout = [["decoder"] * n for n in parallel.pipeline_layers]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
        optional["pipeline_model_parallel_layout"] = layout
    return optional


def _block_spec(num_layers: int, *, qk_norm: bool) -> TransformerBlockSubmodules:
    if backend.has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    _plug_in_own_layers(layer, qk_norm=qk_norm)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _plug_in_own_layers(layer: ModuleSpec, *, qk_norm: bool) -> None:
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedAttention
