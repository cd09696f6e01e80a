"""Times the exact operations against straightforward ones, in one run, and prints ratios.

    OMP_NUM_THREADS=1 python tools/benchmark_ops.py [--large] [--only logits,head,threshold]

Linux only. Every measurement has its own processes, one thread and one process per rank: the best
time of some repetitions, the least CPU time of one (the slowest rank's: on a busy machine it says
more), the peak of resident memory beyond the inputs and the gradients that are returned, the
largest error of a value against float64, and the bytes handed to collectives. The alternatives take
turns; machines are noisy, so read the ratios.

--large adds the head at 8,192 tokens: some minutes. torch.compile needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks import formulations
from benchmarks.measuring import Cost, Job, best, mib, on_ranks, table
from torch import Tensor

from megafork.ops import softmax_rows
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.ops.vocab_parallel import linear_logprob_and_entropy, logprob_and_entropy

OURS = "ours"
DETACHED = "ours, entropy without gradient"
FLOAT_SUMS = "ours with float32 sums instead of integers"
COMPILED = f"log_softmax by {formulations.COMPILED_ROWS} rows, compiled"
ONE_OP = "one op, softmax saved, entropy without gradient"
TWO_OPS = "two ops, two softmaxes saved"
SIX = "3 + 3 all-reduces by autograd"


# ----------------------------------------------------------------------------------- from logits


def make_logits(op: str, tokens: int, vocab: int, backward: bool) -> Job:
    generator = torch.Generator().manual_seed(0)
    world, rank = dist.get_world_size(), dist.get_rank()
    whole, targets = logits_and_targets(tokens, vocab, generator)
    shard = whole.chunk(world, 1)[rank].clone().requires_grad_(backward)
    del whole
    group = dist.group.WORLD if world > 1 else None
    if op == FLOAT_SUMS:
        softmax_rows._integers = FloatSums
    function = {
        "log_softmax": formulations.log_softmax,
        COMPILED: formulations.compiled_chunks(),
        SIX: formulations.six_collectives,
        TWO_OPS: formulations.two_ops,
        ONE_OP: formulations.one_op_detached,
    }.get(op, lambda logits, targets: logprob_and_entropy(logits, targets, tp_group=group))

    def work() -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(backward):
            logprobs, entropy = function(shard, targets)
        if backward:
            loss = logprobs.sum()
            if op not in (ONE_OP, DETACHED):
                loss = loss + entropy.sum()
            loss.backward()
            shard.grad = None
        return logprobs.detach(), entropy.detach()

    return Job(work, returned_mib=mib(shard) if backward else 0.0)


class FloatSums:
    """Stands for the integers of a block whose sums are to be taken in float32 instead."""

    def __init__(self, terms: Tensor, wide: Tensor):
        self.terms = terms

    def sum(self, dim: int) -> Tensor:
        exponents = self.terms.shape[1] * softmax_rows._MAGIC_BITS
        integers = (self.terms.sum(dim).double() * 2**44).long()
        return integers + ((exponents + 2**63) % 2**64 - 2**63)


def logits_and_targets(
    tokens: int, vocab: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    logits = torch.randn(tokens, vocab, generator=generator).mul_(4).add_(20)
    return logits, torch.randint(0, vocab, (tokens,), generator=generator)


def in_float64(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[Any], float]:
    """The largest difference of (logprobs, entropies) from those of (logits, targets)."""
    exact = [[], []]
    for logits, targets in pairs:
        log_p = logits.double().log_softmax(-1)
        exact[0].append(log_p.gather(1, targets[:, None])[:, 0])
        exact[1].append(torch.special.entr(log_p.exp_()).sum(-1))
    wanted = [torch.cat(parts) for parts in exact]

    def error(value: list[list[float]]) -> float:
        return max(
            float((torch.tensor(ours, dtype=torch.float64) - want[: len(ours)]).abs().max())
            for ours, want in zip(value, wanted, strict=True)
        )

    return error


def compare_logits(args: argparse.Namespace) -> None:
    logits, targets = logits_and_targets(args.tokens, args.vocab, torch.Generator().manual_seed(0))
    error = in_float64(list(zip(logits.split(16), targets.split(16), strict=True)))
    del logits
    compiler = shutil.which("g++") or shutil.which(os.environ.get("CXX", "clang++"))
    shape = f"{args.tokens} tokens, vocabulary {args.vocab:,}, float32"
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        ours = [OURS, DETACHED] if backward else [OURS, FLOAT_SUMS]
        for tp, others in ((1, ["log_softmax", COMPILED]), (2, [SIX, TWO_OPS, ONE_OP])):
            names = [n for n in others + ours if n != COMPILED or compiler]
            size = (args.tokens, args.vocab, backward)
            rows = {n: (make_logits, n, *size) for n in names}
            costs: dict[str, Cost | str] = {**best(tp, rows, repeats=args.repeats, rounds=3)}
            if COMPILED in others and not compiler:
                costs[COMPILED] = "not measured: torch.compile found no C++ compiler"
            title = f"Log-probability and entropy from logits, {what}, TP{tp} ({shape})"
            local_mib = args.tokens * args.vocab / tp * 4 / 2**20
            table(title, costs, logits_mib=local_mib, error=error)


# -------------------------------------------------------------------------------------- the head


def make_head(op: str, tokens: int, vocab: int, hidden: int, share: float, warm: bool) -> Job:
    """Forward and backward of the head on a share of the tokens."""
    x, w, targets = head_inputs(tokens, vocab, hidden)
    x.requires_grad_()
    w.requires_grad_()
    rows = torch.arange(int(share * tokens))

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        if op == OURS:
            outputs = linear_logprob_and_entropy(x[rows], w, targets[rows])
        else:
            outputs = formulations.log_softmax(F.linear(x[rows], w), targets[rows])
        (outputs[0].sum() + outputs[1].sum()).backward()
        x.grad = w.grad = None
        return outputs[0].detach(), outputs[1].detach()

    few = None if warm else lambda: run(rows[:16])
    return Job(lambda: run(rows), returned_mib=mib(x, w), warm_up=few)


def head_inputs(tokens: int, vocab: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    w = torch.randn(vocab, hidden, generator=generator).mul_(4 / hidden**0.5)
    return x, w, torch.randint(0, vocab, (tokens,), generator=generator)


def compare_head(args: argparse.Namespace) -> None:
    shape = (args.head_tokens, args.vocab, args.hidden)
    x, w, targets = head_inputs(*shape)
    chunks = zip(x.double().split(64), targets.split(64), strict=True)
    w = w.double()
    error = in_float64([(x @ w.T, t) for x, t in chunks])
    del x, w
    rows: dict[str, tuple] = {"linear + log_softmax": (make_head, "plain", *shape, 1.0, True)}
    for share in (1.0, 0.5, 0.2, 0.1):
        rows[f"ours, {share:.0%} of the rows"] = (make_head, OURS, *shape, share, True)
    costs = best(1, rows, repeats=2, rounds=2)
    title = f"The head, forward and backward, TP1 ({shape[0]} tokens, hidden {shape[2]}, float32)"
    logits_mib = args.head_tokens * args.vocab * 4 / 2**20
    table(title, dict(costs), logits_mib=logits_mib, error=error)
    dense = costs["ours, 100% of the rows"].seconds
    of_dense = {n: c.seconds / dense for n, c in costs.items() if n.startswith("ours")}
    print("\nOf ours on all rows: " + ", ".join(f"{n[6:]} {r:.2f}" for n, r in of_dense.items()))


def measure_large_head(args: argparse.Namespace) -> None:
    title = f"The head's memory, forward and backward, TP1 (hidden {args.hidden}, float32)"
    print(f"\n### {title}\n\n| | tokens | time | peak | of the float32 logits |")
    print("|---|---|---|---|---|")
    for name, op, tokens in (
        ("linear + log_softmax", "plain", args.large_tokens // 8),
        (OURS, OURS, args.large_tokens),
    ):
        cost = on_ranks(1, make_head, op, tokens, args.vocab, args.hidden, 1.0, False, repeats=1)
        ratio = cost.peak_mib / (tokens * args.vocab * 4 / 2**20)
        print(
            f"| {name} | {tokens:,} | {cost.seconds:.1f} s | {cost.peak_mib:.0f} MiB "
            f"| {ratio:.3f} |",
            flush=True,
        )


# ------------------------------------------------------------------------------------- threshold


def make_selection(op: str, count: int) -> Job:
    generator = torch.Generator().manual_seed(dist.get_rank())
    values = torch.rand(count // dist.get_world_size(), generator=generator)
    mask = torch.ones_like(values, dtype=torch.bool)
    if op == OURS:
        groups = (dist.group.WORLD,)
        return Job(lambda: top_fraction_threshold(values, mask, 0.2, groups=groups).threshold)

    def gathered() -> float:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values)
        everything = torch.cat(parts)
        if op == "gather + quantile":
            return float(torch.quantile(everything, 0.8))
        k = max(1, round(0.2 * len(everything)))
        return float(everything.kthvalue(len(everything) - k + 1).values)

    return Job(gathered)


def compare_selection(args: argparse.Namespace) -> None:
    count = args.values // 100
    while count <= args.values:
        costs: dict[str, Cost | str] = {}
        for op in ("gather + quantile", "gather + kthvalue", OURS):
            try:
                costs[op] = on_ranks(4, make_selection, op, count, repeats=3)
            except AssertionError as error:
                if "too large" not in str(error):
                    raise
                costs[op] = "fails: quantile() input tensor is too large"
        table(f"Threshold of the top 20% of {count:,} values on 4 ranks", costs)
        kth, ours = costs["gather + kthvalue"], costs[OURS]
        assert isinstance(kth, Cost) and isinstance(ours, Cost) and kth.value == ours.value
        count *= 10


def main() -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # ranks are forked
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--head-tokens", type=int, default=512)
    parser.add_argument("--large-tokens", type=int, default=8192)
    parser.add_argument("--values", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="logits,head,threshold")
    parser.add_argument("--large", action="store_true", help="the head at --large-tokens too")
    args = parser.parse_args()
    parts = {"logits": compare_logits, "head": compare_head, "threshold": compare_selection}
    for name in args.only.split(","):
        parts[name](args)
    if args.large:
        measure_large_head(args)


if __name__ == "__main__":
    main()
