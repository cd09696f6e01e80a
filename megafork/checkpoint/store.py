"""The checkpoints of a run: RUN/checkpoints/step_000010, each under its name only when it is whole.

A checkpoint is written to step_000010.partial. When every rank is done, the sizes and checksums of
its files go into manifest.json, and only then does the folder get its name. One whose files do not
fit their manifest is named and passed over for the one before it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncRequest,
    TemporalAsyncCaller,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megafork.checkpoint import sharded
from megafork.config import CheckpointConfig
from megafork.errors import PeerError, UserError
from megafork.model.weights import Stage
from megafork.parallel.topology import Topology

MANIFEST, STATE = "manifest.json", "state.json"
_BLOCK = 1 << 24


@dataclass
class _Pending:
    """An asynchronous save: what writes it, and where to."""

    request: AsyncRequest
    caller: TemporalAsyncCaller
    step: int
    state: dict[str, Any] | None


class CheckpointStore:
    """All ranks make one and call its methods together. `folder` must be shared by all nodes."""

    def __init__(self, folder: Path, topology: Topology, config: CheckpointConfig) -> None:
        self.folder, self.topology, self.config = folder, topology, config
        self._pending: _Pending | None = None

    def save(
        self,
        step: int,
        stages: Sequence[Stage],
        optimizer: MegatronOptimizer,
        state: dict[str, Any] | None,
    ) -> None:
        """Write the checkpoint of `step`; asynchronously if the config says so.

        state: of rank 0, what JSON can hold. Raises UserError when this one, or one that was still
        being written, cannot be written; those before it are untouched.
        """
        self.finish()
        partial = self._partial(step)

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        try:
            self.topology.on_rank_zero(begin)
            contents = sharded.state_dict(stages, optimizer, self.topology)
            request = sharded.save(partial, contents, self.topology)
            _save_generators(self._generators(partial))
        except OSError as error:
            raise self._failed(step, error) from error
        caller = TemporalAsyncCaller()
        caller.schedule_async_call(request)
        self._pending = _Pending(request, caller, step, state)
        if not self.config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Publish what has been written to its end meanwhile. Collective, cheap."""
        if self._pending is not None and self._pending.caller.is_current_async_call_done():
            self._publish(self._pending)

    def finish(self) -> None:
        """Wait for what is being written, and publish it."""
        if self._pending is not None:
            self._pending.caller.is_current_async_call_done(blocking=True)
            self._publish(self._pending)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are named on rank 0's stderr."""
        paths = self.topology.on_rank_zero(lambda: sorted(self.folder.glob("step_??????"))[::-1])
        for path in paths:
            problem = self._problem(path)
            if problem is None:
                return path
            if self.topology.rank == 0:
                print(f"warning: {path} is damaged ({problem}): passed over", file=sys.stderr)
        return None

    def load(
        self, path: Path, stages: Sequence[Stage], optimizer: MegatronOptimizer
    ) -> dict[str, Any]:
        """Fill weights and optimizer, whatever layout wrote them; returns the saved state."""
        sharded.load(path, stages, optimizer, self.topology)
        _restore_generators(self._generators(path))
        return self.topology.on_rank_zero(lambda: json.loads((path / STATE).read_text()))

    def _partial(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.partial"

    def _generators(self, folder: Path) -> Path:
        rank, world_size = self.topology.rank, self.topology.world_size
        return folder / f"generators_{rank:05d}_of_{world_size:05d}.pt"

    def _publish(self, pending: _Pending) -> None:
        """megatron's own metadata, the manifest, the name; then older checkpoints may go."""
        self._pending = None
        first, *rest = pending.request.finalize_fns
        try:
            first()  # raises on every rank when one could not write; the causes are told on rank 0
        except CheckpointException as error:
            if self.topology.rank != 0:
                raise PeerError("the checkpoint could not be written") from None
            shutil.rmtree(self._partial(pending.step), ignore_errors=True)
            causes = {str(cause) for cause, _ in error.failures.values()}
            raise self._failed(pending.step, OSError("; ".join(sorted(causes)))) from None
        for finalize in rest:
            finalize()
        partial = self._partial(pending.step)
        try:
            self.topology.on_rank_zero(
                lambda: _write_and_sync(partial / STATE, json.dumps(pending.state))
            )
        except OSError as error:
            raise self._failed(pending.step, error) from error
        files = {name: found for part in self._checksums(partial) for name, found in part.items()}

        def rename() -> None:
            _write_and_sync(partial / MANIFEST, json.dumps(files, indent=1))
            final = partial.with_suffix("")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._remove_old(pending.step)

        try:
            self.topology.on_rank_zero(rename)
        except OSError as error:
            raise self._failed(pending.step, error) from error

    def _failed(self, step: int, error: Exception) -> UserError:
        whole = sorted(self.folder.glob("step_??????"))
        last = f"{whole[-1]} is untouched" if whole else "there is none before it"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({error}); "
            f"{last}. Make room and go on with megafork train --resume"
        )

    def _remove_old(self, newest: int) -> None:
        paths = sorted(self.folder.glob("step_??????"))
        for path in paths[: -self.config.keep_last]:
            step, every = int(path.name.removeprefix("step_")), self.config.keep_every
            if step != newest and not (every and step % every == 0):
                shutil.rmtree(path, ignore_errors=True)

    def _checksums(self, folder: Path) -> list[dict[str, tuple[int, int]]]:
        """{file: (size, CRC-32)}; every rank reads its share of the files."""
        names = self.topology.on_rank_zero(
            lambda: sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        )
        own = names[self.topology.rank :: self.topology.world_size]
        return self.topology.all_gather_object({name: _checksum(folder / name) for name in own})

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, on every rank."""

        def read() -> dict[str, list[int]] | str:
            try:
                return json.loads((path / MANIFEST).read_text())
            except (OSError, ValueError) as error:
                return f"no readable {MANIFEST}: {error}"

        expected = self.topology.on_rank_zero(read)
        if isinstance(expected, str):
            return expected
        found = {name: pair for part in self._checksums(path) for name, pair in part.items()}
        for name, pair in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != tuple(pair):
                return f"{name} has {found[name][0]} bytes and another content than was written"
        return None


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return size, crc


def _write_and_sync(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _save_generators(path: Path) -> None:
    """The state of every random generator of this rank."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = numpy.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)


def _restore_generators(path: Path) -> None:
    """Another layout has no such file: its generators stay as the run's seed made them."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys, *rest))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
