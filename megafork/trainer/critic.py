"""PPO's critic: a value for every response token, advantages from them, and updates on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.gae import (
    explained_variance,
    gae,
    masked_mean_and_variance,
    value_loss,
    whitened,
)
from megafork.config import (
    CriticConfig,
    ModelConfig,
    TrainConfig,
)
from megafork.data.packing import Pack
from megafork.data.token_table import TokenTable
from megafork.model.gpt import ValueHead, head_input
from megafork.model.scorer import Scores
from megafork.parallel.mesh import Mesh
from megafork.trainer.learner import Judged, Learner

_SUMS = ("loss", "clipped", "rows")
_ESTIMATED = ("value/mean", "value/explained_variance", "advantage/mean", "advantage/std")
_OWN_SETTINGS = {"lr", "warmup_steps", "weight_decay", "grad_clip"}
"""of a critic, where TrainingConfig has the policy's"""


class Critic(Learner):
    """The policy's stack with a value head, in the policy's layout and with its packs."""

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        """Collective."""
        super().__init__(
            critic_model(config.model, config.critic),
            config.parallel,
            mesh,
            micro_batch_tokens=config.training.micro_batch_tokens,
            head="value",
        )
        self.config, self.whiten = config.critic, config.algorithm.normalize_advantage
        own = config.critic.model_dump(include=_OWN_SETTINGS)
        self.start_learning(config.training.model_copy(update=own), name="the critic")

    def values(self, table: TokenTable) -> Tensor:
        """float32 [R]: what each row's state is worth, 0 outside this replica's micro-batches.

        On the last stage, the same bits on all ranks of a replica; nothing before it. No gradient.
        """
        packs = self.packs(table)
        for module in self.modules:
            module.eval()

        def collect(pack: Pack, hidden_1TH: Tensor) -> tuple[Tensor, dict]:
            values_N = self._head(pack, hidden_1TH)
            return values_N.sum(), {"values": values_N.cpu()}

        with torch.no_grad():
            outputs = self.run_hidden(packs, collect, forward_only=True)
        if not self.mesh.is_last_stage:
            return torch.zeros(0)
        values_R = torch.zeros(table.num_rows)
        for pack, output in zip(packs, outputs, strict=True):
            values_R[pack.rows_N] = output["values"]
        values_R = values_R.to(self.mesh.device)
        tp, cp = self.mesh.groups.tp, self.mesh.groups.cp
        dist.broadcast(values_R, src=dist.get_global_rank(tp, 0), group=tp)
        dist.all_reduce(values_R, group=cp)  # each rank has the slots of its own
        return values_R.cpu()

    def judged_update(
        self, table: TokenTable, scores: Scores, mask_N: Tensor, *, step: int = 1
    ) -> Judged:
        """Make the first half of an update on the mini-batch, as `Policy` does.

        Metrics: the loss over all ranks, rows in it, rows that value clipping decides.
        """
        reports = self.accumulate_gradients(table, scores, mask_N)
        num_tokens = table.num_loss_tokens
        if not self.mesh.is_last_stage:
            return self.judge({}, num_tokens=num_tokens)
        sums = torch.stack([report["sums"] for report in reports]).sum(0)
        dist.all_reduce(sums, group=self.mesh.groups.dp_cp)
        return self.judge(dict(zip(_SUMS, sums.tolist(), strict=True)), num_tokens=num_tokens)

    def accumulate_gradients(
        self, table: TokenTable, scores: Scores, mask_N: Tensor
    ) -> list[dict[str, Tensor]]:
        """Forward and backward over the table's packs; gradients end up reduced over all ranks.

        mask_N: the forking mask, which counts with tokens = "forking" alone; then its number of
        tokens on all ranks is the denominator, else that of the loss tokens.
        """
        packs, denominator = scores.packs, 1
        rows_of: dict[int, tuple[Tensor, Tensor]] = {}
        if self.mesh.is_last_stage:
            packs, rows_of, denominator = self._chosen(table, scores, mask_N)
        self.clear_gradients()

        def loss_of(pack: Pack, hidden_1TH: Tensor) -> tuple[Tensor, dict]:
            loss, clipped = value_loss(
                self._head(pack, hidden_1TH),
                *rows_of[id(pack)],
                clip=self.config.clip_value,
                denominator=denominator,
            )
            counts = torch.stack([clipped.sum(), torch.ones_like(clipped).sum()])
            return loss, {"sums": torch.cat([loss.detach()[None].double(), counts])}

        return self.run_hidden(packs, loss_of, forward_only=False)

    def _head(self, pack: Pack, hidden_1TH: Tensor) -> Tensor:
        gpt = self.stages[-1].gpt
        assert isinstance(gpt.output_layer, ValueHead)
        return gpt.output_layer.values(head_input(gpt, hidden_1TH, pack.slots_N))

    def _chosen(
        self, table: TokenTable, scores: Scores, mask_N: Tensor
    ) -> tuple[list[Pack], dict[int, tuple[Tensor, Tensor]], int]:
        """The packs with the rows of the loss alone, old values and returns of each, denominator.

        Last stage only, all its ranks together.
        """
        assert scores.old_values_N is not None and scores.returns_N is not None
        chosen_N, denominator = table.loss_mask_R[scores.rows_N], table.num_loss_tokens
        if self.config.tokens == "forking":
            chosen_N = mask_N
            count = mask_N.sum().to(self.mesh.device)
            dist.all_reduce(count, group=self.mesh.groups.dp_cp)
            denominator = int(count)
        packs: list[Pack] = []
        rows_of: dict[int, tuple[Tensor, Tensor]] = {}
        sizes = [len(pack.rows_N) for pack in scores.packs]
        columns = (chosen_N, scores.old_values_N, scores.returns_N)
        for pack, chosen, old, returns in zip(
            scores.packs, *(column.split(sizes) for column in columns), strict=True
        ):
            packs.append(pack.keep(chosen.to(self.mesh.device)))
            own = [column[chosen].to(self.mesh.device) for column in (old, returns)]
            rows_of[id(packs[-1])] = own[0], own[1]
        return packs, rows_of, max(denominator, 1)


def critic_model(model: ModelConfig, critic: CriticConfig) -> ModelConfig:
    """The model's settings with the folder that the critic starts from; its head is float32."""
    return model.model_copy(update={"path": critic.path or model.path, "float32_head": False})


@dataclass(frozen=True)
class Estimated:
    """A rollout batch with what the critic thinks of it, mini-batch by mini-batch."""

    tables: list[TokenTable]
    """with advantages on the last stage, where they could be scored"""
    scores: list[Scores | str]
    """with old values and returns; or why there is no update, the same on all ranks"""
    metrics: dict[str, float]


def estimate_advantages(
    critic: Critic, tables: Sequence[TokenTable], scored: Sequence[Scores | str]
) -> Estimated:
    """GAE of every mini-batch that could be scored, whitened over the loss tokens of all of them.

    A rank of the last stage has the values of its replica's sequences and so their advantages; what
    is over all of them is reduced, in float64. Earlier stages need neither. The metrics are of the
    loss tokens, before whitening; NaN where no mini-batch could be scored.
    """
    mesh = critic.mesh
    metrics = dict.fromkeys(_ESTIMATED, math.nan) | {"critic/lr": critic.learning_rate}
    done = Estimated(list(tables), list(scored), metrics)
    found: dict[int, tuple[Scores, Tensor]] = {}
    for index, (table, scores) in enumerate(zip(tables, scored, strict=True)):
        if isinstance(scores, str):
            continue
        values_R = critic.values(table)
        if mesh.any_rank(not values_R.isfinite().all()):
            done.scores[index] = "a value of the critic is not finite"
        else:
            found[index] = scores, values_R
            # Before the last stage these stay, empty.
            done.scores[index] = replace(scores, old_values_N=values_R, returns_N=values_R)
    if found and mesh.is_last_stage:
        _estimate(critic, found, done)
    return done


def _estimate(critic: Critic, found: dict[int, tuple[Scores, Tensor]], done: Estimated) -> None:
    """Fill in advantages, returns and metrics. Last stage only, all its ranks together."""
    advantages: dict[int, Tensor] = {}
    columns = []
    for index, (scores, values_R) in found.items():
        table, rows_N = done.tables[index], scores.rows_N
        advantages[index], returns_R = gae(
            values_R,
            table.reward_B,
            table.offsets,
            gamma=critic.config.gamma,
            gae_lambda=critic.config.gae_lambda,
        )
        own = values_R[rows_N], returns_R[rows_N]
        columns.append((*own, advantages[index][rows_N], table.loss_mask_R[rows_N]))
        done.scores[index] = replace(scores, old_values_N=own[0], returns_N=own[1])
    device, group = critic.mesh.device, critic.mesh.groups.dp_cp
    values_N, returns_N, advantages_N, mask_N = (
        torch.cat(parts).to(device) for parts in zip(*columns, strict=True)
    )
    mean, variance = masked_mean_and_variance(advantages_N, mask_N, group)
    of_batch = (
        masked_mean_and_variance(values_N, mask_N, group)[0],
        explained_variance(values_N, returns_N, mask_N, group),
        mean,
        variance**0.5,
    )
    done.metrics.update(zip(_ESTIMATED, of_batch, strict=True))
    for index, advantages_R in advantages.items():
        if critic.whiten:
            advantages_R = whitened(advantages_R, mean, variance)
        done.tables[index] = done.tables[index].with_columns(advantage_R=advantages_R)
