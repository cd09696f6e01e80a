"""The masks of TRL's trainer and of ours for it: `python -m tests.helpers.trl_masks FOLDER STEPS`.

With TRL on the path, alone or under torchrun. FOLDER has a model; the optimizer batch is always the
same 16 responses, split over the ranks and over STEPS micro-batches. Rank 0 writes
FOLDER/masks.pt: {trainer's name: bool [16, tokens]}, and the entropies and loss mask of all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from examples.own_trainer.trl_trainer import ForkingGRPOTrainer
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART

RESPONSES, PROMPT, LONGEST, RHO = 16, 5, 12, 0.2


def whole_batch() -> dict[str, torch.Tensor]:
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


def masks_of(kind: type[GRPOTrainer], folder: Path, steps: int) -> torch.Tensor:
    """The mask of each response in one optimizer step, over all ranks, by the trainer's own way."""
    prompts = Dataset(InMemoryTable.from_pydict({"prompt": ["a"] * 64}), fingerprint="prompts")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = kind(
        model=reference.load_model(folder / "model"),
        reward_funcs=lambda **_: [0.0],
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            max_completion_length=LONGEST,
            per_device_train_batch_size=RESPONSES // steps // ranks,
            gradient_accumulation_steps=steps,
            num_generations=2,
            top_entropy_quantile=RHO,
        ),
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(QUICKSTART / "model"),
    )
    share = RESPONSES // ranks
    own = slice(trainer.accelerator.process_index * share, None)
    batch = {name: column[own][:share] for name, column in whole_batch().items()}
    trainer._generate_and_score_completions = lambda _: batch
    trainer.model.train()
    found = torch.zeros(RESPONSES, LONGEST, dtype=torch.int64)
    for _ in range(steps):
        inputs = trainer._prepare_inputs({})
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            _, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, attention, LONGEST, compute_entropy=True
            )
        mask = trainer.get_high_entropy_mask(entropies, inputs["completion_mask"], 1 - RHO)
        found[inputs["index"]] = mask.long()
        trainer._step += 1
    if dist.is_initialized():
        dist.all_reduce(found)
    return found.bool()


def exact_mask(folder: Path) -> torch.Tensor:
    """The top RHO of all loss tokens' entropies, sorted in one process."""
    batch, model = whole_batch(), reference.load_model(folder / "model")
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    with torch.no_grad():
        logits = model(ids).logits[:, PROMPT - 1 : -1].double()
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    loss_mask = batch["completion_mask"].bool()
    return loss_mask & (entropies >= reference.top_threshold(entropies[loss_mask], RHO))


def main(folder: Path, steps: int) -> None:
    kinds = {"TRL": GRPOTrainer, "megafork": ForkingGRPOTrainer}
    masks = {name: masks_of(kind, folder, steps) for name, kind in kinds.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(masks | {"exact": exact_mask(folder)}, folder / "masks.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
