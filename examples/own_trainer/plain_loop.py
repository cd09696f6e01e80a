"""GRPO on the forking tokens, in a loop of your own: torch, and four functions of megafork.

    pip install megafork
    python plain_loop.py

A small recurrent policy learns to count: to a digit it answers with the four that follow. The 20%
of each batch's tokens with the highest entropy carry the gradient. On several ranks, pass
`groups=[dist.group.WORLD]` to forking_mask, all ranks' number of tokens to clipped_policy_loss, and
add the gradients up.
"""

import torch
from torch import nn

from megafork import clipped_policy_loss, forking_mask, group_advantages, logprob_and_entropy

DIGITS, LENGTH, PROMPTS, GROUP_SIZE, STEPS, UPDATES = 10, 4, 32, 8, 50, 2


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(DIGITS, 64)
        self.recurrence = nn.GRU(64, 128, batch_first=True)
        self.head = nn.Linear(128, DIGITS)

    def forward(self, tokens):
        return self.head(self.recurrence(self.embedding(tokens))[0])


@torch.no_grad()
def generate(policy, prompts):
    tokens = prompts
    for _ in range(LENGTH):
        probabilities = policy(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, probabilities.multinomial(1)], dim=1)
    return tokens[:, 1:]


torch.manual_seed(0)
policy = Policy()
optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
group = torch.arange(PROMPTS).repeat_interleave(GROUP_SIZE)
for step in range(1, STEPS + 1):
    prompts = torch.randint(DIGITS, (PROMPTS, 1)).repeat_interleave(GROUP_SIZE, dim=0)
    responses = generate(policy, prompts)
    rewards = (responses == (prompts + torch.arange(1, LENGTH + 1)) % DIGITS).float().mean(1)
    advantages = group_advantages(rewards, group)[:, None]
    loss_mask = torch.ones_like(responses, dtype=torch.bool)  # no padding here
    for update in range(UPDATES):
        logits = policy(torch.cat([prompts, responses[:, :-1]], dim=1))
        logprobs, entropy = logprob_and_entropy(logits.flatten(0, 1), responses.flatten())
        logprobs, entropy = logprobs.view_as(responses), entropy.view_as(responses)
        if update == 0:
            old_logprobs = logprobs.detach()
            mask = forking_mask(entropy, loss_mask, rho=0.2)
        loss = clipped_policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            clip_low=0.2,
            clip_high=0.28,
            num_tokens=loss_mask.sum(),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if step == 1 or step % 10 == 0:
        kept = mask.sum() / loss_mask.sum()
        print(f"step {step:2}  reward {rewards.mean():.2f}  tokens with a gradient {kept:.0%}")
