"""The policy's verbs: score, select, update, export_shards. The layout stays behind them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms import forking, losses, regularizers
from megafork.algorithms.objectives import load_objective
from megafork.algorithms.rules import LoadedRule, Tokens, credit_weights, load_rule
from megafork.config import TrainConfig
from megafork.data.packing import Pack
from megafork.data.token_table import TokenTable
from megafork.model.scorer import Scorer, Scores
from megafork.parallel.mesh import Mesh
from megafork.trainer.learner import Judged, Learner
from megafork.trainer.reference import Reference

BOUNDARY_EPS = {"float32": 1e-5, "bfloat16": 1e-1}
"""Nats by which entropies move between layouts: all in float32, 99% in bfloat16 (docs/numerics.md).
"""
_SUMS = (
    "loss",
    "gradient_rows",
    "head_rows",
    "truncated",
    "masked",
    "kl",
    "entropy_bonus",
)


class Policy(Scorer, Learner):
    """A Scorer that learns, with the weights of model.path."""

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        """Collective."""
        super().__init__(
            config.model,
            config.parallel,
            mesh,
            micro_batch_tokens=config.training.micro_batch_tokens,
            temperature=config.rollout.temperature,
            entropy_temperature=config.forking.entropy_temperature,
        )
        self.start_learning(config.training)
        self.algorithm, self.forking = config.algorithm, config.forking
        self.mismatch, self.kl = config.mismatch, config.kl
        self.entropy_bonus = config.entropy_bonus
        self.max_response_tokens = config.rollout.max_response_tokens
        self.boundary_eps = BOUNDARY_EPS[config.model.dtype]
        self.reference: Reference | None = None
        if self.needs_reference or config.forking.compare_every:
            self.reference = Reference(self, config.kl.reference or config.model.path)

    def export_shards(self) -> Iterator[tuple[str, Tensor]]:
        """Yield shards as `Scorer` does; not while the weights are put away."""
        assert self.has_weights, "the weights are put away: onload() comes first"
        return super().export_shards()

    def select(
        self, tables: Sequence[TokenTable], scores: Sequence[Scores], *, step: int
    ) -> tuple[list[Tensor], forking.Selection | None]:
        """The forking mask of each table, with one threshold over all of them.

        Masks are bool and aligned with the scores' rows. Only the last stage has anything to
        select; the others get empty masks and no Selection.
        """
        if not self.mesh.is_last_stage:
            return [torch.zeros(0, dtype=torch.bool) for _ in tables], None
        tokens = self._tokens(tables, scores)
        selection = forking.select_tokens(
            tokens,
            self.forking,
            seed=self.training.seed,
            step=step,
            boundary_eps=self.boundary_eps,
            scores_T=None if self._selector is None else self._selector(tokens, step=step),
        )
        # Entropies are bit-identical over tp by construction; were they not, ranks would compute
        # different rows and hang, so the mask is rank 0's on all of them.
        mask = self._from_first_tp_rank(selection.mask_T)
        return list(mask.cpu().split([len(s.rows_N) for s in scores])), selection

    def _tokens(self, tables: Sequence[TokenTable], scores: Sequence[Scores]) -> Tokens:
        """Return the tokens of the tables that this rank of the last stage has, on the device."""
        device = self.mesh.device
        pairs = list(zip(tables, scores, strict=True))
        starts = list(itertools.accumulate((t.num_samples for t in tables), initial=0))
        sample_N = [t.sample_R[s.rows_N] for t, s in pairs]

        def joined(columns: Iterable[Tensor]) -> Tensor:
            return torch.cat(list(columns)).to(device)

        references = [s.reference.old_logprobs_N for s in scores if s.reference is not None]
        return Tokens(
            entropy_T=joined(s.entropy_N for s in scores),
            logprobs_T=joined(self._old_logprobs(t, s) for t, s in pairs),
            rollout_logprobs_T=joined(t.rollout_logprob_R[s.rows_N] for t, s in pairs),
            ref_logprobs_T=joined(references) if len(references) == len(scores) else None,
            token_T=joined(t.token_R[s.rows_N] for t, s in pairs),
            advantages_T=joined(t.advantage_R[s.rows_N] for t, s in pairs),
            loss_mask_T=joined(t.loss_mask_R[s.rows_N] for t, s in pairs),
            key_T2=joined(t.key_R[s.rows_N] for t, s in pairs),
            length_T=joined(t.response_lengths_B[b] for t, b in zip(tables, sample_N, strict=True)),
            reward_T=joined(t.reward_B[b] for t, b in zip(tables, sample_N, strict=True)),
            sequence_T=joined(start + b for start, b in zip(starts, sample_N, strict=False)),
            num_sequences=starts[-1],
            groups=(self.mesh.groups.dp_cp,),
        )

    def _from_first_tp_rank(self, values_T: Tensor) -> Tensor:
        """Return the first tensor-parallel rank's values, on all of them."""
        tp_group = self.mesh.groups.tp
        dist.broadcast(values_T, src=dist.get_global_rank(tp_group, 0), group=tp_group)
        return values_T

    def _old_logprobs(self, table: TokenTable, scores: Scores) -> Tensor:
        """Return the ratio's denominator, float32 [N]."""
        if self.ratio_to_engine:
            return table.rollout_logprob_R[scores.rows_N]
        return scores.old_logprobs_N

    @property
    def ratio_to_engine(self) -> bool:
        return self.algorithm.old_logprobs == "engine"

    @property
    def needs_entropies(self) -> bool:
        """True where selection or credit looks at what a forward pass gives."""
        return self.forking.by_entropy or bool(self._rules_need & {"entropy", "logprobs"})

    @property
    def needs_reference(self) -> bool:
        """True where every step needs the reference policy's log-probabilities."""
        return bool(self.kl.coefficient) or "ref_logprobs" in self._rules_need

    @property
    def _selector(self) -> LoadedRule | None:
        if not self.forking.by_plugin:
            return None
        return load_rule("forking.select", self.forking.select)

    @property
    def _credit(self) -> list[LoadedRule]:
        return [load_rule("algorithm.credit", name) for name in self.algorithm.credit]

    @property
    def _rules_need(self) -> set[str]:
        rules = [*self._credit, *([] if self._selector is None else [self._selector])]
        return {quantity for rule in rules for quantity in rule.needs}

    def update(
        self, table: TokenTable, scores: Scores, mask_N: Tensor, *, step: int = 1
    ) -> dict[str, float]:
        """Make an optimizer step on the masked tokens, with the objective and denominator.

        None where no response is in the loss.
        Raises UpdateRefused as `judged_update`, whose metrics it returns with the gradient norm.
        """
        return self.apply(self.judged_update(table, scores, mask_N, step=step))

    def judged_update(
        self, table: TokenTable, scores: Scores, mask_N: Tensor, *, step: int = 1
    ) -> Judged:
        """Make the first half of `update`, which changes nothing but the gradients.

        Metrics, on the last stage, are sums over all ranks: the policy's loss, the objective's
        metrics over the rows that have a gradient (those that the clip decides), the number of
        these rows, of rows that the head ran on, of tokens that the mismatch correction changed,
        the loss's terms "kl" and "entropy_bonus" (0 where off); and the largest |ratio - 1|.
        Raises UpdateRefused, on all ranks, for a NaN, an infinity or a spike (see `UpdateGuard`).
        """
        reports = self.accumulate_gradients(table, scores, mask_N, step=step)
        metrics = self._reduce(reports) if self.mesh.is_last_stage else {}
        loss = ("loss", "kl", "entropy_bonus")
        return self.judge(metrics, num_tokens=table.num_loss_tokens, loss=loss)

    def accumulate_gradients(
        self, table: TokenTable, scores: Scores, mask_N: Tensor, *, step: int = 1
    ) -> list[dict[str, Any]]:
        """Forward and backward over the table's packs; gradients end up reduced over all ranks."""
        if self.mesh.is_last_stage:
            assert not table.advantage_R.isnan().any(), "advantages were not computed"
        packs, rows_of = self._needed_rows(table, scores, mask_N, step)
        objective, _ = load_objective(self.algorithm.objective)
        denominator = losses.loss_denominator(
            table, self.algorithm, max_response_tokens=self.max_response_tokens
        )
        self.clear_gradients()

        def loss_of(pack: Pack, logprobs_N: Tensor, entropy_N: Tensor) -> tuple[Tensor, dict]:
            rows, corrected = rows_of[id(pack)]
            policy = losses.policy_loss(
                logprobs_N,
                rows,
                self.algorithm,
                objective,
                denominator=denominator,
                num_sequences=table.num_samples,
                cp_group=self._cp_group,
            )
            gradient = rows.gradient_N
            rows_run = torch.stack([gradient.sum(), torch.ones_like(gradient).sum()])
            offset = (policy.ratio_N - 1).abs()
            terms = self._other_terms(logprobs_N, entropy_N, rows, denominator)
            counts = (rows_run, corrected)
            report = {
                "sums": torch.cat([policy.loss.detach()[None].double(), *counts, terms.detach()]),
                "metrics": policy.metrics,
                "max_ratio_offset": offset.max() if len(offset) else offset.new_zeros(()),
            }
            return policy.loss + terms.sum(), report

        return self.run_packs(packs, loss_of, forward_only=False)

    def _other_terms(
        self, logprobs_N: Tensor, entropy_N: Tensor, rows: losses.LossRows, denominator: int
    ) -> Tensor:
        """[2]: the KL's and the entropy bonus's share of the loss; constant zeros where off."""
        kl = bonus = logprobs_N.new_zeros(())
        if self.kl.coefficient:
            kl = regularizers.kl_loss(logprobs_N, rows, self.kl, denominator=denominator)
        if self.entropy_bonus.coefficient:
            bonus = regularizers.entropy_loss(
                entropy_N, rows, self.entropy_bonus, denominator=denominator
            )
        return torch.stack([kl, bonus])

    def _needed_rows(
        self, table: TokenTable, scores: Scores, mask_N: Tensor, step: int
    ) -> tuple[list[Pack], dict[int, tuple[losses.LossRows, Tensor]]]:
        """The packs with the rows that the loss depends on, and of each what it knows of them.

        The transformer runs on all tokens, the head on these rows alone. With them comes how many
        of the pack's selected tokens the mismatch correction has truncated and masked. Before the
        last stage there is no head and the packs stay as they are.
        """
        if not self.mesh.is_last_stage:
            return scores.packs, {}
        credit_N: Tensor | float = 1.0
        if self._credit:
            tokens = self._tokens([table], [scores])
            credit_N = self._from_first_tp_rank(credit_weights(self._credit, tokens, step=step))
        scored = losses.ScoredRows(
            scores.rows_N,
            self._old_logprobs(table, scores),
            mask_N,
            credit_N=credit_N,
            ref_logprobs_N=scores.reference.old_logprobs_N if scores.reference else None,
        )
        all_rows = losses.loss_rows(
            table,
            scored,
            losses.LossSettings(self.algorithm, self.mismatch, self.kl, self.entropy_bonus),
            device=self.mesh.device,
            cp_group=self._cp_group,
        )
        packs, rows_of = [], {}
        parts = all_rows.split([len(pack.rows_N) for pack in scores.packs])
        for pack, rows in zip(scores.packs, parts, strict=True):
            packs.append(pack.keep(rows.needed_N))
            corrected = torch.stack([rows.truncated_N.sum(), rows.masked_N.sum()])
            rows_of[id(packs[-1])] = rows.only_needed(), corrected
        return packs, rows_of

    @property
    def _cp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share each sequence; None where each is whole on its rank."""
        return self.mesh.groups.cp if self.mesh.cp_size > 1 else None

    @property
    def terms(self) -> list[str]:
        """Names of the loss's terms beside the policy's own, as in update's metrics."""
        both = {"kl": self.kl.coefficient, "entropy_bonus": self.entropy_bonus.coefficient}
        return [name for name, coefficient in both.items() if coefficient]

    def _reduce(self, reports: Sequence[dict]) -> dict[str, float]:
        names = list(reports[0]["metrics"])
        sums = torch.stack([report["sums"] for report in reports]).sum(0)
        if names:
            of_objective = [torch.stack(list(report["metrics"].values())) for report in reports]
            sums = torch.cat([sums, torch.stack(of_objective).sum(0)])
        offset = torch.stack([report["max_ratio_offset"] for report in reports]).max()
        group = self.mesh.groups.dp_cp
        dist.all_reduce(sums, group=group)
        dist.all_reduce(offset, op=dist.ReduceOp.MAX, group=group)
        totals = dict(zip((*_SUMS, *names), sums.tolist(), strict=True))
        return totals | {"max_ratio_offset": float(offset)}
