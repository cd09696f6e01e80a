"""Sharded checkpoints in megatron-core's dist_checkpointing format: any layout loads any other's.

Weights are stored under their global names and shapes, the distributed optimizer's state beside
them ("fully_reshardable"). Everything else that a run needs to go on is a JSON object.
"""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megafork.checkpoint import optimizer_state
from megafork.checkpoint.files import torch_save_raises_os_error
from megafork.checkpoint.writer import renew_results, without_copies
from megafork.errors import UserError
from megafork.model.weights import Stage
from megafork.parallel.mesh import Mesh
from megafork.parallel.unpickling import guarded_checkpoint

# It warns of an "old incomplete / corrupted checkpoint" where our own files are there before it.
logging.getLogger(dist_checkpointing.serialization.__name__).setLevel(logging.ERROR)


class Saved(Protocol):
    """The parts of a second model that are saved: its stages and its optimizer."""

    stages: list[Stage]

    @property
    def optimizer(self) -> MegatronOptimizer: ...


def contents(
    stages: Sequence[Stage],
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    critic: Saved | None = None,
    *,
    loading: bool = False,
) -> dict[str, Any]:
    """The policy's state and, under names that begin with "critic.", the critic's."""
    sharded = state_dict(stages, optimizer, mesh, loading=loading)
    if critic is not None:
        own = state_dict(critic.stages, critic.optimizer, mesh, loading=loading)
        add_prefix_for_sharding(own, "critic.")
        sharded["critic"] = own
    return sharded


def state_dict(
    stages: Sequence[Stage],
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    *,
    loading: bool = False,
) -> dict[str, Any]:
    """Return the tensors that dist_checkpointing saves or fills: weights by stage, and the
    optimizer's state."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": mesh.groups.dp_cp,
    }
    sharded: dict[str, Any] = {
        f"model{index}": stage.gpt.sharded_state_dict(metadata=metadata)
        for index, stage in enumerate(stages)
    }
    if optimizer is not None:
        optimizer_state.prepare(optimizer)
        weights = {f"model{i}": sharded[f"model{i}"] for i in range(len(stages))}
        sharded["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata=metadata
        )
    return sharded


def save(folder: Path, contents: dict[str, Any], mesh: Mesh) -> AsyncRequest:
    """Begin to write; the request, which writes and then finishes, is the caller's to run.

    Replicas share the writing of what they hold alike. Raises OSError on rank 0, which writes what
    is no tensor at once, when it cannot.
    """
    strategy = FullyParallelSaveStrategyWrapper(
        dist_checkpointing.serialization.get_default_save_sharded_strategy(),
        mesh.groups.dp_cp,
    )
    options: dict[str, Any] = {"sharded_strategy": strategy, "async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # later versions default to a package of its own
    renew_results()
    without_copies(contents)
    with torch_save_raises_os_error():
        request = dist_checkpointing.save(contents, str(folder), **options)
    assert request is not None
    return request


def load(
    folder: Path,
    stages: Sequence[Stage],
    optimizer: MegatronOptimizer | None,
    mesh: Mesh,
    critic: Saved | None = None,
) -> None:
    """Fill weights and optimizer state from `folder`, whatever layout wrote it. Collective.

    Raises UserError for what is damaged, or holds code.
    """
    strategy = FullyParallelLoadStrategyWrapper(
        dist_checkpointing.serialization.get_default_load_sharded_strategy(str(folder)),
        mesh.groups.dp_cp,
    )
    wanted = contents(stages, optimizer, mesh, critic, loading=True)
    try:
        with guarded_checkpoint():
            loaded = dist_checkpointing.load(wanted, str(folder), sharded_strategy=strategy)
    except (pickle.UnpicklingError, CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        told = str(causes[0]).partition("\n")[0]
        raise UserError(f"the checkpoint {folder} cannot be read ({told}): copy it again") from None
    _fill(stages, optimizer, loaded)
    if critic is not None:
        _fill(critic.stages, critic.optimizer, loaded["critic"])


def _fill(
    stages: Sequence[Stage], optimizer: MegatronOptimizer | None, loaded: dict[str, Any]
) -> None:
    for index, stage in enumerate(stages):
        stage.gpt.load_state_dict(loaded[f"model{index}"])
    if optimizer is not None:
        optimizer_state.fill(optimizer, loaded["optimizer"])
