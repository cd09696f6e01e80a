"""A model in its layout, and megatron's schedule over packs of a token table.

What happens with the hidden states of the last stage is for those who use it: log-probabilities
and entropies (scorer.py), values (trainer/critic.py). Every rank knows the lengths of all samples
of a token table, and so every plan, denominator and shape, without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.data.packing import Pack, build_pack, fed_lengths, plan_micro_batches
from megafork.data.token_table import TokenTable
from megafork.errors import UserError
from megafork.model.gpt import Head
from megafork.model.hf_model import open_model
from megafork.model.weights import build_stages, load_weights, mark_tensor_parallel
from megafork.ops import kernels
from megafork.parallel import backend
from megafork.parallel.mesh import Mesh
from megafork.parallel.zigzag import Zigzag
from megafork.system import heap


class PackedModel:
    """A model in its layout, loaded from an HF folder. Collective.

    Raises UserError on all ranks where one has another shape, layout, budget or head than rank 0.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
        *,
        micro_batch_tokens: int,
        head: Head = "vocabulary",
    ) -> None:
        folder = open_model(model.path, value_head=head == "value")
        self.shape = folder.shape
        self.shape.check(model, parallel)
        self.mesh = mesh
        mesh.require_equal(
            "models",
            vars(self.shape)
            | model.model_dump(exclude={"path"})
            | parallel.model_dump()
            | {
                "micro_batch_tokens": micro_batch_tokens,
                "torch": torch.__version__,
                "megatron-core": megatron.core.__version__,
                "TransformerEngine": backend.has_transformer_engine(),
                "the Triton head": kernels.usable(torch.empty(0, device=mesh.device)),
            },
        )
        self.micro_batch_tokens = micro_batch_tokens
        self.part = Zigzag(
            mesh.cp_rank, mesh.cp_size, parallel.tp if parallel.sequence_parallel else 1
        )
        # The interleaved schedule goes through the micro-batches in rounds of pp.
        self.count_multiple = mesh.pp_size if parallel.vpp > 1 else 1
        self.stages = build_stages(self.shape, model, parallel, mesh, head)
        mark_tensor_parallel(self.stages)
        load_weights(self.stages, folder.weights, mesh)
        self.modules: list[torch.nn.Module] = [stage.gpt for stage in self.stages]
        """What the schedule runs: the stages, or what a subclass wraps them in."""

    def packs(self, table: TokenTable) -> list[Pack]:
        """This rank's part of its micro-batches of the table, whose rows it holds. Collective."""
        self._check(table)
        return [
            build_pack(table, samples, part=self.part, device=self.mesh.device)
            for samples in self._plan(table)[self.mesh.dp_rank]
        ]

    def replicas(self, table: TokenTable) -> Tensor:
        """int64 [B]: the data-parallel rank that each sample's micro-batch is on. Needs no rows."""
        replica_B = torch.empty(table.num_samples, dtype=torch.int64)
        for rank, micro_batches in enumerate(self._plan(table)):
            replica_B[[sample for samples in micro_batches for sample in samples]] = rank
        return replica_B

    def _plan(self, table: TokenTable) -> list[list[list[int]]]:
        """Samples by data-parallel rank and micro-batch."""
        return plan_micro_batches(
            [self.part.padded(length) for length in fed_lengths(table)],
            dp_size=self.mesh.dp_size,
            token_budget=self.micro_batch_tokens,
            cp_size=self.mesh.cp_size,
            count_multiple=self.count_multiple,
        )

    def _check(self, table: TokenTable) -> None:
        """Raise UserError, on all ranks or none, for tokens or lengths beyond the model.
        Collective."""
        vocab, positions = self.shape.vocab_size, self.shape.max_positions
        tokens = torch.cat([table.prompt_ids_P, table.token_R, torch.zeros(1, dtype=torch.int64)])
        span = torch.stack([-tokens.min(), tokens.max()]).to(self.mesh.device)
        dist.all_reduce(span, op=dist.ReduceOp.MAX)
        smallest, largest = -int(span[0]), int(span[1])
        if not 0 <= smallest <= largest < vocab:
            raise UserError(
                f"token id {smallest if smallest < 0 else largest} is not in the model's "
                f"vocabulary of {vocab}: is this the model's own tokenizer?"
            )
        longest = max(fed_lengths(table), default=0)
        if longest > positions:
            raise UserError(
                f"a sequence has {longest} tokens, but the model's max_position_embeddings is "
                f"{positions}: shorten prompts or responses"
            )

    def run_hidden(
        self,
        packs: Sequence[Pack],
        loss_of: Callable[[Pack, Tensor], tuple[Tensor, dict]],
        *,
        forward_only: bool,
    ) -> list[dict]:
        """megatron's schedule over the packs.

        On the last stage `loss_of` gets each pack's hidden states ([1, T, H], T/tp of them under
        sequence parallelism) and gives (loss, report); the reports come back in the packs' order.
        """

        def forward_step(packs_left: Iterator[Pack], model: torch.nn.Module) -> Any:
            heap.return_free_heap()  # of the micro-batch before
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
                value, report = loss_of(pack, hidden_1TH)
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
