"""Senders of weights and the workers that receive them, without a server: both ways of going."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megafork.config import ModelConfig, ParallelConfig
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from megafork.weights.local import LocalLink, LocalSender
from megafork.weights.transports import (
    BroadcastLink,
    TransferError,
    WeightSender,
    plan_buckets,
    received,
    send_buckets,
)
from tests.helpers import reference
from tools.benchmarks.ranks import run_ranks

CPU = torch.device("cpu")
WAYS = ["broadcast", "local"]


def make_sender(way, stage, plan, num_workers, timeout_s=20.0, device=CPU):
    if way == "local":
        return LocalSender(stage, plan, num_workers, device, timeout_s)
    return WeightSender(stage, "127.0.0.1", num_workers, device, timeout_s)


def join(way, address, worker, num_workers, timeout_s=20.0, device=CPU):
    if way == "local":
        return LocalLink(address, device, timeout_s)
    return BroadcastLink(address, 1 + worker, num_workers, device, timeout_s)


def receive_all(way, addresses, plan, worker, num_workers, pushes=1, device=CPU):
    """What a worker has after each of several pushes."""
    links = [join(way, address, worker, num_workers, device=device) for address in addresses]
    return [[pair for part in received(links, plan) for pair in part] for _ in range(pushes)]


def random_weights(count=24):
    """Of two dtypes and odd sizes, a scalar and a matrix that is no whole block of memory."""
    shapes = [(3, 2), (4,), (), *((7 + 3 * i, 5) for i in range(count))]
    weights = {f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    for name in list(weights)[::5]:
        weights[name] = weights[name].bfloat16()
    return weights | {"turned": torch.randn(6, 9).t(), "none": torch.zeros(0, 4)}


def manifest_of(weights):
    return [(name, tuple(t.shape), t.dtype) for name, t in weights.items()]


def check_two_workers(way, device):
    """As with tensor parallelism 2: both get every bucket, of each push."""
    weights = {name: t.to(device) for name, t in random_weights().items()}
    plan = plan_buckets(0, manifest_of(weights), 600)
    assert len(plan) > 8
    sender = make_sender(way, 0, plan, 2, device=device)
    with ThreadPoolExecutor(2) as pool:
        workers = [
            pool.submit(receive_all, way, [sender.address], plan, worker, 2, 3, device)
            for worker in range(2)
        ]
        sender.connect()
        pushed = [{name: t + push for name, t in weights.items()} for push in range(3)]
        for push in pushed:
            send_buckets(sender, plan, iter(push.items()))
        for worker in workers:
            for push, got in zip(pushed, worker.result(), strict=True):
                assert [name for name, _ in got] == list(push)
                assert all(torch.equal(t, push[name]) for name, t in got)
                assert all(t.dtype == push[name].dtype for name, t in got)
    assert sender.bytes_sent == 3 * sum(t.nbytes for t in weights.values())
    sender.close()


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_get_every_bucket(way):
    check_two_workers(way, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_processes_on_one_gpu():
    """A GPU's handles are opened by other processes alone: a worker of its own."""
    weights = {name: t.cuda() for name, t in random_weights().items()}
    plan = plan_buckets(0, manifest_of(weights), 600)
    sender = LocalSender(0, plan, 1, torch.device("cuda", 0), 60.0)
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    worker = context.Process(target=_receive_on_gpu, args=(sender.address, plan, answers))
    worker.start()
    sender.connect()
    send_buckets(sender, plan, iter(weights.items()))
    got = answers.get()
    worker.join()
    assert got.keys() == weights.keys()
    assert all(weights[name].cpu().flatten().tolist() == got[name] for name in got)


def _receive_on_gpu(address, plan, answers):
    [got] = receive_all("local", [address], plan, 0, 1, device=torch.device("cuda", 0))
    answers.put({name: tensor.cpu().flatten().tolist() for name, tensor in got})


# ---- a model at a layout: the checkpoint's tensors, each once ----


def push_model(folder, layout, way, bucket_bytes):
    """What two workers, threads of rank 0's, got; bytes that this rank sent; its largest tensor."""
    parallel = ParallelConfig(**layout)
    mesh = initialize(parallel)
    model = ModelConfig(path=str(folder), dtype="float32")
    scorer = Scorer(model, parallel, mesh, micro_batch_tokens=256)
    manifest = [(name, shape, scorer.dtype) for name, shape in scorer.shard_manifest()]
    plan = plan_buckets(mesh.pp_rank, manifest, bucket_bytes)
    sender = make_sender(way, mesh.pp_rank, plan, 2) if mesh.is_sender else None
    offers = mesh.all_gather_object((sender.address, plan) if sender is not None else None)
    addresses, plans = zip(*(o for o in offers if o is not None), strict=True)
    whole = [bucket for plan in plans for bucket in plan]
    with ThreadPoolExecutor(2) as pool:
        workers = []
        if mesh.rank == 0:
            arguments = (way, addresses, whole)
            workers = [pool.submit(receive_all, *arguments, number, 2) for number in range(2)]
        if sender is not None:
            sender.connect()
        if mesh.is_first_replica:
            shards = scorer.export_shards()
            if sender is not None:
                send_buckets(sender, plan, shards)
            assert next(shards, None) is None
        got = [dict(worker.result()[0]) for worker in workers]
    return got, sender.bytes_sent if sender is not None else 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"dp": 2}], ids=str)
def test_the_checkpoint_arrives_and_each_weight_is_sent_once(tmp_path, layout, way):
    folder = reference.save_model(tmp_path, tied="pp" in layout, seed=4)
    expected = load_file(folder / "model.safetensors")
    ranks = run_ranks(ParallelConfig(**layout).world_size, push_model, folder, layout, way, 70_000)
    (workers, _), *_ = ranks
    assert len(workers) == 2
    for got in workers:
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
    assert sum(sent for _, sent in ranks) == sum(t.nbytes for t in expected.values())


# ---- what goes wrong ----


@pytest.mark.parametrize("way", WAYS)
def test_workers_that_leave_are_an_error_at_once(way):
    weights = random_weights()
    plan = plan_buckets(0, manifest_of(weights), 600)
    sender = make_sender(way, 0, plan, 1)

    def leave():
        links = [join(way, sender.address, 0, 1)]
        next(received(links, plan))  # and no more

    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(leave)
        sender.connect()
        started = time.monotonic()
        with pytest.raises(TransferError, match=r"sender 0, bucket w\d+"):
            send_buckets(sender, plan, iter(weights.items()))
        leaving.result()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("way", WAYS)
def test_a_sender_that_leaves_is_an_error_at_once(way):
    weights = random_weights()
    plan = plan_buckets(0, manifest_of(weights), 600)
    sender = make_sender(way, 0, plan, 1)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_all, way, [sender.address], plan, 0, 1)
        sender.connect()
        sender.send(plan[0], [weights[name] for name in plan[0]["names"]])
        sender.close()
        with pytest.raises(TransferError, match="nothing received from sender 0, bucket"):
            receiving.result(timeout=10)


@pytest.mark.parametrize("way", WAYS)
def test_workers_that_never_come_are_an_error(way):
    plan = plan_buckets(0, [("a", (3,), torch.float32)], 600)
    sender = make_sender(way, 0, plan, 1, timeout_s=1.0)
    with pytest.raises(TransferError, match="sender 0: workers did not join"):
        sender.connect()


def test_a_local_worker_that_takes_nothing_is_an_error():
    weights = random_weights()
    plan = plan_buckets(0, manifest_of(weights), 600)
    sender = LocalSender(0, plan, 1, CPU, 1.0)
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(LocalLink, sender.address, CPU, 1.0)
        sender.connect()
        link = joined.result()
    sent = []
    with pytest.raises(TransferError, match="timed out"):
        for bucket in plan:
            sender.send(bucket, [weights[name] for name in bucket["names"]])
            sent.append(bucket)
    assert len(sent) == 2  # no more slots than that
    assert link is not None


def test_a_stranger_gets_no_weights():
    plan = plan_buckets(0, [("a", (3,), torch.float32)], 600)
    sender = LocalSender(0, plan, 1, CPU, 20.0)
    name = f"\0{sender.address['socket']}"
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for stranger, shown in zip(strangers, (b"x" * 64, b"short"), strict=True):
        stranger.connect(name)
        stranger.sendall(shown)
    strangers[1].shutdown(socket.SHUT_WR)
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(receive_all, "local", [sender.address], plan, 0, 1)
        sender.connect()
        sender.send(plan[0], [torch.tensor([1.0, 2.0, 3.0])])
        sender.flush()
        [[(_, got)]] = joined.result()
    assert got.tolist() == [1.0, 2.0, 3.0]
    for stranger in strangers:
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


SENDS_FOR_EVER = """
import sys, torch
from megafork.weights.local import LocalSender
from megafork.weights.transports import plan_buckets
plan = plan_buckets(0, [("a", (1 << 20,), torch.float32)], 1)
sender = LocalSender(0, plan, 1, torch.device("cpu"), 60.0)
print(sender.address["socket"], sender.address["token"], flush=True)
sender.connect()
while True:
    sender.send(plan[0], [torch.ones(1 << 20)])
"""


def test_a_sender_that_is_killed_leaves_no_file_and_no_worker_waiting():
    process = subprocess.Popen(
        [sys.executable, "-c", SENDS_FOR_EVER], stdout=subprocess.PIPE, text=True
    )
    name, token = process.stdout.readline().split()
    plan = plan_buckets(0, [("a", (1 << 20,), torch.float32)], 1)
    link = LocalLink({"socket": name, "token": token}, CPU, 60.0)
    counts = []

    def receive():
        while True:
            link.begin(plan[0])
            counts.append(float(link.finish(last=False).sum()))
            some.set()

    some = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive)
        assert some.wait(60)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(TransferError, match="nothing received from sender 0"):
            receiving.result(timeout=10)
    assert set(counts) == {float(1 << 20)}
    assert "/memfd:megafork-weights (deleted)" in maps  # no name that could be left behind
    assert "/dev/shm" not in maps


def test_plan_keeps_the_order_and_the_limit():
    manifest = [(f"w{i}", (10, i + 1), torch.float32) for i in range(6)]
    manifest.insert(3, ("norm", (10,), torch.bfloat16))
    plan = plan_buckets(2, manifest, max_bytes=130)
    assert [name for bucket in plan for name in bucket["names"]] == [name for name, *_ in manifest]
    assert [(b["dtype"], b["names"]) for b in plan] == [
        ("float32", ["w0", "w1"]),
        ("float32", ["w2"]),
        ("bfloat16", ["norm"]),
        ("float32", ["w3"]),  # larger than the limit: alone
        ("float32", ["w4"]),
        ("float32", ["w5"]),
    ]
    assert plan[0] == {
        "sender": 2, "dtype": "float32", "names": ["w0", "w1"], "shapes": [[10, 1], [10, 2]]
    }  # fmt: skip
    assert plan_buckets(0, [], 130) == []
