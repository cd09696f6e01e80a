"""verl's trainer (0.9) with the forking mask of the whole batch that an update gets.

    VERL_USE_EXTERNAL_MODULES=verl_trainer python -m verl.trainer.main_ppo \
        trainer.v1.trainer_mode=forking ...

verl hands a policy loss (`register_policy_loss`) one micro-batch, without its entropies. So the
mask is taken where all of them are, in the trainer: tokens outside it get advantage 0, which
leaves the loss's denominator as it is. Any `policy_loss.loss_mode` of verl's that multiplies a
token's term by its advantage can follow. With several mini-batches to a batch
(actor.ppo_mini_batch_size below data.train_batch_size) they share one threshold. verl has to score
the batch itself: algorithm.rollout_correction.bypass_mode leaves no entropies.
"""

import transfer_queue
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from megafork import forking_mask


@register_trainer("forking")
class ForkingTrainer(PPOTrainerSync):
    def _update_actor(self, batch, metrics):
        fields = ["entropy", "advantages", "response_mask"]
        rows = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        entropy, advantages, response_mask = (rows[field].values() for field in fields)  # flat
        mask = forking_mask(entropy, response_mask, rho=0.2)
        advantages.masked_fill_(~mask, 0.0)
        metrics["actor/forking_fraction"] = float(mask.sum() / response_mask.sum())
        batch = transfer_queue.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=rows.select("advantages")
        )
        return super()._update_actor(batch, metrics)
