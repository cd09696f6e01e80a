"""What only rank 0 has: the rollout server, the data, the verifier, the run's files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megafork.config import TrainConfig
from megafork.data.prompts import Prompt, PromptStream, read_prompts
from megafork.data.tokenizer import load_tokenizer
from megafork.errors import Interrupted
from megafork.evaluation.heldout import accuracy
from megafork.interruption import Interruption
from megafork.logging.metrics import MetricsLog, read_rows
from megafork.rewards.verifier import Judge
from megafork.rollout.collector import Collector, RolloutBatch
from megafork.rollout.engine import RolloutServer
from megafork.rollout.journal import Journal
from megafork.rollout.sampling import Sampling
from megafork.training.step import Skipped
from megafork.types import Group
from megafork.weight_sync import agreement

_HEALTH_CHECKS = 3


class Front:
    """Waits for the server, reads the prompts, opens the logs.

    What generates raises Interrupted when a signal comes, and UserError or ServerError when the
    server fails; all of it can be asked for again.
    """

    def __init__(
        self,
        config: TrainConfig,
        server: RolloutServer,
        interruption: Interruption,
        eos: tuple[int, ...],
        *,
        steps_done: int = 0,
    ) -> None:
        self.config, self.server, self.interruption = config, server, interruption
        self.run_dir = Path(config.run.dir)
        self.sampling = Sampling(
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_response_tokens,
            stop_token_ids=eos,
        )
        tokenizer = load_tokenizer(config, chat_template=config.data.chat_template)
        prompts = read_prompts(config.data.train, config.data, tokenizer.encode)
        self.client = server.connect()
        self.collector = Collector(
            client=self.client,
            prompts=PromptStream(prompts, config.data.seed),
            tokenizer=tokenizer,
            judge=Judge(config.reward),
            rollout=config.rollout,
            sampling=self.sampling,
            journal_dir=self.run_dir / "rollouts",
        )
        self.heldout: list[Prompt] = []
        if config.data.eval is not None:
            heldout = read_prompts(config.data.eval, config.data, tokenizer.encode)
            self.heldout = heldout[: config.eval.prompts]
        self.probe_prompts = prompts[: config.sync.check_prompts]
        self.log = MetricsLog(
            self.run_dir,
            config.training.steps,
            tensorboard=config.run.tensorboard,
            steps_done=steps_done,
        )
        self.batch: RolloutBatch | None = None

    def collect(self, step: int, policy_version: int) -> list[Group]:
        self.batch = self.interruption.run(self.collector.collect(step, policy_version))
        return self.batch.groups

    def probe(self) -> list[Group]:
        probing = agreement.probe(self.client, self.probe_prompts, self.sampling)
        return self.interruption.run(probing)

    def evaluate(self, step: int) -> float:
        """Held-out accuracy, also written to eval.jsonl."""
        collector, config = self.collector, self.config.eval
        evaluating = accuracy(
            self.client,
            self.heldout,
            collector.tokenizer,
            collector.judge,
            replace(self.sampling, temperature=config.temperature),
            config.samples,
        )
        value = self.interruption.run(evaluating)
        self.log.evaluation(step, value, len(self.heldout) * config.samples)
        return value

    def has_evaluated(self, step: int) -> bool:
        return any(row["step"] == step for row in read_rows(self.run_dir / "eval.jsonl"))

    def server_died(self) -> bool:
        """After a failure: whether a new server is needed. A signal may have ended it: Interrupted.

        One that does not answer is as good as dead.
        """
        for _ in range(_HEALTH_CHECKS):
            if self.interruption.received is not None:
                raise Interrupted(self.interruption.received)
            if self.client.health():
                return False
            time.sleep(1.0)
        return True

    def restart_server(self, cause: Exception) -> None:
        self.log.note(f"warning: the rollout server died and is replaced. {cause}")
        self.client = self.collector.client = self.server.restart()

    def save_skipped(self, step: int, skipped: Sequence[Skipped]) -> list[Path]:
        """The groups of mini-batches without an update, for a look at them."""
        assert self.batch is not None
        paths = []
        for part in skipped:
            path = self.run_dir / "skipped" / f"step_{step:06d}_minibatch_{part.number:03d}.jsonl"
            path.unlink(missing_ok=True)  # of the step before the run was resumed
            members = set(part.table.group_B.tolist())
            with Journal(path) as journal:
                for group in self.batch.groups:
                    if group.prompt_index in members:
                        journal.append(group)
            self.log.note(
                f"warning: step {step}, mini-batch {part.number}: no update, for {part.reason}; "
                f"its groups are in {path}"
            )
            paths.append(path)
        return paths
