"""slime's hooks (0.3) with our vocabulary-parallel op and the forking mask of the whole batch.

    --use-rollout-entropy --rollout-data-postprocess-path slime_loss.select
    --loss-type custom_loss --custom-loss-function-path slime_loss.policy_loss
    --calculate-per-token-loss --num-steps-per-rollout 1

`select` gives the tokens outside the mask advantage 0, over all data-parallel ranks. `policy_loss`
takes log-probabilities from this rank's shard of the vocabulary. Without context parallelism.
"""

import torch
from megatron.core import parallel_state

from megafork import clipped_policy_loss, forking_mask, logprob_and_entropy


def select(args, rollout_id, rollout_data):
    """Take the mask of a rollout batch; every rank calls it before the first update."""
    if not parallel_state.is_pipeline_last_stage():
        return
    entropy, loss_mask, advantages = (
        torch.cat(rollout_data[key]) for key in ("entropy", "loss_masks", "advantages")
    )
    groups = [parallel_state.get_data_parallel_group()]
    mask = forking_mask(entropy, loss_mask, rho=0.2, groups=groups)
    lengths = rollout_data["response_lengths"]
    rollout_data["advantages"] = list((advantages * mask).split(lengths))


def policy_loss(args, batch, logits, sum_of_sample_mean):
    """Return the sum of the loss over a micro-batch's tokens, which Megatron divides, and metrics.

    logits: [1, T, V], this rank's shard of the vocabulary; batch["tokens"]: [1, T], packed.
    """
    ends = torch.tensor(batch["total_lengths"]).cumsum(0).tolist()
    spans = zip(ends, batch["response_lengths"], strict=True)
    rows = torch.cat([torch.arange(end - length, end) for end, length in spans])
    logprobs, entropy = logprob_and_entropy(
        logits[0, rows - 1],
        batch["tokens"][0, rows],
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        temperature=args.rollout_temperature,
    )
    loss_mask = torch.cat(batch["loss_masks"])
    loss = clipped_policy_loss(
        logprobs,
        torch.cat(batch["log_probs"]),
        torch.cat(batch["advantages"]),
        loss_mask,
        clip_low=args.eps_clip,
        clip_high=args.eps_clip_high,
        num_tokens=1,
    )
    return loss, {"loss": loss.detach(), "entropy": (entropy.detach() * loss_mask).sum()}
