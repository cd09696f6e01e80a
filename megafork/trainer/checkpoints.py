"""The checkpoints of a training run: what goes into one beside weights and optimizers, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megafork.checkpoint.hf_export import export_hf
from megafork.checkpoint.model_card import model_card
from megafork.checkpoint.store import CheckpointStore
from megafork.config import TrainConfig
from megafork.controller.handle import Batch, Controller
from megafork.metrics.log import read_rows
from megafork.parallel.mesh import Mesh
from megafork.trainer.critic import Critic
from megafork.trainer.policy import Policy


class Checkpoints:
    """Collective: every rank makes one and calls its methods together."""

    def __init__(
        self, config: TrainConfig, mesh: Mesh, policy: Policy, critic: Critic | None
    ) -> None:
        self.config, self.mesh = config, mesh
        self.policy, self.critic = policy, critic
        self.store = CheckpointStore(
            Path(config.run.dir) / "checkpoints",
            mesh,
            config.checkpoint,
            model=Path(config.model.path),
            tokenizer=config.tokenizer.path,
        )
        self.step = 0
        """The last step that was trained"""
        self._saved_step = 0
        self._state: dict[str, Any] | None = None
        """Of that step, on rank 0"""

    def load_newest(self) -> dict[str, Any] | None:
        """Go on after the newest whole checkpoint. Returns its state; None where there is none."""
        path = self.store.newest()
        if path is None:
            return None
        if self.mesh.rank == 0:
            print(f"resuming from {path}", flush=True)
        state = self.store.load(path, self.policy.stages, self.policy.optimizer, self.critic)
        self.policy.restore(state["policy"])
        if self.critic is not None:
            self.critic.restore(state["critic"])
        self.step = self._saved_step = state["step"]
        return state

    def save_if_due(self, batch: Batch, row: dict[str, float], controller: Controller) -> None:
        """Save the step that was trained on the batch, if the config says so.

        row: the step's metrics, which are written later.
        """
        self.step = batch.step
        if self.mesh.rank == 0:
            self._state = {
                "step": batch.step,
                "policy": self.policy.state(),
                "policy_version": batch.step + 1,
                "collector": batch.state,
                "data": controller.data,
                "row": row,
            }
            if self.critic is not None:
                self._state["critic"] = self.critic.state()
        every = self.config.checkpoint.every
        if batch.step == self.config.training.steps or (every and batch.step % every == 0):
            self._save()
        else:
            self.store.poll()

    def save_if_unsaved(self) -> None:
        """Save what was learnt since the last checkpoint, and wait until it is on disk."""
        if self._saved_step != self.step:
            self._save()
        self.mesh.progress.enter("the checkpoint")
        self.store.finish()

    def _save(self) -> None:
        self.mesh.progress.enter(f"checkpoint of step {self.step}")
        self.store.save(
            self.step, self.policy.stages, self.policy.optimizer, self._state, self.critic
        )
        self._saved_step = self.step

    def export(self) -> Path:
        """Write the last policy as an HF folder, with a model card. Returns the folder."""
        self.mesh.progress.enter("the export of the last policy")
        config, target = self.config, self.store.folder / "final"
        dtype = config.checkpoint.final_dtype
        evaluations = Path(config.run.dir) / "eval.jsonl"
        export_hf(
            self.policy,
            self.mesh,
            Path(config.model.path),
            target,
            config.tokenizer.path,
            dtype=None if dtype is None else getattr(torch, dtype),
            card=lambda: model_card(config, read_rows(evaluations)),
        )
        return target
