"""Times the exact operations against straightforward ones, in one run, and prints ratios.

    OMP_NUM_THREADS=1 python tools/benchmark_ops.py [--tokens 512]

Linux only. Every measurement has its own processes: the median of some repetitions, the peak of
resident memory beyond the inputs, the largest error against float64, and the bytes handed to
collectives. One thread and one process per rank; machines are noisy, so read the ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megafork.ops.top_fraction import top_fraction_threshold
from megafork.ops.vocab_parallel import linear_logprob_and_entropy, logprob_and_entropy

Work = Callable[[], Any]


@dataclass
class Cost:
    seconds: float
    peak_mib: float
    sent: int
    value: Any


# ------------------------------------------------------------------ straightforward formulations


def plain(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """One shard: log_softmax, its exponential, a sum."""
    log_p = logits_TV.float().log_softmax(-1)
    return log_p.gather(1, targets_T[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


class SumOverRanks(torch.autograd.Function):
    """Forward SUM all-reduce; upstream gradients are equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def six_collectives(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sharded, as two separate ops: MAX, target, sum for the log-probability, then MAX, sum and
    sum of p * x for the entropy."""
    width = logits_TV.shape[1]
    local_T = targets_T - width * dist.get_rank()
    owned_T = (local_T >= 0) & (local_T < width)

    def softmax_parts() -> tuple[Tensor, Tensor, Tensor]:
        max_T1 = logits_TV.detach().amax(1, keepdim=True)
        dist.all_reduce(max_T1, op=dist.ReduceOp.MAX)
        e_TV = (logits_TV - max_T1).exp()
        return max_T1, e_TV, SumOverRanks.apply(e_TV.sum(1))

    max_T1, _, s_T = softmax_parts()
    chosen = logits_TV.gather(1, torch.where(owned_T, local_T, 0)[:, None])[:, 0]
    target_T = SumOverRanks.apply(torch.where(owned_T, chosen, 0.0))
    logprobs_T = target_T - max_T1[:, 0] - s_T.log()
    max_T1, e_TV, s_T = softmax_parts()
    mean_T = SumOverRanks.apply((e_TV / s_T[:, None] * logits_TV).sum(1))
    return logprobs_T, max_T1[:, 0] + s_T.log() - mean_T


def gather_and_quantile(values_T: Tensor, fraction: float) -> float:
    gathered = [torch.empty_like(values_T) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values_T)
    everything = torch.cat(gathered)
    k = max(1, round(fraction * len(everything)))
    return float(everything.kthvalue(len(everything) - k + 1).values)


# ------------------------------------------------------------------------------------ measuring


def on_ranks(world_size: int, make: Callable[..., Work], *args: Any, repeats: int) -> Cost:
    """Costs of `make(*args)()`: the slowest rank's time, the largest peak, rank 0's bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_measure, args=(rank, world_size, port, queue, make, args, repeats))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    costs = [queue.get() for _ in ranks]
    for process in ranks:
        process.join()
    _, first = min(costs, key=lambda pair: pair[0])
    seconds = max(cost.seconds for _, cost in costs)
    return Cost(seconds, max(cost.peak_mib for _, cost in costs), first.sent, first.value)


def _measure(rank, world_size, port, queue, make, args, repeats) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    sent = 0
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counted(name: str) -> Callable[..., Any]:
        def call(*call_args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            tensor = call_args[1] if name == "all_gather" else call_args[0]
            sent += tensor.nbytes
            return originals[name](*call_args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counted(name))
    work = make(*args)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = memory("VmRSS")
    value = work()
    peak = memory("VmHWM") - before
    sent_once, times = sent, []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    plain_value = [v.tolist() for v in value] if isinstance(value, tuple) else value
    queue.put((rank, Cost(statistics.median(times), peak, sent_once, plain_value)))
    dist.barrier()
    dist.destroy_process_group()


def memory(field: str) -> float:
    """MiB of this process: VmRSS is resident now, VmHWM was at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def make_logits(op: str, tokens: int, vocab: int, backward: bool) -> Work:
    generator = torch.Generator().manual_seed(0)
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.randn(tokens, vocab, generator=generator) * 4 + 20
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    shard = whole.chunk(world, 1)[rank].contiguous().requires_grad_(backward)
    del whole
    group = dist.group.WORLD if world > 1 else None
    function = {
        "ours": lambda: logprob_and_entropy(shard, targets, tp_group=group),
        "log_softmax": lambda: plain(shard, targets),
        "six collectives": lambda: six_collectives(shard, targets),
    }[op]

    def work() -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(backward):
            logprobs, entropy = function()
        if backward:
            shard.grad = None
            (logprobs.sum() + entropy.sum()).backward()
        return logprobs.detach(), entropy.detach()

    return work


def make_head(op: str, tokens: int, vocab: int, hidden: int, share: float) -> Work:
    """Forward and backward of the head on a share of the tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    w = torch.randn(vocab, hidden, generator=generator).mul_(4 / hidden**0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    rows = torch.randperm(tokens, generator=generator)[: int(share * tokens)]
    x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)  # returned, so no cost of the op

    def work() -> tuple[Tensor, Tensor]:
        if op == "ours":
            outputs = linear_logprob_and_entropy(x[rows], w, targets[rows])
        else:
            outputs = plain(F.linear(x[rows], w), targets[rows])
        (outputs[0].sum() + outputs[1].sum()).backward()
        return outputs[0].detach(), outputs[1].detach()

    return work


def make_selection(op: str, count: int) -> Work:
    generator = torch.Generator().manual_seed(dist.get_rank())
    values = torch.rand(count // dist.get_world_size(), generator=generator)
    mask = torch.ones_like(values, dtype=torch.bool)
    if op == "ours":
        groups = (dist.group.WORLD,)
        return lambda: top_fraction_threshold(values, mask, 0.2, groups=groups).threshold
    return lambda: gather_and_quantile(values, 0.2)


# ------------------------------------------------------------------------------------- reporting


def table(title: str, rows: list[tuple[str, Cost]], error: Callable[[Any], float] | None) -> None:
    print(f"\n### {title}\n")
    print("| | time | of the first | peak | of the first | bytes sent | largest error |")
    print("|---|---|---|---|---|---|---|")
    first = rows[0][1]
    for name, cost in rows:
        peak = f"{cost.peak_mib / first.peak_mib:.2f}" if first.peak_mib else "-"
        worst = f"{error(cost.value):.1e}" if error is not None else "-"
        print(
            f"| {name} | {cost.seconds * 1e3:.1f} ms | {cost.seconds / first.seconds:.2f} "
            f"| {cost.peak_mib:.0f} MiB | {peak} | {cost.sent:,} | {worst} |"
        )


def exact_logits(tokens: int, vocab: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator) * 4 + 20
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    return [torch.cat(c) for c in zip(*(
        plain_float64(z, t) for z, t in zip(logits.split(16), targets.split(16), strict=True)
    ), strict=True)]  # fmt: skip


def plain_float64(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.double().log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], torch.special.entr(log_p.exp()).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--head-tokens", type=int, default=1024)
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    again = {"repeats": args.repeats}

    exact = exact_logits(args.tokens, args.vocab)

    def error(value: list[list[float]]) -> float:
        return max(
            float((torch.tensor(ours) - want).abs().max())
            for ours, want in zip(value, exact, strict=True)
        )

    shape = f"{args.tokens} tokens, vocabulary {args.vocab:,}, float32"
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        for tp, ops in ((1, ("log_softmax", "ours")), (2, ("six collectives", "ours"))):
            rows = [
                (op, on_ranks(tp, make_logits, op, args.tokens, args.vocab, backward, **again))
                for op in ops
            ]
            table(f"Log-probability and entropy from logits, {what}, TP{tp} ({shape})", rows, error)
    head = (args.head_tokens, args.vocab, args.hidden)
    rows = [("linear + log_softmax", on_ranks(1, make_head, "plain", *head, 1.0, **again))]
    rows += [
        (f"ours, {share:.0%} of the rows", on_ranks(1, make_head, "ours", *head, share, **again))
        for share in (1.0, 0.5, 0.2, 0.1)
    ]
    table(f"The head, forward and backward, TP1 ({head[0]} tokens, hidden {head[2]})", rows, None)
    for count in (args.values // 10, args.values):
        rows = [
            (op, on_ranks(2, make_selection, op, count, **again))
            for op in ("gather + kthvalue", "ours")
        ]
        table(f"Threshold of the top 20% of {count:,} values on 2 ranks", rows, None)
        assert rows[0][1].value == rows[1][1].value


if __name__ == "__main__":
    main()
