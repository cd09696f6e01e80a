"""GRPO on the forking tokens in a loop of your own: torch, and four functions of megafork.

    pip install megafork
    python plain_loop.py                             # or the same batch on two processes:
    torchrun --nproc-per-node 2 plain_loop.py

A small recurrent policy learns to count on from a digit, four more. Of each optimizer step's
tokens the top 20% by entropy carry the gradient, counted exactly over all processes.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from megafork import clipped_policy_loss, forking_mask, group_advantages, logprob_and_entropy

DIGITS, LENGTH, PROMPTS, GROUP_SIZE, UPDATES = 10, 4, 32, 8, 2


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(DIGITS + 1, 64)  # the last one begins the response
        self.recurrence = nn.GRU(64, 128, batch_first=True)
        self.head = nn.Linear(128, DIGITS)

    def forward(self, prompts, responses):
        start = prompts.new_full((len(prompts), 1), DIGITS)
        tokens = torch.cat([prompts, start, responses], 1)
        hidden, _ = self.recurrence(self.embedding(tokens))
        return self.head(hidden[:, prompts.size(1) :])


@torch.no_grad()
def sample(policy, prompts):
    responses = prompts[:, :0]
    for _ in range(LENGTH):
        probabilities = policy(prompts, responses)[:, -1].softmax(-1)
        responses = torch.cat([responses, probabilities.multinomial(1)], 1)
    return responses


def main(steps=150):
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    groups = [dist.group.WORLD] if dist.is_initialized() else []
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if groups else (0, 1)
    torch.manual_seed(0)  # the same weights everywhere,
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    torch.manual_seed(1 + rank)  # and other prompts
    for step in range(steps):
        prompts = torch.randint(DIGITS, (PROMPTS // num_ranks, 1))
        prompts = prompts.repeat_interleave(GROUP_SIZE, 0)
        responses = sample(policy, prompts)
        right = (prompts + torch.arange(1, LENGTH + 1)) % DIGITS
        rewards = (responses == right).float().mean(1)
        group = torch.arange(len(prompts)) // GROUP_SIZE
        advantages = group_advantages(rewards, group)[:, None]
        loss_mask = torch.ones_like(responses, dtype=torch.bool)  # without padding, here
        num_tokens = loss_mask.sum() * num_ranks
        for update in range(UPDATES):
            logits = policy(prompts, responses[:, :-1])
            logprobs, entropy = logprob_and_entropy(logits.flatten(0, 1), responses.flatten())
            logprobs, entropy = logprobs.view_as(responses), entropy.view_as(responses)
            if update == 0:
                old_logprobs = logprobs.detach()
                mask = forking_mask(entropy, loss_mask, rho=0.2, groups=groups)
            loss = clipped_policy_loss(
                logprobs,
                old_logprobs,
                advantages,
                mask,
                clip_low=0.2,
                clip_high=0.28,
                num_tokens=num_tokens,
            )
            optimizer.zero_grad()
            loss.backward()
            for parameter in policy.parameters() if groups else ():
                dist.all_reduce(parameter.grad)  # a sum: the loss is divided by all tokens
            optimizer.step()
        if rank == 0 and (step + 1) % 25 == 0:
            print(f"step {step + 1:4}  reward {rewards.mean():.2f}  kept {mask.float().mean():.2f}")
    return float(rewards.mean())


if __name__ == "__main__":
    main()
