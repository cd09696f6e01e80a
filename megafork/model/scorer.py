"""A model in its layout that scores token tables: log-probability and entropy of every token.

Values of tokens exist on the last pipeline stage, on the rank that holds the token's pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.data.packing import Pack
from megafork.data.token_table import TokenTable
from megafork.model.gpt import head_input, head_weight
from megafork.model.packed import PackedModel
from megafork.model.weights import export_weights
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from megafork.parallel.mesh import Mesh


@dataclass(frozen=True)
class Scores:
    """The scores of a table's tokens that one rank has; empty before the last stage.

    rows_N says which rows of the table the values belong to, pack by pack.
    """

    packs: list[Pack]
    rows_N: Tensor
    old_logprobs_N: Tensor
    entropy_N: Tensor
    has_logprobs: bool = True
    """False: the policy before the first update was not asked; old_logprobs_N are the engine's"""
    has_entropies: bool = True
    """False: no policy was asked; entropy_N is 0"""
    reference: Scores | None = None
    """the reference policy's scores of the same rows, where it was asked"""
    old_values_N: Tensor | None = None
    """of a critic, before its first update on the rollout batch; None without one"""
    returns_N: Tensor | None = None
    """what the critic's values are fitted to"""


class Scorer(PackedModel):
    """A model in its layout that gives log-probabilities and entropies of a token table."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
        *,
        micro_batch_tokens: int,
        temperature: float = 1.0,
        entropy_temperature: float | None = None,
    ) -> None:
        super().__init__(model, parallel, mesh, micro_batch_tokens=micro_batch_tokens)
        self.temperature = temperature
        self.entropy_temperature = entropy_temperature

    def score(self, table: TokenTable) -> Scores:
        """Log-probability and entropy of every response token, without gradients."""
        packs = self.packs(table)
        for module in self.modules:
            module.eval()

        def collect(pack: Pack, logprobs_N: Tensor, entropy_N: Tensor) -> tuple[Tensor, dict]:
            return logprobs_N.sum(), {"logprobs": logprobs_N.cpu(), "entropy": entropy_N.cpu()}

        with torch.no_grad():
            outputs = self.run_packs(packs, collect, forward_only=True)
        if not self.mesh.is_last_stage:
            nothing = torch.zeros(0)
            return Scores(packs, nothing.long(), nothing, nothing)
        return Scores(
            packs=packs,
            rows_N=torch.cat([pack.rows_N for pack in packs]),
            old_logprobs_N=torch.cat([output["logprobs"] for output in outputs]),
            entropy_N=torch.cat([output["entropy"] for output in outputs]),
        )

    def unscored(self, table: TokenTable) -> Scores:
        """The rows as `score` has them, without its forward pass."""
        packs = self.packs(table)
        rows_N = torch.zeros(0, dtype=torch.int64)
        if self.mesh.is_last_stage:
            rows_N = torch.cat([pack.rows_N for pack in packs])
        engines_N = table.rollout_logprob_R[rows_N]
        return Scores(
            packs,
            rows_N,
            engines_N,
            torch.zeros(len(rows_N)),
            has_logprobs=False,
            has_entropies=False,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.stages[0].gpt.config.params_dtype

    def export_shards(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's weights by HF name, on its sender; its tp ranks iterate together.

        All in the model's dtype, a float32 head too: it is what the server generates with.
        """
        return export_weights(self.stages, self.mesh, lambda p: p.detach().to(self.dtype))

    def shard_manifest(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes that export_shards will give, in its order, without communication."""
        return [
            pair
            for stage in self.stages
            for rule in stage.rules
            if rule.exported
            for pair in zip(rule.hf, rule.hf_shapes, strict=True)
        ]

    def run_packs(
        self,
        packs: Sequence[Pack],
        loss_of: Callable[[Pack, Tensor, Tensor], tuple[Tensor, dict]],
        *,
        forward_only: bool,
    ) -> list[dict]:
        """megatron's schedule over the packs; `loss_of` runs on the last stage.

        The head runs on each pack's slots_N and on nothing else.
        """

        def scored(pack: Pack, hidden_1TH: Tensor) -> tuple[Tensor, dict]:
            gpt = self.stages[-1].gpt
            logprobs_N, entropy_N = linear_logprob_and_entropy(
                head_input(gpt, hidden_1TH, pack.slots_N),
                head_weight(gpt),
                pack.targets_N,
                tp_group=self.mesh.groups.tp,
                temperature=self.temperature,
                entropy_temperature=self.entropy_temperature,
                vocab_size=self.shape.vocab_size,
            )
            return loss_of(pack, logprobs_N, entropy_N)

        return self.run_hidden(packs, scored, forward_only=forward_only)
