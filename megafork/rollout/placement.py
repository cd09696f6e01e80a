"""The GPUs of a node that its rollout servers take."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from megafork.config import ServerConfig
from megafork.errors import UserError


@dataclass(frozen=True)
class NodeDevices:
    """The devices of a node: their kind, and how servers and trainers divide them."""

    kind: str
    """cuda or cpu"""
    num_trainers: int = 0
    """Ranks that train on the node, on its first GPUs"""
    shared: bool = False
    """Servers and trainers take turns on the same GPUs (rollout.placement = "colocated")"""
    sees_trainers: bool = False
    """Servers open memory of other GPUs than their own (sync.transport = "local")"""

    def environments(self, rollout: ServerConfig) -> list[dict[str, str]]:
        """Return the variables that give each of the node's `rollout.servers` its GPUs.

        Raises UserError where there are too few.
        """
        if self.kind != "cuda":
            return [{} for _ in range(rollout.servers)]
        visible = visible_gpus()
        gpus = gpus_of_servers(rollout, visible, num_trainers=self.num_trainers, shared=self.shared)
        seen = [with_trainers(own, visible) if self.sees_trainers else own for own in gpus]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(names)} for names in seen]


def gpus_of_servers(
    rollout: ServerConfig, visible: list[str], *, num_trainers: int, shared: bool
) -> list[list[str]]:
    """Return the GPUs of each of the node's `rollout.servers`, among the `visible` ones.

    num_trainers: ranks that train on this node, on the first GPUs. shared: servers take the first
    ones too, in turns with the trainers (rollout.placement = "colocated"); else those after the
    trainers'. A node that has exactly the trainers' GPUs is shared in any case, at the same time:
    rollout.gpu_memory_utilization is then the servers' part.
    Raises UserError where there are too few.
    """
    tp, needed = rollout.tensor_parallel, rollout.servers * rollout.tensor_parallel
    first = 0 if shared or len(visible) == num_trainers else num_trainers
    if first + needed > len(visible):
        after = f" after the {num_trainers} of the trainer's ranks" if first else ""
        raise UserError(
            f"rollout.servers={rollout.servers} with rollout.tensor_parallel={tp} need {needed} "
            f"GPUs{after}, but this node has {len(visible)} ({','.join(visible) or 'none'}): start "
            "fewer servers or ranks, or share the trainer's GPUs with rollout.placement=colocated"
        )
    return [visible[first + i * tp : first + (i + 1) * tp] for i in range(rollout.servers)]


def with_trainers(own: list[str], visible: list[str]) -> list[str]:
    """Return the GPUs that a server sees which takes its `own`.

    Its own come first, because vLLM takes the first ones; then the others, whose memory it opens
    where a trainer's weights are in it (sync.transport=local).
    """
    return own + [gpu for gpu in visible if gpu not in own]


def visible_gpus() -> list[str]:
    """Return this process's GPUs, by the names that CUDA_VISIBLE_DEVICES takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    # A process of its own: who starts servers has no use for torch, and would keep it.
    program = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    return [str(number) for number in range(int(done.stdout.split()[-1]))]
