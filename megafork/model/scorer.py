"""A model in its layout that scores token tables: log-probability and entropy of every token.

Values of tokens exist on the last pipeline stage, on the rank that holds the token's pack; every
rank holds the same token table and so knows every plan, denominator and shape without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.data.packing import Pack, build_pack, fed_lengths, plan_micro_batches
from megafork.errors import UserError
from megafork.model.gpt import head_input, head_weight
from megafork.model.hf_folder import SafetensorsFolder
from megafork.model.shape import ModelShape
from megafork.model.weights import (
    build_stages,
    export_weights,
    load_weights,
    mark_tensor_parallel,
)
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from megafork.parallel.topology import Topology
from megafork.parallel.zigzag import Zigzag
from megafork.types import TokenTable


@dataclass(frozen=True)
class Scores:
    """What one rank knows of a table's tokens after scoring; empty before the last stage.

    rows_N says which rows of the table the values belong to, pack by pack.
    """

    packs: list[Pack]
    rows_N: Tensor
    old_logprobs_N: Tensor
    entropy_N: Tensor
    reference: Scores | None = None
    """the reference policy's scores of the same rows, where it was asked"""


class Scorer:
    """A model in its layout that gives log-probabilities and entropies of a token table."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        topology: Topology,
        *,
        micro_batch_tokens: int,
        temperature: float = 1.0,
        entropy_temperature: float | None = None,
    ) -> None:
        self.shape = ModelShape.from_folder(model.path)
        self.shape.check(model, parallel)
        self.topology = topology
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self.entropy_temperature = entropy_temperature
        self.part = Zigzag(
            topology.cp_rank, topology.cp_size, parallel.tp if parallel.sequence_parallel else 1
        )
        # The interleaved schedule goes through the micro-batches in rounds of pp.
        self.count_multiple = topology.pp_size if parallel.vpp > 1 else 1
        self.stages = build_stages(self.shape, model, parallel, topology)
        mark_tensor_parallel(self.stages)
        load_weights(self.stages, SafetensorsFolder(model.path), topology)
        self.modules: list[torch.nn.Module] = [stage.gpt for stage in self.stages]
        """What the schedule runs: the stages, or what a subclass wraps them in."""

    def score(self, table: TokenTable) -> Scores:
        """Log-probability and entropy of every response token, without gradients."""
        packs = self.packs(table)
        for module in self.modules:
            module.eval()

        def collect(pack: Pack, logprobs_N: Tensor, entropy_N: Tensor) -> tuple[Tensor, dict]:
            return logprobs_N.sum(), {"logprobs": logprobs_N.cpu(), "entropy": entropy_N.cpu()}

        with torch.no_grad():
            outputs = self.run_packs(packs, collect, forward_only=True)
        if not self.topology.is_last_stage:
            nothing = torch.zeros(0)
            return Scores(packs, nothing.long(), nothing, nothing)
        return Scores(
            packs=packs,
            rows_N=torch.cat([pack.rows_N for pack in packs]),
            old_logprobs_N=torch.cat([output["logprobs"] for output in outputs]),
            entropy_N=torch.cat([output["entropy"] for output in outputs]),
        )

    def packs(self, table: TokenTable) -> list[Pack]:
        """This rank's part of its micro-batches of the table."""
        self._check(table)
        plan = plan_micro_batches(
            [self.part.padded(length) for length in fed_lengths(table)],
            dp_size=self.topology.dp_size,
            token_budget=self.micro_batch_tokens,
            cp_size=self.topology.cp_size,
            count_multiple=self.count_multiple,
        )
        return [
            build_pack(table, samples, part=self.part, device=self.topology.device)
            for samples in plan[self.topology.dp_rank]
        ]

    @property
    def dtype(self) -> torch.dtype:
        return self.stages[0].gpt.config.params_dtype

    def export_shards(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's weights by HF name, on its sender; its tp ranks iterate together.

        All in the model's dtype, a float32 head too: it is what the server generates with.
        """
        return export_weights(self.stages, self.topology, lambda p: p.detach().to(self.dtype))

    def shard_manifest(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes that export_shards will give, in its order, without communication."""
        return [
            pair
            for stage in self.stages
            for rule in stage.rules
            if rule.exported
            for pair in zip(rule.hf, rule.hf_shapes, strict=True)
        ]

    def _check(self, table: TokenTable) -> None:
        vocab, positions = self.shape.vocab_size, self.shape.max_positions
        tokens = torch.cat([table.prompt_ids_P, table.token_R])
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            raise UserError(
                f"token ids span {int(tokens.min())}..{int(tokens.max())}, but the model's "
                f"vocabulary has {vocab}: is this the model's own tokenizer?"
            )
        longest = max(fed_lengths(table), default=0)
        if longest > positions:
            raise UserError(
                f"a sequence has {longest} tokens, but the model's max_position_embeddings is "
                f"{positions}: shorten prompts or responses"
            )

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

        def forward_step(packs_left: Iterator[Pack], model: torch.nn.Module) -> Any:
            pack = next(packs_left)
            params = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=pack.cu_seqlens,
                cu_seqlens_kv=pack.cu_seqlens,
                max_seqlen_q=pack.max_seqlen,
                max_seqlen_kv=pack.max_seqlen,
            )
            output = model(
                pack.tokens_T[None], pack.positions_T[None], None, packed_seq_params=params
            )

            def loss(hidden_1TH: Tensor) -> Any:
                gpt = self.stages[-1].gpt
                logprobs_N, entropy_N = linear_logprob_and_entropy(
                    head_input(gpt, hidden_1TH, pack.slots_N),
                    head_weight(gpt),
                    pack.targets_N,
                    tp_group=self.topology.groups.tp,
                    temperature=self.temperature,
                    entropy_temperature=self.entropy_temperature,
                    vocab_size=self.shape.vocab_size,
                )
                value, report = loss_of(pack, logprobs_N, entropy_N)
                # The middle number would be megatron's per-token denominator; ours is in `value`.
                return value, torch.tensor(0, dtype=torch.int), report

            return output, loss

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(packs) for _ in self.modules],
            model=self.modules,
            num_microbatches=len(packs),
            seq_length=1,  # read from the tensors: variable_seq_lengths
            micro_batch_size=1,
            forward_only=forward_only,
        )
