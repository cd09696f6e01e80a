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
from tests.helpers import linear_head as linear
from tests.helpers.triton_head import (
    bfloat16_inputs,
    in_triton,
    one_upstream_gradient_is_enough,
    other_dtypes,
    special_logits,
    uneven_sizes_and_temperatures,
)
from tools.benchmarks.ranks import run_ranks

# One process with Triton serves all of them.
pytestmark = pytest.mark.xdist_group("triton")

TRITON = Path(__file__).parents[2] / ".venv" / "triton"  # tools/setup_cpu.sh --test


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


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (linear.check_values_and_gradients, {"chunk_tokens": None, "temperature": 1.0}),
        (linear.check_values_and_gradients, {"chunk_tokens": 7, "temperature": 0.7}),
        (linear.check_no_tokens_give_connected_zeros, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_as_in_torch(interpreted, test, arguments):
    interpreted(in_triton, test, **arguments)


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_over_shards_with_padding(interpreted, tp, with_main_grad):
    interpreted(linear.check_over_shards_with_padding, tp=tp, with_main_grad=with_main_grad)


def with_exact_products(test, **arguments):
    """numpy rounds a product by the row's place in the tile, which a GPU does not: leave it nothing
    to round, so that all the rest can be compared bit by bit."""

    def case(*sizes, original=linear.case, **options):
        x, w, targets = original(*sizes, **options)
        return (x * 32).round() / 32, (w * 32).round() / 32, targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "case", case)
        test(**arguments)


@pytest.mark.slow
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(interpreted):
    test = linear.check_a_rows_bits_do_not_depend_on_the_rows_beside_it
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


@pytest.mark.slow
def test_the_number_of_shards_moves_no_bit(interpreted):
    interpreted(with_exact_products, same_bits_over_shards)


def test_sizes_off_the_tile_and_separate_temperatures(interpreted):
    interpreted(in_triton, uneven_sizes_and_temperatures)


@pytest.mark.slow
def test_bfloat16_inputs_and_their_main_grad(interpreted):
    interpreted(in_triton, bfloat16_inputs)


def test_one_output_may_have_no_gradient(interpreted):
    interpreted(in_triton, one_upstream_gradient_is_enough)


def test_other_dtypes(interpreted):
    interpreted(in_triton, other_dtypes)


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
