"""Where torchrun's agent puts what the ranks of a machine print: one file for each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

from megafork.launch import JOINED


class RankLogs(LogsSpecs):
    """log_of: global rank to file. What rank 0 prints is seen here, too."""

    def __init__(self, log_of: Callable[[int], str]) -> None:
        super().__init__()
        self._log_of = log_of
        self._folder = tempfile.TemporaryDirectory(prefix="megafork-ranks-")  # last words

    @property
    def root_log_dir(self) -> str:
        return str(Path(self._log_of(0)).parent)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        Path(self.root_log_dir).mkdir(parents=True, exist_ok=True)
        to = LogsDest()
        for local_rank, env in envs.items():
            words = f"{self._folder.name}/{local_rank}.json"
            env |= {"TORCHELASTIC_ERROR_FILE": words, JOINED: "1"}
            to.stdouts[local_rank] = self._log_of(int(env["RANK"]))
            to.stderrs[local_rank] = ""  # one opened file takes both, or each overwrites the other
            to.error_files[local_rank] = words
            if env["RANK"] == "0":
                to.tee_stdouts[local_rank] = to.stdouts[local_rank]
        return to
