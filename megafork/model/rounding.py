"""The error that the model's dtype makes: log-probabilities of the same weights and tokens,
computed once as an engine rounds them and once in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megafork.data.packing import Pack
from megafork.data.token_table import TokenTable
from megafork.model.gpt import head_input, head_weight
from megafork.model.scorer import Scorer
from megafork.ops.vocab_parallel import logprob_and_entropy
from megafork.parallel import backend

_ROWS = 256
"""of the head's product at a time"""


def rounded_and_exact(scorer: Scorer, table: TokenTable) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens, float32 [N], in the order of `Scorer.score`.

    The first with every product in the model's dtype, the logits too, which is what an engine does
    (`Scorer.score` has float32 logits); the second with the same weights in float32. Two forward
    passes without gradients; collective; empty before the last stage.
    """
    rounded_N = _logprobs(scorer, table)
    with _in_float32(scorer):
        return rounded_N, _logprobs(scorer, table)


def _logprobs(scorer: Scorer, table: TokenTable) -> Tensor:
    def collect(pack: Pack, hidden_1TH: Tensor) -> tuple[Tensor, dict]:
        gpt = scorer.stages[-1].gpt
        rows_NH = head_input(gpt, hidden_1TH, pack.slots_N)
        weight_VH = head_weight(gpt).to(rows_NH.dtype)
        parts = []
        for rows, targets in zip(rows_NH.split(_ROWS), pack.targets_N.split(_ROWS), strict=True):
            logprobs, _ = logprob_and_entropy(
                F.linear(rows, weight_VH),
                targets,
                tp_group=scorer.mesh.groups.tp,
                temperature=scorer.temperature,
                vocab_size=scorer.shape.vocab_size,
            )
            parts.append(logprobs)
        logprobs_N = torch.cat(parts)
        return logprobs_N.sum(), {"logprobs": logprobs_N.cpu()}

    packs = scorer.packs(table)
    for module in scorer.modules:
        module.eval()
    with torch.no_grad():
        outputs = scorer.run_hidden(packs, collect, forward_only=True)
    if not scorer.mesh.is_last_stage:
        return torch.zeros(0)
    return torch.cat([output["logprobs"] for output in outputs])


@contextmanager
def _in_float32(scorer: Scorer) -> Iterator[None]:
    """Inside, a forward pass computes in float32: each layer's weights are widened while it runs.

    The weights of one layer are there twice. Under TransformerEngine, whose packed attention has
    no float32, queries, keys and values alone are rounded.
    """
    narrow: dict[torch.nn.Parameter, Tensor] = {}
    hooks = []

    def widen(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = narrow.pop(parameter)

    dtype = scorer.dtype
    config = scorer.stages[0].gpt.config
    for stage in scorer.stages:
        for name, module in stage.gpt.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.append(module.register_forward_pre_hook(widen))
                hooks.append(module.register_forward_hook(restore, always_call=True))
            if name.endswith("core_attention") and backend.has_transformer_engine():
                hooks.append(module.register_forward_pre_hook(_cast(dtype)))
                hooks.append(module.register_forward_hook(lambda _, __, output: output.float()))
    pipeline_dtype, config.pipeline_dtype = config.pipeline_dtype, torch.float32
    try:
        yield
    finally:
        config.pipeline_dtype = pipeline_dtype
        for hook in hooks:
            hook.remove()


def _cast(dtype: torch.dtype) -> Callable[[torch.nn.Module, tuple], tuple]:
    def cast(_: torch.nn.Module, inputs: tuple) -> tuple:
        return tuple(
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
        )

    return cast
