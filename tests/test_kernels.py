"""The Triton head on the CPU, under Triton's interpreter, and whether it compiles for a Hopper GPU.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
There the public function takes the Triton version, and the torch version's tests run unchanged.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megafork.ops import kernels
from megafork.ops.softmax_rows import Rows, Shard
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from tests import test_linear_vocab_parallel as linear
from tests.ranks import run_ranks

TRITON = Path(__file__).parent.parent / ".venv" / "triton"  # tools/setup_cpu.sh --test
BFLOAT16 = 2**-8  # what rounding moves: the gradients of the logits and, once more, the result's


def triton_process(interpret):
    """`run(function, *args, **options)` in one fresh process that has Triton."""
    with pytest.MonkeyPatch.context() as patch:
        if TRITON.exists():
            patch.syspath_prepend(TRITON)  # a spawned process gets this one's path
        elif importlib.util.find_spec("triton") is None:
            missing = "needs Triton: run tools/setup_cpu.sh --test"
            assert not os.environ.get("CI"), missing
            pytest.skip(missing)
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            yield lambda function, *args, **options: pool.submit(
                function, *args, **options
            ).result()


@pytest.fixture(scope="module")
def interpreted():
    yield from triton_process(interpret=True)


@pytest.fixture(scope="module")
def compiler():
    yield from triton_process(interpret=False)


def in_triton(test, **arguments):
    """A test, and that its calls took the kernels."""
    from megafork.ops.kernels import linear_head

    calls = []
    launch = linear_head.add_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_head, "add_up", lambda *args: calls.append(launch(*args)))
        test(**arguments)
    assert calls


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (linear.test_values_and_gradients, {"chunk_tokens": None, "temperature": 1.0}),
        (linear.test_values_and_gradients, {"chunk_tokens": 7, "temperature": 0.7}),
        (linear.test_no_tokens_give_connected_zeros, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_as_in_torch(interpreted, test, arguments):
    interpreted(in_triton, test, **arguments)


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_over_shards_with_padding(interpreted, tp, with_main_grad):
    interpreted(linear.test_over_shards_with_padding, tp=tp, with_main_grad=with_main_grad)


def with_exact_products(test, **arguments):
    """numpy rounds a product by the row's place in the tile, which a GPU does not: leave it nothing
    to round, so that all the rest can be compared bit by bit."""

    def case(*sizes, original=linear.case):
        x, w, targets = original(*sizes)
        return (x * 32).round() / 32, (w * 32).round() / 32, targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "case", case)
        test(**arguments)


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(interpreted):
    test = linear.test_a_rows_bits_do_not_depend_on_the_rows_beside_it
    interpreted(with_exact_products, test)


def same_bits_over_shards():
    """Shards of whole tiles: 1024 columns, of which the last ones or all of a shard are padding."""
    for vocab in (1000, 700):
        x, w, targets = linear.case(31, 1024)
        targets %= vocab
        of_tp = [run_ranks(tp, linear.sharded, x, w, targets, vocab, False) for tp in (1, 2, 4)]
        for ranks in of_tp:
            for logprobs, entropy, *_ in ranks:
                assert torch.equal(logprobs, of_tp[0][0][0])
                assert torch.equal(entropy, of_tp[0][0][1])


def test_the_number_of_shards_moves_no_bit(interpreted):
    interpreted(with_exact_products, same_bits_over_shards)


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


def test_sizes_off_the_tile_and_separate_temperatures(interpreted):
    interpreted(in_triton, uneven_sizes_and_temperatures)


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


def test_bfloat16_inputs_and_their_main_grad(interpreted):
    interpreted(in_triton, bfloat16_inputs)


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


def test_one_output_may_have_no_gradient(interpreted):
    interpreted(in_triton, one_upstream_gradient_is_enough)


def other_dtypes():
    """float16, and two different dtypes: the products are float32's."""
    for of_x, of_w in [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]:
        x, w, targets = linear.case(20, 200)
        x, w = x.to(of_x), w.to(of_w)
        ours, exact = linear.run(x, w, targets), linear.reference(x, w, targets)
        assert (ours[1] - exact[1]).abs().max() <= 2e-5
        assert linear.relative(ours[2], exact[2]) <= BFLOAT16
        assert linear.relative(ours[3], exact[3]) <= 2**-11


def test_other_dtypes(interpreted):
    interpreted(in_triton, other_dtypes)


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


def test_infinities_and_nan(interpreted):
    interpreted(in_triton, special_logits)


def nan_in_one_shard(x, w, targets):
    return linear.sharded(x, w, targets, 512, False)[:2]


def nan_reaches_every_rank():
    x, w, targets = linear.case(5, 512)
    w[400] = torch.nan
    for outputs in run_ranks(2, nan_in_one_shard, x, w, targets):
        assert all(out.isnan().all() for out in outputs)


def test_a_nan_of_one_shard_reaches_every_rank(interpreted):
    interpreted(nan_reaches_every_rank)


def switched_off():
    assert kernels.usable(torch.zeros(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAFORK_TRITON", "0")
        assert not kernels.usable(torch.zeros(1))


def test_it_can_be_switched_off(interpreted):
    interpreted(switched_off)


# ------------------------------------------------------------------ the compiler


class HopperDriver:
    """What Triton asks of a GPU's driver to compile a launch, and nothing to launch it."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_for_hopper(dtype, separate_temperature):
    """{kernel: its compiled variants} of calls with 1, 33 and 64 tokens."""
    from triton.runtime import driver

    from megafork.ops.kernels import linear_head

    def compile_launch(kernel, *operands, **sizes):
        sizes["FLOAT32"] = dtype == torch.float32
        built = kernel.warmup(*operands, grid=(1,), **sizes)
        variants.setdefault(kernel.__name__, {})[built.hash] = resources(built)

    variants = {}
    driver.set_active(HopperDriver())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_head, "_launch", compile_launch)
        for num_tokens in (1, 33, 64):
            x, w = torch.zeros(num_tokens, 128, dtype=dtype), torch.zeros(256, 128, dtype=dtype)
            t = torch.ones(num_tokens, 1)
            t_H = t if separate_temperature else None
            targets = torch.zeros(num_tokens, dtype=torch.int64)
            rows = Rows.empty(targets, Shard(0, 256), t, t_H)
            linear_head.add_up(rows, x, w, None)
            upstream, into = (t[:, 0], t[:, 0]), (torch.zeros(x.shape), torch.zeros(w.shape))
            linear_head.add_gradients(rows, x, w, upstream, into, None)
    return {kernel: list(of_kernel.values()) for kernel, of_kernel in variants.items()}


def resources(built):
    """(bytes of memory that a thread spills registers to, tensor-core instructions)."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True)
    stack = re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)
    assert stack, usage
    return int(stack[1]), built.asm["ptx"].count("wgmma.mma_async")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("separate_temperature", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_compiles_for_hopper_once_and_stays_in_registers(compiler, dtype, separate_temperature):
    kernels_built = compiler(compile_for_hopper, dtype, separate_temperature)
    assert kernels_built.keys() == {"_forward_kernel", "_gradient_kernel"}
    for variants in kernels_built.values():
        [(spilled, wgmma)] = variants  # the number of tokens makes no other
        assert spilled <= 32  # of 1020; versions of the compiler differ by a few registers
        assert (wgmma > 0) == (dtype == torch.bfloat16)
