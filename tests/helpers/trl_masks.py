"""One optimizer step of TRL's trainer and of ours for it, on 1 and on 2 ranks, TRL on the path.

`-m tests.helpers.trl_masks FOLDER` takes the model in FOLDER/model. The optimizer batch is always
the same 16 responses, split over the ranks and over 1, 2 and 4 micro-batches. FOLDER/steps.pt has
{(ranks, trainer's name, number of micro-batches): (mask, gradients)}, a bool [16, tokens] and the
float32 gradient of every parameter as the optimizer gets it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from datasets.table import InMemoryTable
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.own_trainer.trl_trainer import ForkingGRPOTrainer
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART
from tests.helpers.own_trainer import LONGEST, MICRO_BATCHES, RANKS, RESPONSES, RHO, whole_batch
from tools.benchmarks.ranks import run_ranks


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        names = (name.removeprefix("module.") for name, _ in model.named_parameters())
        self.found = {
            name: parameter.grad.clone()
            for name, parameter in zip(names, model.parameters(), strict=True)
        }


def optimizer_step(
    kind: type[GRPOTrainer], folder: Path, num_micro_batches: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The masks that one optimizer step of `train()` used, over all ranks, and its gradients."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    gradients = Gradients()
    trainer = kind(
        model=reference.load_model(folder / "model"),
        reward_funcs=lambda **_: [0.0],
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            max_completion_length=LONGEST,
            max_grad_norm=0,
            max_steps=1,
            per_device_train_batch_size=RESPONSES // num_micro_batches // ranks,
            gradient_accumulation_steps=num_micro_batches,
            num_generations=2,
            top_entropy_quantile=RHO,
        ),
        train_dataset=Dataset(
            InMemoryTable.from_pydict({"prompt": ["a"] * 64}), fingerprint="prompts"
        ),
        processing_class=AutoTokenizer.from_pretrained(QUICKSTART / "model"),
        callbacks=[gradients],
    )
    rank, batch = trainer.accelerator.process_index, whole_batch()
    num_tokens = batch["completion_mask"].sum()
    own = {name: column.chunk(ranks)[rank] for name, column in batch.items()}
    trainer._generate_and_score_completions = lambda _: own | {"num_items_in_batch": num_tokens}
    masks = torch.zeros(RESPONSES, LONGEST, dtype=torch.int64)
    inner, choose = trainer._compute_loss, trainer.get_high_entropy_mask

    def compute_loss(model, inputs):
        trainer.rows = inputs["index"]
        return inner(model, inputs)

    def keep_mask(entropies, mask, threshold):
        chosen = choose(entropies, mask, threshold)
        masks[trainer.rows] = chosen.long()
        return chosen

    trainer._compute_loss, trainer.get_high_entropy_mask = compute_loss, keep_mask
    trainer.train()
    if dist.is_initialized():
        dist.all_reduce(masks)
    return masks.bool(), gradients.found


def optimizer_steps(folder: Path) -> dict[tuple[str, int], tuple[Tensor, dict[str, Tensor]]]:
    kinds = {"TRL": GRPOTrainer, "megafork": ForkingGRPOTrainer}
    return {
        (name, num): optimizer_step(kind, folder, num)
        for name, kind in kinds.items()
        for num in MICRO_BATCHES
    }


def main(folder: Path) -> None:
    steps = {}
    for ranks in RANKS:
        of_rank_zero = run_ranks(ranks, optimizer_steps, folder)[0]
        steps |= {(ranks, *case): step for case, step in of_rank_zero.items()}
    torch.save(steps, folder / "steps.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
