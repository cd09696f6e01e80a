"""Times the Triton head on one GPU against torch and against what the GPU can do, in one run.

    python tools/benchmark_gpu.py [--tokens 8192] [--hidden 1024 4096] [--vocab 151936]

bfloat16; the weight's gradient goes into a float32 main_grad, as in training. "limit" is the time
of the same products alone at the rate of the best cuBLAS product measured here: one forward, and
one more and two gradients backward. The bandwidth says how long [T, V] logits in float32 would
take to be written and read once: what the kernel saves. Median of the repetitions; peak is memory
beyond the inputs and main_grad.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megafork.ops import kernels
from megafork.ops.vocab_parallel import linear_logprob_and_entropy

REPETITIONS = 10
PLAIN_ROWS = 1024

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def milliseconds(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def limits() -> tuple[float, float]:
    """(TFLOP/s of a bfloat16 product, TB/s of a copy, read and written)."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return (
        2 * 8192**3 / milliseconds(lambda: a @ a) / 1e9,
        2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9,
    )


def plain(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """1,024 rows at a time: bfloat16 logits, log_softmax in float32, all again in backward."""

    def rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (hidden @ weight_VH.T).float().log_softmax(-1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    chunks = zip(hidden_TH.split(PLAIN_ROWS), targets_T.split(PLAIN_ROWS), strict=True)
    parts = [checkpoint(rows, *chunk, use_reentrant=False) for chunk in chunks]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def in_torch(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    os.environ["MEGAFORK_TRITON"] = "0"
    try:
        return linear_logprob_and_entropy(*inputs)
    finally:
        del os.environ["MEGAFORK_TRITON"]


def measure(name: str, head: Head, inputs: tuple[Tensor, ...], limit: float) -> None:
    """Prints one row of the table."""
    hidden_TH, weight_VH, _ = inputs

    def forward() -> Tensor:
        with torch.no_grad():
            return head(*inputs)[1]

    def both() -> None:
        hidden_TH.grad = weight_VH.grad = None
        logprobs, entropy = head(*inputs)
        (logprobs.sum() + entropy.sum()).backward()

    rows = slice(None, None, max(1, len(hidden_TH) // 64))
    log_p = (hidden_TH[rows].detach().double() @ weight_VH.detach().double().T).log_softmax(-1)
    error = (forward()[rows] - torch.special.entr(log_p.exp()).sum(-1)).abs().max()
    del log_p
    hidden_TH.grad = weight_VH.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    ms_forward, ms_both = milliseconds(forward), milliseconds(both)
    print(
        f"| {name} | {ms_forward:.1f} ms | {ms_forward / limit:.2f} | {ms_both:.1f} ms | "
        f"{ms_both / (4 * limit):.2f} | {peak:.0f} MiB | {error:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--vocab", type=int, default=151_936)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmark_gpu: needs a CUDA device, and torch finds none")
    if not kernels.usable(torch.empty(0, device="cuda")):
        sys.exit("benchmark_gpu: needs Triton, torch 2.8 and a GPU of compute capability 8.0")

    tflops, terabytes = limits()
    logits = options.tokens * options.vocab
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"cuBLAS bfloat16 {tflops:.0f} TFLOP/s, copy {terabytes:.2f} TB/s")
    print(f"float32 logits written and read once: {8 * logits / terabytes / 1e9:.1f} ms")
    for width in options.hidden:
        limit = 2 * logits * width / tflops / 1e9
        hidden = torch.randn(options.tokens, width, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(options.vocab, width, device="cuda", dtype=torch.bfloat16)
        weight = torch.nn.Parameter(weight * 4 / width**0.5)
        weight.main_grad = torch.zeros(weight.shape, device="cuda")
        targets = torch.randint(0, options.vocab, (options.tokens,), device="cuda")
        inputs = hidden.requires_grad_(), weight, targets
        print(f"\n### {options.tokens} tokens, vocabulary {options.vocab}, hidden {width}\n")
        print("| | forward | of the limit | with backward | of the limit | peak | entropy error |")
        print("|---|---|---|---|---|---|---|")
        measure("Triton", linear_logprob_and_entropy, inputs, limit)
        measure("torch, float32 products", in_torch, inputs, limit)
        measure("bfloat16 logits, log_softmax, checkpointed", plain, inputs, limit)


if __name__ == "__main__":
    main()
