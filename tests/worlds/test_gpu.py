"""What CUDA selects: the same operations and one step, on a GPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from megafork.config import ModelConfig, ParallelConfig
from megafork.data.token_table import token_table
from megafork.model.scorer import Scorer
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.ops.vocab_parallel import linear_logprob_and_entropy, logprob_and_entropy
from megafork.parallel.mesh import initialize, shutdown
from tests.helpers import linear_head as linear
from tests.helpers import reference, triton_head

DEVICE = "cuda"
NUM_TOKENS = 8192
VOCAB = 151_936
PADDED = 152_064  # a multiple of 128 x 4
TENSOR_CORES = 1e-4  # nats: they cut their float32 sums off, 64 times for 1,024 features

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


@pytest.fixture
def on_cuda(monkeypatch):
    """The head's tests make their tensors on the GPU."""

    def case(*sizes, original=linear.case, **options):
        with torch.device("cpu"):
            return tuple(t.to(DEVICE) for t in original(*sizes, **options))

    monkeypatch.setattr(linear, "case", case)
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (linear.check_values_and_gradients, {"chunk_tokens": None, "temperature": 1.0}),
        (linear.check_values_and_gradients, {"chunk_tokens": 7, "temperature": 0.7}),
        (linear.check_at_the_vocabulary_of_qwen3, {}),
        (linear.check_a_rows_bits_do_not_depend_on_the_rows_beside_it, {}),
        (linear.check_no_tokens_give_connected_zeros, {}),
        (triton_head.uneven_sizes_and_temperatures, {}),
        (triton_head.bfloat16_inputs, {}),
        (triton_head.one_upstream_gradient_is_enough, {}),
        (triton_head.other_dtypes, {}),
        (triton_head.special_logits, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_triton_head_as_on_a_cpu(on_cuda, test, arguments):
    triton_head.in_triton(test, **arguments)


def test_the_torch_head_as_on_a_cpu(on_cuda, monkeypatch):
    monkeypatch.setenv("MEGAFORK_TRITON", "0")
    linear.check_values_and_gradients(chunk_tokens=None, temperature=0.7)
    triton_head.special_logits()


@pytest.fixture(scope="module")
def large():
    """8,192 tokens of a 0.6B model's head in bfloat16, the vocabulary padded for TP up to 4."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    options = {"generator": generator, "device": DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(NUM_TOKENS, 1024, **options)
    w = torch.nn.Parameter(torch.randn(PADDED, 1024, **options) * 4 / 32)
    targets = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator, device=DEVICE)
    return x, w, targets


def test_the_large_head_against_float64(large):
    x, w, targets = large
    logprobs, entropy = linear_logprob_and_entropy(x, w, targets, vocab_size=VOCAB)
    rows = torch.arange(0, NUM_TOKENS, 97, device=DEVICE)
    exact = (x[rows].double() @ w[:VOCAB].detach().double().T).log_softmax(-1)
    expected = exact.gather(1, targets[rows, None])[:, 0]
    assert (logprobs[rows] - expected).abs().max() <= TENSOR_CORES
    assert (entropy[rows] - torch.special.entr(exact.exp()).sum(-1)).abs().max() <= TENSOR_CORES


def test_neither_rows_nor_shards_move_a_bit_of_the_large_head(large):
    """A row's tiles are the same wherever they are, so a rotation by whole tiles moves nothing."""
    x, w, targets = large
    logprobs, entropy = linear_logprob_and_entropy(x, w, targets)
    some = torch.randperm(NUM_TOKENS, device=DEVICE)[: NUM_TOKENS // 5].sort().values
    of_some = linear_logprob_and_entropy(x[some], w, targets[some])
    assert torch.equal(of_some[0], logprobs[some])
    assert torch.equal(of_some[1], entropy[some])
    rotated = linear_logprob_and_entropy(x, w.roll(384, 0), (targets + 384) % PADDED)
    assert torch.equal(rotated[0], logprobs)
    assert torch.equal(rotated[1], entropy)


def test_the_large_heads_gradients_and_memory(large):
    x, w, targets = large
    hidden, weight = x.clone().requires_grad_(), w
    weight.main_grad = torch.zeros(w.shape, dtype=torch.float32, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.device(DEVICE):
        a, b = linear.upstream(NUM_TOKENS)
    logprobs, entropy = linear_logprob_and_entropy(hidden, weight, targets, vocab_size=VOCAB)
    (logprobs * a + entropy * b).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= NUM_TOKENS * PADDED * 4 / 8, f"{peak / 2**20:.0f} MiB"

    exact_x, exact_w = torch.zeros(x.shape).double(), torch.zeros(w.shape).double()
    exact_x, exact_w = exact_x.to(DEVICE), exact_w.to(DEVICE)
    for rows in torch.arange(NUM_TOKENS, device=DEVICE).split(512):
        log_p = (x[rows].double() @ w[:VOCAB].detach().double().T).log_softmax(-1)
        p = log_p.exp()
        grad = -p * (log_p + torch.special.entr(p).sum(-1, keepdim=True)) * b[rows, None]
        grad -= p * a[rows, None]
        grad.scatter_add_(1, targets[rows, None], a[rows, None].double())
        exact_x[rows] = grad @ w[:VOCAB].detach().double()
        exact_w[:VOCAB] += grad.T @ x[rows].double()
    assert linear.relative(weight.main_grad, exact_w) <= triton_head.BFLOAT16
    assert linear.relative(hidden.grad, exact_x) <= 2 * triton_head.BFLOAT16
    assert (weight.main_grad[VOCAB:] == 0).all()


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
