"""Sequences padded for the CPU's attention, against torch's pad_sequence and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from megafork.model.layers import PaddedRuns, similar_runs

LENGTHS = {
    "one": [7],
    "single tokens": [1, 1, 1],
    "uneven": [3, 1, 40, 2, 37, 39, 1],
    "descending": [90, 64, 33, 12, 5, 1],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_padding_is_torchs_and_comes_back(lengths):
    torch.manual_seed(0)
    rows = torch.randn(sum(lengths), 2, 3, requires_grad=True)
    runs = list(similar_runs(lengths))
    assert (len(runs) > 1) == (lengths == LENGTHS["uneven"] or lengths == LENGTHS["descending"])
    padded = PaddedRuns(lengths, runs, rows.device)
    parts = padded.pad(rows)
    sequences = rows.split(lengths)
    expected = [pad_sequence(list(sequences[a:b]), batch_first=True) for a, b in runs]
    for ours, theirs in zip(parts, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(padded.unpad(parts), rows)

    weights = [torch.randn_like(part) for part in parts]
    ours, theirs = (
        torch.autograd.grad(
            sum((part * w).sum() for part, w in zip(found, weights, strict=True)), rows
        )[0]
        for found in (parts, expected)
    )
    assert torch.equal(ours, theirs)

    grad = torch.randn_like(rows)
    leaves = [part.detach().requires_grad_() for part in parts]
    found = torch.autograd.grad((padded.unpad(leaves) * grad).sum(), leaves)
    for ours, own in zip(found, padded.pad(grad), strict=True):
        assert torch.equal(ours, own)  # nothing for what is behind a sequence
