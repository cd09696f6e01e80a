"""Weight sync on loopback: bytes, seconds, and the fraction of the link's speed.

    OMP_NUM_THREADS=1 python tools/benchmark_weight_sync.py [--layers 28] [--repeats 5] ...

A sender fills buckets with the tensors of a model of Qwen3-0.6B's shape (random, --layers of them)
and a worker in a process of its own copies each into a model of the same shape, as a server loads
it. The ways take turns within each repetition:

    link         one gloo broadcast of the same bytes for each bucket, from and to memory that is
                 there: the speed that the others are a fraction of
    broadcast    with the next bucket filled and received meanwhile, and one after the other
    local        through shared memory

The tensors are whole to begin with: gathering them from megatron's shards is not in it. Medians
over the repetitions. Bytes are counted where they leave and compared with the tensors'.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from megafork.weights.local import LocalLink, LocalSender
from megafork.weights.transports import (
    BroadcastLink,
    Bucket,
    WeightSender,
    num_elements,
    plan_buckets,
    received,
    send_buckets,
    unpack,
)

CPU = torch.device("cpu")
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 3072, 16, 8, 128, 151_936
WAYS = ("link", "broadcast", "broadcast, no overlap", "local")
TIMEOUT_S = 120.0


def make_weights(layers: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(layers):
        of = f"model.layers.{layer}."
        shapes |= {
            of + "input_layernorm.weight": (HIDDEN,),
            of + "self_attn.q_proj.weight": (q, HIDDEN),
            of + "self_attn.k_proj.weight": (kv, HIDDEN),
            of + "self_attn.v_proj.weight": (kv, HIDDEN),
            of + "self_attn.o_proj.weight": (HIDDEN, q),
            of + "post_attention_layernorm.weight": (HIDDEN,),
            of + "mlp.gate_proj.weight": (INNER, HIDDEN),
            of + "mlp.up_proj.weight": (INNER, HIDDEN),
            of + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


class Worker:
    """The receiving process's state: its model, its ends of both ways."""

    def __init__(self, plan: list[Bucket], addresses: dict[str, dict]) -> None:
        self.plan = plan
        self.model = {
            name: torch.zeros(tuple(shape), dtype=getattr(torch, bucket["dtype"]))
            for bucket in plan
            for name, shape in zip(bucket["names"], bucket["shapes"], strict=True)
        }
        self.broadcast = BroadcastLink(addresses["broadcast"], 1, 1, CPU, TIMEOUT_S)
        self.local = LocalLink(addresses["local"], CPU, TIMEOUT_S)
        self.flats = [torch.zeros(num_elements(b), dtype=getattr(torch, b["dtype"])) for b in plan]

    def receive(self, way: str) -> None:
        if way == "link":
            for flat in self.flats:
                self.broadcast._group.broadcast(flat, 0).wait()
        elif way == "broadcast, no overlap":
            for bucket in self.plan:
                self.broadcast.begin(bucket)
                self._load(unpack(self.broadcast.finish(last=False), bucket))
        else:
            link = self.local if way == "local" else self.broadcast
            for weights in received([link], self.plan):
                self._load(weights)

    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.model[name].copy_(tensor)

    def checksum(self) -> float:
        return sum(float(t.double().sum()) for t in self.model.values())


def worker_main(pipe: Connection) -> None:
    torch.set_num_threads(1)
    worker = Worker(*pipe.recv())
    pipe.send("joined")
    while (way := pipe.recv()) is not None:
        if way == "checksum":
            pipe.send(worker.checksum())
            for tensor in worker.model.values():
                tensor.zero_()
            continue
        worker.receive(way)
        pipe.send("done")


class Trainer:
    """The sending process's state."""

    def __init__(self, weights: dict[str, Tensor], plan: list[Bucket]) -> None:
        self.weights, self.plan = weights, plan
        self.broadcast = WeightSender(0, "127.0.0.1", 1, CPU, TIMEOUT_S)
        self.local = LocalSender(0, plan, 1, CPU, TIMEOUT_S)
        self.flats = [torch.ones(num_elements(b), dtype=getattr(torch, b["dtype"])) for b in plan]

    def push(self, way: str) -> None:
        if way == "link":
            for flat in self.flats:
                self.broadcast._group.broadcast(flat, 0).wait()
        elif way == "broadcast, no overlap":
            for bucket in self.plan:
                self.broadcast.send(bucket, [self.weights[name] for name in bucket["names"]])
                self.broadcast.flush()
        else:
            sender = self.local if way == "local" else self.broadcast
            send_buckets(sender, self.plan, iter(self.weights.items()))


def measure(arguments: argparse.Namespace, pipe: Connection) -> None:
    dtype = getattr(torch, arguments.dtype)
    weights = make_weights(arguments.layers, arguments.vocab, dtype)
    manifest = [(name, tuple(t.shape), t.dtype) for name, t in weights.items()]
    plan = plan_buckets(0, manifest, arguments.bucket_mib << 20)
    trainer = Trainer(weights, plan)
    pipe.send((plan, {"broadcast": trainer.broadcast.address, "local": trainer.local.address}))
    trainer.broadcast.connect()
    trainer.local.connect()
    assert pipe.recv() == "joined"
    expected = sum(float(t.double().sum()) for t in weights.values())
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(-1, arguments.repeats):  # the first one warms up
        for way in WAYS if repeat % 2 else reversed(WAYS):
            pipe.send(way)
            started = time.monotonic()
            trainer.push(way)
            assert pipe.recv() == "done"
            if repeat >= 0:
                seconds[way].append(time.monotonic() - started)
            if way != "link":
                pipe.send("checksum")
                assert pipe.recv() == expected, way
    pipe.send(None)
    total = sum(t.nbytes for t in weights.values())
    rounds = arguments.repeats + 1
    sent = {
        "broadcast": trainer.broadcast.bytes_sent / (2 * rounds),
        "local": trainer.local.bytes_sent / rounds,
    }
    tell(arguments, plan, total, sent, {way: statistics.median(s) for way, s in seconds.items()})


def tell(
    arguments: argparse.Namespace,
    plan: list[Bucket],
    total: int,
    sent: dict[str, float],
    seconds: dict[str, float],
) -> None:
    print(
        f"{total / 2**20:.0f} MiB ({arguments.dtype}, {arguments.layers} layers) in {len(plan)} "
        f"buckets of up to {arguments.bucket_mib} MiB, {arguments.repeats} repetitions; torch "
        f"{torch.__version__}, Python {platform.python_version()}\n"
    )
    print("| | bytes sent, of the tensors' | seconds | GB/s | of the link's speed |")
    print("|" + "---|" * 5)
    for way, taken in seconds.items():
        bytes_sent = sent.get(way.split(",")[0])
        of_total = f"{bytes_sent / total:.4f}" if bytes_sent is not None else "1"
        print(
            f"| {way} | {of_total} | {taken:.2f} | {total / taken / 1e9:.2f} | "
            f"{seconds['link'] / taken:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=worker_main, args=(theirs,), daemon=True)
    worker.start()
    measure(arguments, ours)
    worker.join()


if __name__ == "__main__":
    main()
