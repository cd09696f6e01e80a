"""The layout-free truth: every response token has a key and a row in the token table.

A key is (sample uid, position in the response). Packs, shards and micro-batches are views of the
table. Whatever must not depend on the layout (mini-batch membership, random selection, reports)
is a function of keys, never of rank, arrival order or packing.

Shapes: B samples (responses), R rows (response tokens of all samples, in order), P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megafork.data.sample import Group, Sample, known_columns, version_runs


@dataclass(frozen=True)
class TokenTable:
    """The samples of a batch, with the rows of those samples whose tokens are here.

    Every rank knows what every sample is (lengths, reward, place in the loss), so plans and
    denominators need no communication. Rows are only where they are worked on: `held_B` says of
    which samples (trainer/rows.py fetches them; a table made from groups holds all).
    """

    uid_B: Tensor
    """int64, unique over the whole run"""
    group_B: Tensor
    """int64, the group's prompt index"""
    prompt_lengths_B: Tensor
    """int64"""
    response_lengths_B: Tensor
    """int64, of all samples"""
    num_loss_tokens_B: Tensor
    """int64, of all samples: each one's tokens of the loss mask"""
    reward_B: Tensor
    accuracy_B: Tensor
    truncated_B: Tensor
    held_B: Tensor
    """bool: whose rows are here"""
    prompt_ids_P: Tensor
    """int64, of all samples, one after the other"""
    token_R: Tensor
    """int64, the response's token ids, EOS included"""
    rollout_logprob_R: Tensor
    """float32, the engine's"""
    policy_version_R: Tensor
    """int64, the version that sampled the token"""
    loss_mask_R: Tensor
    """bool: takes part in the loss (contained in the response, after overlong filtering)"""
    advantage_R: Tensor
    """float32; NaN until computed"""

    @property
    def num_samples(self) -> int:
        return len(self.uid_B)

    @property
    def num_rows(self) -> int:
        """Rows that are here."""
        return len(self.token_R)

    @property
    def num_tokens(self) -> int:
        """Response tokens of all samples."""
        return int(self.response_lengths_B.sum())

    @property
    def num_loss_tokens(self) -> int:
        """The loss denominator: tokens of the loss mask over all ranks."""
        return int(self.num_loss_tokens_B.sum())

    @property
    def num_loss_sequences(self) -> int:
        """Samples with a token in the loss mask, over all ranks."""
        return int((self.num_loss_tokens_B > 0).sum())

    @cached_property
    def held_lengths_B(self) -> Tensor:
        """int64: rows of each sample that are here, all or none."""
        return torch.where(self.held_B, self.response_lengths_B, 0)

    @cached_property
    def offsets(self) -> Tensor:
        """int64 [B+1]: sample b's rows are offsets[b] .. offsets[b+1]-1; none if not held."""
        return _offsets(self.held_lengths_B)

    @cached_property
    def prompt_offsets(self) -> Tensor:
        """int64 [B+1]: where each sample's prompt begins in prompt_ids_P."""
        return _offsets(self.prompt_lengths_B)

    @property
    def sample_R(self) -> Tensor:
        """int64: which sample a row belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_samples), self.held_lengths_B)

    @property
    def position_R(self) -> Tensor:
        """int64: position of a row's token in its response."""
        return torch.arange(self.num_rows) - self.offsets[:-1][self.sample_R]

    @property
    def key_R(self) -> Tensor:
        """int64 [R, 2]: (sample uid, position), the row's name at every layout."""
        return torch.stack([self.uid_B[self.sample_R], self.position_R], 1)

    def prompt(self, sample: int) -> Tensor:
        return self.prompt_ids_P[self.prompt_offsets[sample] : self.prompt_offsets[sample + 1]]

    def rows(self, sample: int) -> slice:
        return slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))

    def take(self, samples: Sequence[int] | Tensor) -> TokenTable:
        """Return the table of these samples, in this order."""
        picked = torch.as_tensor(samples, dtype=torch.int64)
        rows = self.rows_of(picked)
        return TokenTable(
            prompt_ids_P=self.prompt_ids_P[_ranges(self.prompt_offsets, picked)],
            **{name: getattr(self, name)[picked] for name in _PER_SAMPLE},
            **{name: getattr(self, name)[rows] for name in _PER_ROW},
        )

    def rows_of(self, samples: Tensor) -> Tensor:
        """Return the rows of these samples, int64, in this order."""
        return _ranges(self.offsets, samples)

    def with_rows(self, held_B: Tensor, **columns: Tensor) -> TokenTable:
        """Return the same samples with the rows of those in held_B, one after the other."""
        return replace(self, held_B=held_B, **columns)

    def with_tokens(self, groups: Iterable[Group]) -> TokenTable:
        """Return the same samples with the rows of those in `groups`, which may hold others too.

        A response is in the loss mask as a whole or not at all, as `num_loss_tokens_B` says.
        """
        found = {sample.uid: (group, sample) for group in groups for sample in group.samples}
        held_B = torch.tensor([uid in found for uid in self.uid_B.tolist()], dtype=torch.bool)
        samples = [found[uid] for uid in self.uid_B[held_B].tolist()]
        lengths = [len(sample.token_ids) for _, sample in samples]
        assert lengths == self.response_lengths_B[held_B].tolist(), "other responses than known"
        token_R = _joined([s.token_ids for _, s in samples], np.int64)
        in_loss_B = (self.num_loss_tokens_B > 0)[held_B]
        return self.with_rows(
            held_B,
            token_R=token_R,
            rollout_logprob_R=_joined([s.logprobs for _, s in samples], np.float32),
            policy_version_R=_version_R(samples),
            loss_mask_R=_repeated(in_loss_B, self.response_lengths_B[held_B]),
            advantage_R=torch.full((len(token_R),), torch.nan),
        )

    def with_columns(self, **columns: Tensor) -> TokenTable:
        assert "loss_mask_R" not in columns, "with_loss_mask counts its tokens too"
        return replace(self, **columns)

    def with_loss_mask(self, loss_mask_R: Tensor) -> TokenTable:
        """Replace the loss mask, and count its tokens. The table has to hold all rows."""
        assert self.held_B.all()
        counts_B = torch.bincount(self.sample_R[loss_mask_R], minlength=self.num_samples)
        return replace(self, loss_mask_R=loss_mask_R, num_loss_tokens_B=counts_B)

    def minibatches(self, groups_per_minibatch: int, seed: int) -> list[TokenTable]:
        """Return the tables of `minibatch_samples`."""
        return [self.take(found) for found in self.minibatch_samples(groups_per_minibatch, seed)]

    def minibatch_samples(self, groups_per_minibatch: int, seed: int) -> list[Tensor]:
        """Split by whole groups in a seeded order that depends on the groups' indices only.

        Returns the indices of each mini-batch's samples, int64, in the order of their uids, so that
        its table is the same however the rollout batch was ordered.
        """
        groups = self.group_B.unique()
        order = groups[hash64(groups, torch.tensor(seed)).argsort()]
        by_uid = self.uid_B.argsort()
        return [
            by_uid[torch.isin(self.group_B[by_uid], chunk)]
            for chunk in order.split(groups_per_minibatch)
        ]


_PER_SAMPLE = (
    "uid_B",
    "group_B",
    "prompt_lengths_B",
    "response_lengths_B",
    "num_loss_tokens_B",
    "reward_B",
    "accuracy_B",
    "truncated_B",
    "held_B",
)
_PER_ROW = ("token_R", "rollout_logprob_R", "policy_version_R", "loss_mask_R", "advantage_R")


def token_table(groups: Sequence[Group], *, overlong_filtering: bool = False) -> TokenTable:
    """Make the table of finished groups with all rows; algorithms/ replaces the NaN advantages.

    overlong_filtering: truncated responses keep their rows but leave the loss mask.
    """
    return known_table(groups, overlong_filtering=overlong_filtering).with_tokens(groups)


def known_table(groups: Sequence[Group], *, overlong_filtering: bool = False) -> TokenTable:
    """Make the table without rows: what is known of the samples where their tokens are not."""
    return table_of(known_columns(groups, overlong_filtering=overlong_filtering))


def table_of(columns: Mapping[str, np.ndarray]) -> TokenTable:
    """Make the table without rows of `known_columns`, whose arrays it takes over."""
    found = {name: torch.from_numpy(column) for name, column in columns.items()}
    truncated_B = found.pop("truncated_B").bool()
    return TokenTable(
        **found,
        truncated_B=truncated_B,
        held_B=torch.zeros_like(truncated_B),
        token_R=torch.empty(0, dtype=torch.int64),
        rollout_logprob_R=torch.empty(0),
        policy_version_R=torch.empty(0, dtype=torch.int64),
        loss_mask_R=torch.empty(0, dtype=torch.bool),
        advantage_R=torch.empty(0),
    )


def _version_R(samples: Sequence[tuple[Group, Sample]]) -> Tensor:
    """Return the policy version of each token, int64."""
    runs = [
        run
        for group, sample in samples
        for run in version_runs(sample.versions, group.policy_version, len(sample.token_ids))
    ]
    versions, lengths = torch.tensor(runs, dtype=torch.int64).reshape(-1, 2).T
    return _repeated(versions, lengths)


def hash64(*parts: Tensor) -> Tensor:
    """Return a well-mixed int64 of integer parts (splitmix64), the same on every machine."""
    mixed = torch.zeros((), dtype=torch.int64)
    for part in parts:
        mixed = _splitmix(mixed ^ _splitmix(part.long()))
    return mixed


def _splitmix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically; int64's own shift would copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _joined(parts: Sequence[Sequence[float] | np.ndarray], kind: type[np.number]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, kind), *parts], dtype=kind))


def _repeated(values: Tensor, lengths: Tensor) -> Tensor:
    """Repeat each value as its length says; torch's function makes an index of all first."""
    return torch.from_numpy(np.repeat(values.numpy(), lengths.numpy()))


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ranges(offsets: Tensor, picked: Tensor) -> Tensor:
    """Return the indices offsets[b] .. offsets[b+1]-1 of every picked b, joined."""
    lengths = offsets.diff()[picked]
    starts = torch.repeat_interleave(offsets[picked] - _offsets(lengths)[:-1], lengths)
    return starts + torch.arange(len(starts))
