"""The log files of a machine's ranks, as torchrun's agent is to write them: one for each rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """Tells torchrun's agent where each rank's output and last words go.

    folder: for the ranks' last words. log_of: the log file of a global rank; None passes all output
    through. variables: what every rank finds in its environment.

    What rank 0 prints is shown here in any case.
    """

    def __init__(
        self, folder: str, log_of: Callable[[int], str] | None, variables: dict[str, str]
    ) -> None:
        super().__init__()
        self._folder, self._log_of, self._variables = folder, log_of, variables

    @property
    def root_log_dir(self) -> str:
        return self._folder if self._log_of is None else str(Path(self._log_of(0)).parent)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        Path(self.root_log_dir).mkdir(parents=True, exist_ok=True)
        to = LogsDest()
        for local_rank, env in envs.items():
            words = f"{self._folder}/{local_rank}.json"
            env |= self._variables | {"TORCHELASTIC_ERROR_FILE": words}
            to.error_files[local_rank] = words
            to.stdouts[local_rank] = to.stderrs[local_rank] = ""  # as they are
            if self._log_of is None:
                continue
            # One opened file takes both streams, or each would overwrite the other.
            to.stdouts[local_rank] = self._log_of(int(env["RANK"]))
            if env["RANK"] == "0":
                to.tee_stdouts[local_rank] = to.stdouts[local_rank]
        return to
