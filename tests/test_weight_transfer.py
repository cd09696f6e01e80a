"""Senders of weights and the workers that receive them, without a server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megafork.weight_sync.transports import (
    TransferError,
    WeightSender,
    join_group,
    plan_buckets,
    receive_bucket,
)

CPU = torch.device("cpu")


def test_senders_and_workers_without_a_server():
    """Two workers, as with tensor parallelism 2: both get every bucket."""
    sender = WeightSender(0, "127.0.0.1", 2, CPU, 20.0)
    manifest = [("a", (3, 2), torch.float32), ("b", (4,), torch.float32), ("c", (), torch.bfloat16)]
    weights = {name: torch.randn(shape).to(dtype) for name, shape, dtype in manifest}
    plan = plan_buckets(0, manifest, 1 << 20)

    def worker(rank: int) -> list:
        group = join_group(sender.host, sender.port, rank, 3, CPU, 20.0)
        return [receive_bucket(group, bucket, CPU) for bucket in plan]

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(worker, rank) for rank in (1, 2)]
        sender.connect()
        for bucket in plan:
            sender.send([(name, weights[name]) for name in bucket["names"]])
        for received in workers:
            got = dict(pair for bucket in received.result() for pair in bucket)
            assert got.keys() == weights.keys()
            assert all(torch.equal(got[name], weights[name]) for name in got)
    with pytest.raises(TransferError, match="sender 0, bucket a"):
        sender.send([("a", torch.zeros(1 << 20))])  # the workers have left


def test_workers_that_never_come_are_an_error():
    sender = WeightSender(0, "127.0.0.1", 1, CPU, timeout_s=1.0)
    with pytest.raises(TransferError, match="sender 0: workers did not join"):
        sender.connect()


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
