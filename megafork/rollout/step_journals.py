"""The journals of a run: which step's is written now, and what those of earlier attempts hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from megafork.data.sample import Group
from megafork.errors import UserError
from megafork.rollout.journal import (
    Damage,
    Journal,
    journal_path,
    journalled_steps,
    read_step,
)

_log = logging.getLogger(__name__)


class StepJournals:
    """The journals in `folder`, of which one step's is open at a time. Close it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journal: Journal | None = None

    def open(self, step: int, is_wanted: Callable[[int], bool]) -> dict[int, Group]:
        """Open the step's journal. Returns the groups in it by prompt index, those that are wanted.

        Raises UserError where a wanted one is damaged and may have been trained on.
        """
        damaged: list[Damage] = []
        found = read_step(self.folder, step, is_wanted, damaged.append)
        for damage in damaged:
            index = damage.prompt_index
            if index is None or (is_wanted(index) and index not in found):
                self._refuse_or_tell(damage, step)
        self.close()
        self._journal = Journal(journal_path(self.folder, step))
        return found

    def append(self, group: Group, step: int) -> None:
        """Write a group to the open journal, which is that of `step`; it is on disk on return."""
        assert self._journal is not None
        assert self._journal.path == journal_path(self.folder, step)
        self._journal.append(group)

    def find(self, references: Sequence[tuple[int, int]]) -> list[Group]:
        """Find groups of earlier steps, each by its prompt's index and its journal's step.

        Raises UserError where one is missing.
        """
        wanted = dict(references)
        groups: dict[int, Group] = {}
        for step in set(wanted.values()):
            indices = {index for index, origin in wanted.items() if origin == step}
            damaged: list[Damage] = []
            found = read_step(self.folder, step, indices.__contains__, damaged.append)
            if missing := sorted(indices - found.keys()):
                raise UserError(
                    f"{journal_path(self.folder, step)}: prompt {missing[0]}'s group, which "
                    "was carried over to a later step, is not in it: bring the file back, or "
                    "resume from a checkpoint before that step"
                    + "".join(f"\n  {damage}" for damage in damaged)
                )
            groups |= found
        return [groups[index] for index, _ in references]

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _refuse_or_tell(self, damage: Damage, step: int) -> None:
        """Warn of the damage; raise UserError if a later step has a journal.

        The damaged step may have been trained then, and would be trained on other groups now.
        """
        if max(journalled_steps(self.folder)) > step:
            raise UserError(
                f"{damage}, and step {step} may have been trained on what the file held: bring it "
                f"back from a copy, or delete the files of step {step} and of all later ones in "
                f"{self.folder} to generate their groups again"
            )
        _log.warning("%s; it is generated again", damage)
