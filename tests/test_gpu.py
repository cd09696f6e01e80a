"""What CUDA selects: the same operations and one step, on a GPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from megafork.config import ModelConfig, ParallelConfig
from megafork.model.scorer import Scorer
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.ops.vocab_parallel import linear_logprob_and_entropy, logprob_and_entropy
from megafork.parallel.topology import initialize, shutdown
from megafork.types import token_table
from tests import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_logprob_and_entropy_against_float64():
    logits = (torch.randn(64, 151_936, device="cuda") * 4).requires_grad_()
    targets = torch.randint(0, 151_936, (64,), device="cuda")
    logprobs, entropy = logprob_and_entropy(logits, targets)
    (logprobs.sum() + entropy.sum()).backward()
    exact = logits.detach().double().requires_grad_()
    log_p = exact.log_softmax(-1)
    expected = log_p.gather(1, targets[:, None])[:, 0], torch.special.entr(log_p.exp()).sum(-1)
    (expected[0].sum() + expected[1].sum()).backward()
    assert (entropy - expected[1]).abs().max() <= 2e-6
    assert (logprobs - expected[0]).abs().max() <= 4e-6
    assert (logits.grad - exact.grad).abs().max() <= 1e-6 * exact.grad.abs().max()


def test_the_head_is_the_operation_on_its_product():
    hidden = torch.randn(50, 256, device="cuda")
    weight = torch.randn(9000, 256, device="cuda") / 4
    targets = torch.randint(0, 9000, (50,), device="cuda")
    ours = linear_logprob_and_entropy(hidden, weight, targets, chunk_tokens=20)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert (ours[0] - exact.gather(1, targets[:, None])[:, 0]).abs().max() <= 2e-5
    assert (ours[1] - torch.special.entr(exact.exp()).sum(-1)).abs().max() <= 2e-5


def test_threshold_against_sorting():
    values = torch.randn(1_000_003, device="cuda")
    found = top_fraction_threshold(values, torch.ones_like(values).bool(), 0.2)
    assert found.threshold == values.sort(descending=True).values[200_000].item()
    assert found.num_kept == 200_001


def test_scores_against_transformers(tmp_path):
    """NCCL with one rank, and TransformerEngine's layers where it is installed."""
    folder = reference.save_model(tmp_path, tied=False)
    parallel = ParallelConfig()
    model = ModelConfig(path=str(folder), dtype="float32")
    scorer = Scorer(model, parallel, initialize(parallel), micro_batch_tokens=256)
    table = token_table(reference.make_groups(3, 3))
    scores = scorer.score(table)
    shutdown()
    expected = reference.load_model(folder, torch.float64)
    for b in range(table.num_samples):
        response = table.token_R[table.rows(b)].tolist()
        with torch.no_grad():
            z = reference.response_logits(expected, table.prompt(b).tolist(), response)
        _, entropies = reference.logprobs_and_entropies(z, response)
        mine = torch.isin(scores.rows_N, torch.arange(table.num_rows)[table.rows(b)])
        assert (scores.entropy_N[mine] - entropies).abs().max() <= 1e-4
