"""An optimizer batch, its exact forking mask and the gradient that follows, in one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import reference

RESPONSES, PROMPT, LONGEST, RHO = 16, 5, 48, 0.2
RANKS = (1, 2)
MICRO_BATCHES = (1, 2, 4)


def whole_batch() -> dict[str, Tensor]:
    """The columns that TRL's loss reads, of all ranks, and the index of each response."""
    draw = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, LONGEST + 1, (RESPONSES,), generator=draw)
    return {
        "index": torch.arange(RESPONSES),
        "prompt_ids": torch.randint(2, 60, (RESPONSES, PROMPT), generator=draw),
        "prompt_mask": torch.ones(RESPONSES, PROMPT, dtype=torch.int64),
        "completion_ids": torch.randint(2, 60, (RESPONSES, LONGEST), generator=draw),
        "completion_mask": (torch.arange(LONGEST) < lengths[:, None]).long(),
        "advantages": torch.randn(RESPONSES, generator=draw),
    }


def exact_step(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The top RHO of all loss tokens by a sort, and the gradient on them, in float64.

    At the first update every ratio is 1: the loss is -1/N times the sum of A log pi over the mask,
    N all loss tokens (TRL's "dapo").
    """
    batch, model = whole_batch(), reference.load_model(folder / "model", torch.float64)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    logprobs = model(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    entropies = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    loss_mask = batch["completion_mask"].bool()
    mask = loss_mask & (entropies >= reference.top_threshold(entropies[loss_mask], RHO))
    chosen = logprobs.gather(-1, batch["completion_ids"][..., None])[..., 0]
    (-(batch["advantages"][:, None] * chosen * mask).sum() / loss_mask.sum()).backward()
    return mask, {name: parameter.grad for name, parameter in model.named_parameters()}
