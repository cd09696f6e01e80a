"""TRL's GRPOTrainer with the forking mask of the whole optimizer batch, exact over ranks.

TRL takes `top_entropy_quantile` of each micro-batch, so its mask changes with
gradient_accumulation_steps. Here the micro-batches of an optimizer step are scored before the first
of them is trained on (one forward pass more) and share one threshold. All else is TRL's (1.16):

    ForkingGRPOTrainer(args=GRPOConfig(top_entropy_quantile=0.2, ...), ...).train()

It is for text models: the scoring pass hands on no images.
"""

import torch
import torch.distributed as dist
from trl import GRPOTrainer

from megafork import forking_mask


class ForkingGRPOTrainer(GRPOTrainer):
    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self.top_entropy_quantile < 1:
            if self._step % self.args.gradient_accumulation_steps == 0:
                self._select()
            self._forking_mask = inputs["forking_mask"]
        return inputs

    def get_high_entropy_mask(self, entropies, mask, threshold):
        if self.model.training:
            return self._forking_mask
        return super().get_high_entropy_mask(entropies, mask, threshold)

    def _select(self):
        """Give each micro-batch of the optimizer step that begins its part of the mask."""
        first = self._step % self.args.steps_per_generation
        batches = self._buffered_inputs[first : first + self.args.gradient_accumulation_steps]
        if len(batches) < self.args.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.args.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps={self.args.gradient_accumulation_steps}: an "
                "optimizer step's tokens are needed before it begins"
            )
        loss_masks = [
            batch["completion_mask"] * batch.get("tool_mask", torch.tensor(1)) for batch in batches
        ]
        mask = forking_mask(
            torch.cat([self._entropies(batch) for batch in batches]),
            torch.cat(loss_masks),
            rho=self.top_entropy_quantile,
            groups=[dist.group.WORLD] if dist.is_initialized() else [],
        )
        sizes = [len(loss_mask) for loss_mask in loss_masks]
        for batch, part in zip(batches, mask.split(sizes), strict=True):
            batch["forking_mask"] = part

    @torch.no_grad()
    def _entropies(self, batch):
        """Return the entropy of each completion token of a micro-batch, [B, tokens], in nats."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        _, entropies, _ = self._get_per_token_logps_and_entropies(
            self.model,
            ids,
            attention_mask,
            batch["completion_ids"].size(1),
            compute_entropy=True,
        )
        return entropies
