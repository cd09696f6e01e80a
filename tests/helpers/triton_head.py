"""Checks of the Triton head that its interpreter and a GPU both have to pass."""

from __future__ import annotations

import pytest
import torch

from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from tests.helpers import linear_head as linear

BFLOAT16 = 2**-8  # what rounding moves: the gradients of the logits and, once more, the result's


def in_triton(test, **arguments):
    """A test, and that its calls took the kernels."""
    from megafork.ops.kernels import linear_head

    calls = []
    launch = linear_head.add_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_head, "add_up", lambda *args: calls.append(launch(*args)))
        test(**arguments)
    assert calls


def uneven_sizes_and_temperatures():
    x, w, targets = linear.case(150, 300, hidden=50)
    per_token = torch.linspace(0.5, 2.0, 150)
    for t, t_H in [(per_token, None), (0.8, per_token), (per_token, 1.5)]:
        ours = linear.run(x, w, targets, temperature=t, entropy_temperature=t_H)
        exact = reference_at(x, w, targets, t, t if t_H is None else t_H)
        for value, expected in zip(ours[:2], exact[:2], strict=True):
            assert (value - expected).abs().max() <= 1e-5
        for gradient, expected in zip(ours[2:], exact[2:], strict=True):
            assert linear.relative(gradient, expected) <= 1e-5


def reference_at(x, w, targets, temperature, entropy_temperature):
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    t, t_H = (
        torch.as_tensor(t).double().reshape(-1, 1) for t in (temperature, entropy_temperature)
    )
    chosen = (x @ w.T / t).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    entropy = torch.special.entr((x @ w.T / t_H).softmax(-1)).sum(-1)
    a, b = linear.upstream(len(targets))
    (chosen * a + entropy * b).sum().backward()
    return chosen.detach(), entropy.detach(), x.grad, w.grad


def bfloat16_inputs():
    x, w, targets = linear.case(30, 5_000, dtype=torch.bfloat16)
    exact = linear.reference(x, w, targets)
    ours = linear.run(x, w, targets)
    assert (ours[0] - exact[0]).abs().max() <= 2e-5
    assert (ours[1] - exact[1]).abs().max() <= 2e-5
    assert ours[2].dtype == ours[3].dtype == torch.bfloat16
    assert linear.relative(ours[2], exact[2]) <= 2 * BFLOAT16
    assert linear.relative(ours[3], exact[3]) <= 2 * BFLOAT16

    weight = torch.nn.Parameter(w.clone())
    weight.main_grad = torch.ones(w.shape, dtype=torch.float32)
    outputs = linear_logprob_and_entropy(x, weight, targets)
    sum(
        (out * factor).sum() for out, factor in zip(outputs, linear.upstream(30), strict=True)
    ).backward()
    assert linear.relative(weight.main_grad - 1.0, exact[3]) <= BFLOAT16
    assert (weight.grad == 0).all()


def one_upstream_gradient_is_enough():
    x, w, targets = linear.case(20, 200)
    whole = linear.run(x, w, targets)
    a, b = linear.upstream(20)
    total = torch.zeros_like(w)
    for index, factor in enumerate((a, b)):
        weight = w.clone().requires_grad_()
        (linear_logprob_and_entropy(x, weight, targets)[index] * factor).sum().backward()
        total += weight.grad
    assert linear.relative(total, whole[3]) <= 1e-6


def other_dtypes():
    """float16, and two different dtypes: the products are float32's."""
    for of_x, of_w in [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]:
        x, w, targets = linear.case(20, 200)
        x, w = x.to(of_x), w.to(of_w)
        ours, exact = linear.run(x, w, targets), linear.reference(x, w, targets)
        assert (ours[1] - exact[1]).abs().max() <= 2e-5
        assert linear.relative(ours[2], exact[2]) <= BFLOAT16
        assert linear.relative(ours[3], exact[3]) <= 2**-11


def special_logits():
    """Feature 0 is 1 in the hidden states, so the weight's column 0 is added to the logits."""
    x, w, targets = linear.case(12, 500)
    x[:, 0] = 1.0
    targets[:] = 499
    plain = linear_logprob_and_entropy(x, w, targets)
    # Without the columns of a whole tile, and some of another.
    banned = w.clone()
    banned[100:300, 0] = -torch.inf
    allowed = torch.cat([w[:100], w[300:]])
    without = linear_logprob_and_entropy(x, allowed, torch.full_like(targets, 299))
    for ours, expected in zip(linear_logprob_and_entropy(x, banned, targets), without, strict=True):
        assert (ours - expected).abs().max() <= 1e-6
    assert (
        linear_logprob_and_entropy(x, banned, torch.full_like(targets, 200))[0].eq(-torch.inf).all()
    )

    weight = banned.clone().requires_grad_()
    sum(out.sum() for out in linear_logprob_and_entropy(x, weight, targets)).backward()
    assert weight.grad.isfinite().all()
    assert (weight.grad[100:300] == 0).all()

    nothing = torch.full_like(w, 0.0)
    nothing[:, 0] = -torch.inf
    assert all(out.isnan().all() for out in linear_logprob_and_entropy(x, nothing, targets))
    for bad in (torch.nan, torch.inf):
        broken = w.clone()
        broken[450, 0] = bad
        assert all(out.isnan().all() for out in linear_logprob_and_entropy(x, broken, targets))
        one_row = x.clone()
        one_row[3, 5] = bad
        for ours, expected in zip(
            linear_logprob_and_entropy(one_row, w, targets), plain, strict=True
        ):
            assert ours[3].isnan()
            assert torch.equal(ours[:3], expected[:3]) and torch.equal(ours[4:], expected[4:])
