"""The checkpoints of a run: RUN/checkpoints/step_000010, each under its name only when it is whole.

A checkpoint is written to step_000010.partial. When every rank is done, the sizes and checksums of
its files go into manifest.json, and only then does the folder get its name. One whose files do not
fit their manifest is named and passed over for the one before it.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megafork.checkpoint import sharded
from megafork.checkpoint.files import checksum, files_of, rename_synced, write_and_sync
from megafork.checkpoint.hf import HF, copy_side_files
from megafork.checkpoint.writer import Writer, take_checksums
from megafork.config import CheckpointConfig
from megafork.errors import PeerError, UserError
from megafork.model.weights import Stage
from megafork.parallel.mesh import Mesh
from megafork.system.disk import sync
from megafork.system.parsing import parse_json

MANIFEST, STATE, GENERATORS = "manifest.json", "state.json", "generators.pt"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass
class _Pending:
    """A save that is being written."""

    writer: Writer
    step: int
    state: bytes


class CheckpointStore:
    """The folder with a run's checkpoints. Every rank makes one, and all call its methods together.

    `folder` must be shared by all nodes.

    model: the HF folder that lends every checkpoint its config and tokenizer (in hf/), so that
    `megafork convert megatron-to-hf` needs nothing else; None: there is no hf/. tokenizer: as in
    the config, in place of the model's own.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        config: CheckpointConfig,
        *,
        model: Path | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.folder, self.mesh, self.config = folder, mesh, config
        self.model, self.tokenizer = model, tokenizer
        self._pending: _Pending | None = None
        self._damaged: set[Path] = set()

    def save(
        self,
        step: int,
        stages: Sequence[Stage],
        optimizer: MegatronOptimizer,
        state: dict[str, Any] | None,
        critic: sharded.Saved | None = None,
    ) -> None:
        """Write the checkpoint of `step`; asynchronously if the config says so.

        state: of rank 0, what JSON can hold, with a key "critic" where there is one. Raises
        UserError when this one, or one that was still being written, cannot be written; those
        before it are untouched.
        """
        self.finish()
        partial = self._partial(step)
        try:
            self.mesh.on_rank_zero(lambda: self._begin(partial))
            contents = sharded.contents(stages, optimizer, self.mesh, critic)
            request = sharded.save(partial, contents, self.mesh)
            states = self.mesh.all_gather_object((self._coordinates, _generators()))
            self.mesh.on_rank_zero(
                lambda: write_and_sync(partial / GENERATORS, _as_bytes(dict(states)))
            )
        except OSError as error:
            raise self._failed(step, error) from error
        self._pending = _Pending(Writer(request), step, json.dumps(state).encode())
        if not self.config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Publish what has been written to its end meanwhile. Collective, cheap."""
        if self._pending is not None and self._pending.writer.is_done(wait=False):
            self._publish(self._pending)

    def finish(self) -> None:
        """Wait for what is being written, and publish it."""
        if self._pending is not None:
            self._pending.writer.is_done(wait=True)
            self._publish(self._pending)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are named on rank 0's stderr."""
        for path in self.mesh.on_rank_zero(self._named)[::-1]:
            problem = self._problem(path)
            if problem is None:
                return path
            self._damaged.add(path)
            if self.mesh.rank == 0:
                print(f"warning: {path} is damaged ({problem}): passed over", file=sys.stderr)
        return None

    def load(
        self,
        path: Path,
        stages: Sequence[Stage],
        optimizer: MegatronOptimizer,
        critic: sharded.Saved | None = None,
    ) -> dict[str, Any]:
        """Fill weights and optimizers, whatever layout wrote them; returns the saved state.

        Raises UserError for a critic that the checkpoint does not hold.
        """
        state = self.mesh.on_rank_zero(lambda: parse_json((path / STATE).read_text()))
        if critic is not None and "critic" not in state:
            raise UserError(
                f"{path} holds no critic: algorithm.advantages=gae begins with a new run (its "
                "model.path may be the HF folder of this one's last policy)"
            )
        sharded.load(path, stages, optimizer, self.mesh, critic)
        states = torch.load(path / GENERATORS, weights_only=True)
        if self._coordinates in states:  # else another layout wrote it, and the run's seed decides
            _restore_generators(states[self._coordinates])
        return state

    def _named(self) -> list[Path]:
        """Return the paths named like checkpoints, the oldest first. Others are the user's own."""
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("step_*"))
        return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]

    def _partial(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.partial"

    @property
    def _coordinates(self) -> str:
        """Return this rank's coordinates in its layout, as text."""
        at = self.mesh
        return (
            f"tp {at.tp_rank}/{at.tp_size} pp {at.pp_rank}/{at.pp_size} "
            f"cp {at.cp_rank}/{at.cp_size} dp {at.dp_rank}/{at.dp_size}"
        )

    def _begin(self, partial: Path) -> None:
        """Make the folder to write to; those that a killed run left half-written go."""
        for left in self.folder.glob("step_*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        if self.model is not None:
            (partial / HF).mkdir()
            copy_side_files(self.model, partial / HF, tokenizer=self.tokenizer)

    def _publish(self, pending: _Pending) -> None:
        """Let megatron finish, write state and manifest, give the name; older checkpoints may
        go."""
        self._pending = None
        step, partial = pending.step, self._partial(pending.step)
        try:
            for finalize in pending.writer.finalize:
                finalize()  # the first raises on every rank when one could not write
            self.mesh.on_rank_zero(lambda: write_and_sync(partial / STATE, pending.state))
            self.mesh.on_rank_zero(lambda: self._give_name(step))
        except CheckpointException as error:
            statuses = self.mesh.all_gather_object(pending.writer.exit_status)
            if self.mesh.rank != 0:
                raise PeerError("the checkpoint could not be written") from None
            causes = {
                f"rank {rank}'s writer ended with status {statuses[rank]}"
                if statuses[rank]
                else str(cause)
                for rank, (cause, _) in error.failures.items()
            }
            raise self._failed(step, OSError("; ".join(sorted(causes)))) from None
        except OSError as error:
            raise self._failed(step, error) from error

    def _give_name(self, step: int) -> None:
        partial = self._partial(step)
        files = take_checksums(partial)
        for name, (size, _) in files.items():
            if (partial / name).stat().st_size != size:
                raise OSError(f"{name} is not as it was written")
        for path in files_of(partial):
            if (name := str(path.relative_to(partial))) not in files:
                sync(path)
                files[name] = checksum(path)
        write_and_sync(partial / MANIFEST, json.dumps(files, indent=1).encode())
        final = partial.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        rename_synced(partial, final)
        self._damaged.discard(final)
        self._remove_old(final)

    def _failed(self, step: int, error: Exception) -> UserError:
        if self.mesh.rank == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        whole = [path for path in self._named() if path not in self._damaged]
        last = f"{whole[-1]} is untouched" if whole else "there is none before it"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({error}); "
            f"{last}. Make room and go on with megafork train --resume"
        )

    def _remove_old(self, newest: Path) -> None:
        """Remove checkpoints older than the last `keep_last`; damaged ones do not count among
        these.

        `newest` and every `keep_every`-th step stay.
        """
        named, every = self._named(), self.config.keep_every
        kept = [path for path in named if path not in self._damaged][-self.config.keep_last :]
        for path in named[: named.index(kept[0])]:
            step = int(path.name.removeprefix("step_"))
            if path != newest and not (every and step % every == 0):
                shutil.rmtree(path, ignore_errors=True)

    def _checksums(self, folder: Path, names: Sequence[str]) -> dict[str, tuple[int, int] | str]:
        """Return {file: (size, CRC-32), or why it cannot be read}; every rank reads its share."""
        own: dict[str, tuple[int, int] | str] = {}
        for name in names[self.mesh.rank :: self.mesh.world_size]:
            try:
                own[name] = checksum(folder / name)
            except OSError as error:
                own[name] = error.strerror or str(error)
        parts = self.mesh.all_gather_object(own)
        return {name: found for part in parts for name, found in part.items()}

    def _problem(self, path: Path) -> str | None:
        """Return why a checkpoint is damaged, on every rank; None where it is whole."""

        def read() -> dict[str, tuple[int, int]] | str:
            try:
                files = parse_json((path / MANIFEST).read_text())
                return {name: (size, crc) for name, (size, crc) in files.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                return f"no readable {MANIFEST}: {error}"

        expected = self.mesh.on_rank_zero(read)
        if isinstance(expected, str):
            return expected
        found = self._checksums(path, list(expected))
        for name, pair in expected.items():
            if isinstance(found[name], str):
                return f"{name}: {found[name]}"
            if found[name] != pair:
                return f"{name} has {found[name][0]} bytes and another content than was written"
        return None


def _as_bytes(value: Any) -> bytes:
    """Return the bytes that torch.save would write: to a full disk it raises no OSError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _generators() -> dict[str, Any]:
    """Return the state of every random generator of this rank."""
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
    return state


def _restore_generators(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys, *rest))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
