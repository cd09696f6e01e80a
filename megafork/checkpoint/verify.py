"""`megafork convert verify`: is a megatron-core checkpoint the same model as an HF folder?

Weights are compared bit by bit with our own streaming reader. Logits are taken from the checkpoint
as megatron-core itself loads it, in the layout that was asked for, and from transformers.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megafork.checkpoint import sharded
from megafork.checkpoint.convert import (
    check_one_dtype,
    check_stored,
    model_blocks,
    read_block,
)
from megafork.checkpoint.progress_bar import progress
from megafork.checkpoint.torch_dist import TorchDistReader
from megafork.config import ScoreConfig
from megafork.data.sample import Group, Sample
from megafork.data.token_table import TokenTable, token_table
from megafork.errors import UserError
from megafork.model.gpt import head_input, head_weight
from megafork.model.hf_folder import same_bits
from megafork.model.hf_model import open_model
from megafork.model.scorer import Scorer
from megafork.model.shape import ModelShape, padded_vocab_size
from megafork.parallel.mesh import Mesh, initialize, shutdown

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of two logits over the largest logit: what rounding makes of other kernels in
tens of layers. A wrong weight, norm or frequency makes it many times more."""
_PROMPT, _RESPONSE, _NUM_PROMPTS = 8, 24, 2


def verify(config: ScoreConfig, megatron: Path, *, logits: bool) -> bool:
    """Print one line for each check; return whether all of them held, on every rank. Collective.

    config: model.path is the HF folder, parallel the layout that megatron loads the checkpoint in.
    """
    hf = Path(config.model.path)
    table = token_table(list(_prompts(ModelShape.from_folder(hf).vocab_size)))
    difference: str | None = None
    expected: Tensor | None = None
    compare = logits and importlib.util.find_spec("transformers") is not None
    if os.environ.get("RANK", "0") == "0":
        difference = first_difference(hf, megatron)
        # Before `initialize`: what makes megatron-core run without CUDA changes torch's factories,
        # and transformers builds its models with them.
        if difference is None and compare:
            expected = _transformers_logits(config, table)
    # Rank 0 comes when it has compared, which of a large model takes longer than a start may.
    patience = {"startup_timeout_s": 60 * config.parallel.timeout_minutes}
    mesh = initialize(config.parallel.model_copy(update=patience))
    difference, expected = mesh.broadcast_object((difference, expected))
    same = "weights: every tensor has the same bits"
    lines = [(difference is None, f"weights: {difference}" if difference else same)]
    if expected is not None:
        ours = _megatron_logits(config, megatron, mesh, table)
        lines.append(compare_logits(ours, expected, config.model.dtype))
    elif logits and not compare:
        lines.append((True, "logits: not compared, for transformers is not installed"))
    else:
        lines.append((True, "logits: not compared"))
    if mesh.rank == 0:
        for held, line in lines:
            print(line if held else f"FAILED {line}", flush=True)
    shutdown()
    return all(held for held, _ in lines)


def first_difference(hf: Path, megatron: Path) -> str | None:
    """Return the first difference and its place, in the order of the layers; None without one."""
    reader = TorchDistReader(megatron)
    try:
        model = open_model(hf)
        check_one_dtype(model)
        folder, plan = model.weights, model_blocks(model.shape, hf)
        for block in plan:
            check_stored(reader, block)
    except UserError as error:
        return str(error)
    total = sum(block.num_bytes(folder.dtype(block.rule.hf[0])) for block in plan)
    with progress("verify", total) as advance:
        for block in plan:
            for name, start, stored in read_block(reader, block):
                published = folder.slice(name, 0, start, start + len(stored))
                if not same_bits(published, stored):
                    return _describe(name, start, published, stored)
                advance(stored.nbytes)
    return None


def _describe(name: str, start: int, published: Tensor, stored: Tensor) -> str:
    if published.dtype != stored.dtype or published.shape != stored.shape:
        return (
            f"{name} is {published.dtype} {list(published.shape)} in the HF folder and "
            f"{stored.dtype} {list(stored.shape)} in the checkpoint"
        )
    differs = (published != stored) | (published.isnan() & stored.isnan())
    if not differs.any():  # 0 and -0
        differs = published.signbit() != stored.signbit()
    at = tuple(int(i) for i in differs.nonzero()[0])
    where = [at[0] + start, *at[1:]]
    return (
        f"{name}{where} is {float(published[at])!r} in the HF folder and {float(stored[at])!r} in "
        "the checkpoint; it is the first tensor that differs"
    )


def compare_logits(ours: Tensor, expected: Tensor, dtype: str) -> tuple[bool, str]:
    """Return whether the logits agree as far as rounding allows, and a line that says so."""
    num_tokens, vocab_size = expected.shape
    difference = float((ours[:, :vocab_size] - expected).abs().max() / expected.abs().max())
    allowed = TOLERANCE[dtype]
    line = (
        f"logits: {num_tokens} tokens x {vocab_size}, largest difference {difference:.1e} of "
        f"the largest logit ({dtype}; allowed {allowed:.0e})"
    )
    return difference <= allowed, line  # False for NaN


def _prompts(vocab_size: int) -> Iterator[Group]:
    rng = random.Random(0)
    for index in range(_NUM_PROMPTS):
        prompt, response = (
            [rng.randrange(vocab_size) for _ in range(length)] for length in (_PROMPT, _RESPONSE)
        )
        sample = Sample(index, np.array(response), np.zeros(len(response)), truncated=False)
        yield Group(index, prompt, 0, [sample])


def _transformers_logits(config: ScoreConfig, table: TokenTable) -> Tensor:
    """[rows of the table, V] in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
    )
    parts = []
    with torch.no_grad():
        for b in range(table.num_samples):
            prompt, response = table.prompt(b), table.token_R[table.rows(b)]
            z = model(torch.cat([prompt, response]).long()[None]).logits[0]
            parts.append(z[len(prompt) - 1 : -1].float())
    return torch.cat(parts)


def _megatron_logits(config: ScoreConfig, megatron: Path, mesh: Mesh, table: TokenTable) -> Tensor:
    """[rows of the table, padded V] in float32, on every rank; NaN where none was computed."""
    scorer = Scorer(
        config.model, config.parallel, mesh, micro_batch_tokens=config.micro_batch_tokens
    )
    with torch.no_grad():
        for stage in scorer.stages:
            for parameter in stage.gpt.parameters():
                parameter.fill_(torch.nan)  # what the checkpoint does not replace will be seen
    sharded.load(megatron, scorer.stages, None, mesh)
    found: list[tuple[Tensor, Tensor]] = []
    packs_left = iter(scorer.packs(table))  # collective: every rank asks
    if mesh.is_last_stage:
        gpt = scorer.stages[-1].gpt

        def keep(_: Any, inputs: Any, hidden_1TH: Tensor) -> None:
            pack, weight = next(packs_left), head_weight(gpt)
            logits = head_input(gpt, hidden_1TH, pack.slots_N).to(weight.dtype) @ weight.T
            found.append((pack.rows_N.cpu(), logits.float().cpu()))

        gpt.register_forward_hook(keep)
    scorer.score(table)
    padded = padded_vocab_size(scorer.shape, config.model, config.parallel)
    logits = torch.full((table.num_rows, padded), torch.nan)
    for tp_rank, parts in mesh.all_gather_object((mesh.tp_rank, found)):
        for rows, values in parts:
            start = tp_rank * values.shape[1]
            logits[rows, start : start + values.shape[1]] = values
    return logits
