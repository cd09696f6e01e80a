"""Weights sent to a server as the two stages of a pipeline send them, with faults if asked."""

from __future__ import annotations

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megafork.data.prompts import Prompt
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from megafork.rollout.sampling import Sampling
from megafork.trainer.push import WeightSync
from megafork.weights.transports import (
    TransferError,
    WeightSender,
    plan_buckets,
    send_buckets,
)
from tests.helpers import reference
from tests.helpers.blocking import Blocking
from tests.helpers.controllers import PushingTo, controller
from tests.helpers.reference import load_model
from tools.benchmarks.configs import learner_config

CPU = torch.device("cpu")


def state_dict(folder: Path, tied: bool) -> dict[str, torch.Tensor]:
    weights = load_model(folder).state_dict()
    if tied:
        weights.pop("lm_head.weight")
    return weights


def connect(client: Blocking, num_senders: int, timeout_s: float) -> list[WeightSender]:
    senders = [WeightSender(i, "127.0.0.1", 1, CPU, timeout_s) for i in range(num_senders)]
    addresses = [sender.address for sender in senders]
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(client.init_transfer, addresses, 1, timeout_s)
        for sender in senders:
            sender.connect()
        joined.result()
    return senders


def push_buckets(client, sender, plan, weights):
    """Have the server receive the whole plan while this sender sends its part of it."""
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.update_weights, list(plan))
        try:
            send_buckets(sender, plan, weights)
        except TransferError:
            request.result()  # the server knows why it hung up
            raise
        request.result()


def push(
    client: Blocking,
    weights: dict[str, torch.Tensor],
    version: int,
    mode: str = "wait",
    **sabotage,
) -> None:
    """What two pipeline stages do, each sending half of the names."""
    timeout_s = sabotage.get("timeout_s", 20.0)
    senders = connect(client, 2, timeout_s)
    names = list(weights)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    plans = [
        plan_buckets(i, [(n, tuple(weights[n].shape), weights[n].dtype) for n in half], 100_000)
        for i, half in enumerate(halves)
    ]
    assert all(len(plan) > 1 for plan in plans)

    def second_stage() -> None:
        for number, bucket in enumerate(plans[1]):
            if number == sabotage.get("second_stage_dies_at"):
                return senders[1].close()
            if number == sabotage.get("second_stage_hangs_at"):
                return None
            senders[1].send(bucket, [weights[name] for name in bucket["names"]])
        senders[1].flush()

    try:
        client.pause(mode)
        client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(second_stage)
            try:
                push_buckets(client, senders[0], plans[0] + plans[1], iter(weights.items()))
            finally:
                if not sabotage:
                    other.result()
        client.finish_weight_update(version)
        client.reset_prefix_cache(running=True)
    finally:
        for sender in senders:
            sender.close()
        client.resume()


SAMPLING = Sampling(temperature=0.8, max_tokens=16)


PROMPTS = [Prompt(i, "", "", g.prompt_ids) for i, g in enumerate(reference.make_groups(12, 1))]


@contextlib.contextmanager
def make_sync(fleet, folder, layout, loop=None, **options):
    """(the weight sync of a float32 model, what answers it on rank 0). fleet, loop: of rank 0."""
    config = learner_config(folder, parallel=layout | {"timeout_minutes": 1.0}, **options)
    mesh = initialize(config.parallel)
    scorer = Scorer(config.model, config.parallel, mesh, micro_batch_tokens=256, temperature=0.8)
    pushing = PushingTo(fleet, timeout_s=config.sync.timeout_s)
    with controller(mesh, pushing, loop=loop) as handle:
        sync = WeightSync(config, scorer, mesh, handle)
        yield sync, pushing
        sync.close()


def kill_in_the_middle(sync, process_group):
    """Have rank 0's sender of the next transfer group kill a server before its first bucket."""
    make, rank = sync._make_sender, sync.mesh.rank

    def make_killer(num_workers):
        sender = make(num_workers)
        send = sender.send

        def kill_and_send(bucket, tensors):
            os.killpg(process_group, signal.SIGKILL)
            send(bucket, tensors)

        sender.send = kill_and_send
        sync._make_sender = make
        return sender

    if rank == 0:
        sync._make_sender = make_killer


OPTIONS = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 32}
