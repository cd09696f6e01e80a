"""megatron-core's distributed data parallelism and AdamW, set up for exact loss scaling.

The loss of every micro-batch arrives divided by the global token count, so gradients are plainly
summed: no averaging over data-parallel ranks, no division by token or micro-batch counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.transformer.module import Float16Module

from megafork.config import TrainingConfig
from megafork.parallel import backend
from megafork.parallel.mesh import Mesh


def wrap_data_parallel(stages: Sequence[GPTModel], mesh: Mesh) -> list[DistributedDataParallel]:
    """Each stage in megatron's DDP: contiguous float32 gradient buffers, sharded optimizer."""
    overlap = backend.has_cuda()
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        average_in_collective=False,
    )
    shared = stages[0].config
    wrapped = [
        DistributedDataParallel(
            shared,
            config,
            _BFloat16Module(gpt) if shared.bf16 else gpt,
            pg_collection=mesh.groups,
        )
        for gpt in stages
    ]
    if overlap:
        no_sync = [ddp.no_sync for ddp in wrapped]
        shared.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    shared.finalize_model_grads_func = partial(_finalize, groups=mesh.groups)
    return wrapped


class _BFloat16Module(Float16Module):
    """megatron's wrapper, without two of its casts.

    It casts every parameter; one that was built in float32 stays it. And it casts the output; the
    head takes the hidden states as they are, for a product that is float32 anyway.
    """

    def __init__(self, gpt: GPTModel) -> None:
        float32 = {p: p.detach().clone() for p in gpt.parameters() if p.dtype == torch.float32}
        super().__init__(gpt.config, gpt)
        for parameter, value in float32.items():
            parameter.data = value

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **kwargs)


def _finalize(model, num_tokens=None, pg_collection=None, force_all_reduce=False, *, groups):
    """megatron's reductions without its division by `num_tokens`: the loss is scaled already."""
    finalize_model_grads(model, None, pg_collection=groups, force_all_reduce=force_all_reduce)


def build_optimizer(
    stages: Sequence[DistributedDataParallel], training: TrainingConfig
) -> MegatronOptimizer:
    """AdamW with global-norm clipping; 1-D tensors (norms) form a group without weight decay."""
    dtype = stages[0].config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.grad_clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, list(stages))


def gradient_buffers(stages: Sequence[DistributedDataParallel]) -> Iterator[torch.Tensor]:
    """The flat tensors that all gradients of this rank are views of."""
    for ddp in stages:
        for buffer in ddp.buffers + ddp.expert_parallel_buffers:
            yield buffer.grad_data


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Main parameters and what the inner optimizers keep of each."""
    chained = isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers if chained else [optimizer]:
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for kept in part.optimizer.state.values():
            yield from (value for value in kept.values() if isinstance(value, torch.Tensor))


def set_hyperparameters(
    optimizer: MegatronOptimizer, training: TrainingConfig, num_updates: int
) -> None:
    """Learning rate and weight decay of the next update. `num_updates`: updates already made.

    megatron marks norms with wd_mult 0 and leaves it to the caller to apply the factor.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(training, num_updates)
        group["weight_decay"] = training.weight_decay * group["wd_mult"]


def learning_rate(training: TrainingConfig, num_updates: int) -> float:
    """Linear warm-up from lr / warmup_steps, then constant."""
    return training.lr * min(1.0, (num_updates + 1) / max(training.warmup_steps, 1))
