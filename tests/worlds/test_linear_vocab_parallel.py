"""linear_logprob_and_entropy: the head and its softmax without [T, V], against float64."""

from __future__ import annotations

import pytest
import torch

from megafork.ops.vocab_parallel import linear_logprob_and_entropy, logprob_and_entropy
from tests.helpers import linear_head
from tests.helpers.linear_head import case, reference, relative, run, upstream


def test_bfloat16_inputs_against_the_same_inputs_in_float64():
    x, w, targets = case(30, 20_000, dtype=torch.bfloat16)
    logprobs, entropy, grad_x, grad_w = run(x, w, targets)
    exact = reference(x, w, targets)
    assert (logprobs - exact[0]).abs().max() <= 2e-5
    assert (entropy - exact[1]).abs().max() <= 2e-5
    assert grad_x.dtype == grad_w.dtype == torch.bfloat16
    assert relative(grad_x, exact[2]) <= 2**-8  # bfloat16's own rounding
    assert relative(grad_w, exact[3]) <= 2**-8


def test_the_weight_gradient_goes_into_main_grad_in_float32():
    x, w, targets = case(30, 9_000, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(w.clone())
    weight.main_grad = torch.ones(w.shape, dtype=torch.float32)
    logprobs, entropy = linear_logprob_and_entropy(x, weight, targets)
    a, b = upstream(30)
    (logprobs * a + entropy * b).sum().backward()
    exact = reference(x, w, targets)
    assert relative(weight.main_grad - 1.0, exact[3]) <= 1e-5
    assert (weight.grad == 0).all()  # what the data-parallel hook adds on top


def test_it_is_the_other_function_on_the_product():
    x, w, targets = case(64, 500)
    ours = linear_logprob_and_entropy(x, w, targets, vocab_size=450 + 50)
    for a, b in zip(ours, logprob_and_entropy(x @ w.T, targets), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VH": torch.zeros(7, 3)}, r"must be \[T, H\], \[V, H\]"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be positive"),
        ({"targets_T": torch.tensor([0, 9])}, r"targets span 0\.\.9"),
        ({"vocab_size": 8}, r"vocab_size=8 must be in 1\.\.7"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "hidden_TH": torch.zeros(2, 4),
        "weight_VH": torch.zeros(7, 4),
        "targets_T": torch.tensor([0, 6]),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_logprob_and_entropy(**arguments)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(chunk_tokens, temperature):
    linear_head.check_values_and_gradients(chunk_tokens, temperature)


def test_at_the_vocabulary_of_qwen3():
    linear_head.check_at_the_vocabulary_of_qwen3()


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it():
    """So the update may run the head on selected rows only and still start at ratio 1."""
    linear_head.check_a_rows_bits_do_not_depend_on_the_rows_beside_it()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_nor_does_it_where_threads_share_a_product(threads, dtype):
    """Of as many features as published models have, which more threads sum in other pieces."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for hidden in (896, 1024, 1536):
            linear_head.check_a_rows_bits_do_not_depend_on_the_rows_beside_it(hidden, dtype)
    finally:
        torch.set_num_threads(before)


def test_no_tokens_give_connected_zeros():
    linear_head.check_no_tokens_give_connected_zeros()


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_over_shards_with_padding(tp, with_main_grad):
    linear_head.check_over_shards_with_padding(tp, with_main_grad)
