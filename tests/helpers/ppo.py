"""One step of PPO at any layout, and the same in float64 from plain transformers.

The reference critic is transformers' token classifier with one label, one sequence at a time; GAE
is the sum of its definition.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, Qwen3Config

from megafork.config import CriticConfig
from megafork.data.token_table import token_table
from megafork.trainer.critic import Critic, estimate_advantages
from tests.helpers import reference
from tests.helpers.step import RHO, make_policy, perturbation, score_all, whole_gradients
from tools.benchmarks.configs import learner_config

CLIP = 0.3


def save_critic(folder, *, tied, seed=7, labels=1, layers=4):
    """A random token classifier."""
    config = Qwen3Config(
        vocab_size=reference.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=1e6,
        max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.1,
        num_labels=labels, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForTokenClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name == "score.bias":
                parameter.fill_(0.25)
    model.save_pretrained(folder)
    return folder


def load_critic(folder):
    return AutoModelForTokenClassification.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", num_labels=1
    ).eval()


def make_ppo_table(seed=5):
    """Some responses were cut, and are in no loss; advantages are not known yet."""
    groups = [
        replace(g, samples=[replace(s, truncated=s.uid % 5 == 2) for s in g.samples])
        for g in reference.make_groups(6, 4, seed=seed)
    ]
    return token_table(groups, overlong_filtering=True)


def make_critic(path, layout, mesh, *, dtype="float32", whiten=True, critic=None, **training):
    config = learner_config(
        path,
        parallel=layout,
        model={"dtype": dtype},
        training={"micro_batch_tokens": 128} | training,
        algorithm={"normalize_advantage": whiten},
        critic={"warmup_steps": 0, "grad_clip": 1e9} | (critic or {}),
    )
    return Critic(config, mesh)


def shift(rows):
    """Moves the old values, so that some are clipped."""
    return 0.5 * torch.sin(rows.float() * 2.3)


def one_ppo_step(folder, critic_folder, layout, settings, critic_settings):
    policy = make_policy(folder, layout, grad_clip=1e9, **settings)
    critic = make_critic(critic_folder, layout, policy.mesh, critic=critic_settings, **settings)
    table = make_ppo_table()
    values = critic.values(table)
    done = estimate_advantages(critic, [table], [policy.score(table)])
    [table], [scores] = done.tables, done.scores
    [mask], _ = policy.select([table], [scores], step=1)
    shifted = replace(
        scores,
        old_logprobs_N=scores.old_logprobs_N + perturbation(scores.rows_N),
        old_values_N=scores.old_values_N + shift(scores.rows_N),
    )
    judged = [model.judged_update(table, shifted, mask) for model in (policy, critic)]
    gradients = whole_gradients(policy), whole_gradients(critic)
    metrics, critic_metrics = (
        model.apply(own) for model, own in zip((policy, critic), judged, strict=True)
    )
    return {
        "rows": scores.rows_N,
        "values": values[scores.rows_N],
        "advantages": table.advantage_R[scores.rows_N],
        "estimated": done.metrics,
        "gradients": gradients,
        "metrics": (metrics, critic_metrics),
        "parameters": {
            name: tuple(p.shape)
            for stage in critic.stages
            for name, p in stage.gpt.named_parameters()
        },
    }


def reference_values(model, table) -> Tensor:
    """[R]: the classifier's output where each response token is predicted."""
    columns = []
    for b in range(table.num_samples):
        prompt, response = table.prompt(b), table.token_R[table.rows(b)]
        output = model(torch.cat([prompt, response])[None]).logits[0, :, 0]
        columns.append(output[len(prompt) - 1 : -1])
    return torch.cat(columns)


def advantages_by_definition(values, table, config) -> Tensor:
    """[R], not yet whitened."""
    columns = [
        by_definition(
            values[table.rows(b)].tolist(),
            float(table.reward_B[b]),
            config.gamma,
            config.gae_lambda,
        )
        for b in range(table.num_samples)
    ]
    return torch.tensor([a for column in columns for a in column], dtype=torch.float64)


def reference_ppo_step(folder, critic_folder, settings):
    """settings: of CriticConfig. Everything in float64."""
    config = CriticConfig(**settings)
    policy, critic = reference.load_model(folder, torch.float64), load_critic(critic_folder)
    table = make_ppo_table()
    in_loss = table.loss_mask_R
    values = reference_values(critic, table)
    plain = advantages_by_definition(values, table, config)
    returns = plain + values.detach()
    advantages = (plain - plain[in_loss].mean()) / (plain[in_loss].var() + 1e-8).sqrt()
    logprobs, entropies = score_all(policy, table)
    tau = reference.top_threshold(entropies[in_loss], RHO)
    mask = in_loss & (entropies >= tau)
    rows = torch.arange(table.num_rows)
    ratio = (logprobs - logprobs.detach() - perturbation(rows)).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    policy_loss = -(surrogate * mask).sum() / in_loss.sum()
    chosen = mask if config.tokens == "forking" else in_loss
    error = (values - returns) ** 2
    clipped = torch.zeros_like(chosen)
    if config.clip_value is not None:
        old = values.detach() + shift(rows)
        near = torch.max(torch.min(values, old + config.clip_value), old - config.clip_value)
        clipped = (near - returns) ** 2 > error
        error = torch.max(error, (near - returns) ** 2)
    value_loss = 0.5 * error[chosen].sum() / chosen.sum()
    policy_loss.backward()
    value_loss.backward()
    gradients = tuple(
        {name: p.grad for name, p in model.named_parameters()} for model in (policy, critic)
    )
    errors = (returns - values.detach())[in_loss]
    return {
        "values": values.detach(),
        "advantages": advantages,
        "estimated": {
            "value/mean": float(values[in_loss].detach().mean()),
            "value/explained_variance": float(1 - errors.var() / returns[in_loss].var()),
            "advantage/mean": float(plain[in_loss].mean()),
            "advantage/std": float(plain[in_loss].std()),
        },
        "losses": (float(policy_loss.detach()), float(value_loss.detach())),
        "rows": int(chosen.sum()),
        "clipped": int(clipped[chosen].sum()),
        "gradients": gradients,
        "norms": tuple(
            float(torch.stack([g.norm() for g in own.values()]).norm()) for own in gradients
        ),
        "gap": float((entropies[in_loss] - tau).abs().sort().values[1]),
    }


def by_definition(values, reward, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}: equation 16 of arXiv 1506.02438."""
    n = len(values)
    rewards = [0.0] * (n - 1) + [reward] * (n > 0)
    following = [*values[1:], 0.0][:n]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
