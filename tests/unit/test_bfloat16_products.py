"""What replaces torch's bfloat16 products on a processor that has none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megafork.ops import bfloat16_products
from tests.helpers.commands import ROOT

IN_A_PROCESS = """
import torch
from megafork.ops import bfloat16_products
bfloat16_products.are_slow = lambda: True
{replaced}
torch.manual_seed(0)
a, b, c = torch.randn(5, 300), torch.randn(300, 7), torch.randn(7)
batch, other, more = torch.randn(3, 5, 40), torch.randn(3, 40, 7), torch.randn(3, 5, 7)
found = []
for dtype in (torch.float32, torch.bfloat16):
    x, y, z = (t.to(dtype, copy=True).requires_grad_() for t in (a, b, c))
    results = [
        torch.mm(x, y), torch.addmm(z, x, y, beta=0.5, alpha=2), torch.nn.functional.linear(x, y.T),
        torch.bmm(batch.to(dtype), other.to(dtype)), x.T[:, ::2] @ x[::2], x[:0] @ y,
        torch.baddbmm(more.to(dtype), batch.to(dtype), other.to(dtype), beta=0.0, alpha=3),
    ]
    results[1].sum().backward()
    found.append([*(r.detach() for r in results), x.grad, y.grad, z.grad])
torch.save(found, "{path}")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """torch's own, those of the replacement, and with some rows left to torch: each a pair, of
    float32 and of bfloat16."""
    found = []
    for replaced in ("", *(f"bfloat16_products.replace_where_slow({few})" for few in (0, 5))):
        path = tmp_path_factory.mktemp("products") / "results"
        program = IN_A_PROCESS.format(replaced=replaced, path=path)
        subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, check=True)
        found.append(torch.load(path, weights_only=True))
    return found


def test_float32_keeps_its_bits(results):
    (own, _), (replaced, _), (partly, _) = results
    for before, *after in zip(own, replaced, partly, strict=True):
        assert all(torch.equal(before, other) for other in after)


def test_bfloat16_is_the_same_but_for_the_order_of_the_sums(results):
    """Within one unit in the last place of what float32 gives, as torch's own is."""
    (exact, own), (_, replaced), (_, partly) = results
    for products in (own, replaced, partly):
        for result, reference in zip(products, exact, strict=True):
            assert result.dtype == torch.bfloat16 and result.shape == reference.shape
    for before, *after in zip(own, replaced, partly, strict=True):
        for other in after:
            torch.testing.assert_close(before, other, rtol=2**-7, atol=2**-7)
    assert torch.equal(own[0], partly[0])  # five rows


def test_a_processor_that_has_them_keeps_its_own(monkeypatch):
    monkeypatch.setattr(bfloat16_products, "are_slow", lambda: False)
    bfloat16_products.replace_where_slow.cache_clear()
    assert bfloat16_products.replace_where_slow() is None
    bfloat16_products.replace_where_slow.cache_clear()
