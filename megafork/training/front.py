"""What only rank 0 has: the rollout servers, the data, the verifier, the run's files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megafork.config import TrainConfig
from megafork.data.prompts import PromptStream, encode_rows, lines_of, read_both
from megafork.data.tokenizer import load_tokenizer
from megafork.data.unchanged import identity
from megafork.errors import OnEveryRank, ServerDied, UserError
from megafork.evaluation import heldout
from megafork.interruption import Interruption
from megafork.logging.figure import draw_curves
from megafork.logging.metrics import MetricsLog, read_rows
from megafork.model.shape import ModelShape
from megafork.parallel.addresses import own_address
from megafork.rewards.verifier import Judge
from megafork.rollout.background import BackgroundLoop, Job
from megafork.rollout.collector import Collector, RolloutBatch
from megafork.rollout.ends import stop_token_ids
from megafork.rollout.fleet import Fleet
from megafork.rollout.journal import SUFFIX, Journal
from megafork.rollout.judging import Judging
from megafork.rollout.messages import Link, serve
from megafork.rollout.sampling import Sampling
from megafork.rollout.step_journals import StepJournals
from megafork.rollout.tally import Tally, tell_regularly
from megafork.sample import Group
from megafork.training.step import Skipped
from megafork.types import TokenTable, known_table
from megafork.weight_sync import agreement

T = TypeVar("T")
SKIPPED = "skipped"
"""Folder of a run: groups of mini-batches without an update"""
_MOST_BYTES = 64 << 20
"""Of a rank's request: the uids of a batch's samples"""


class Front:
    """Reads the prompts, opens the logs. Close it. The servers have to be up before it is used.

    With rollout.max_policy_lag = n the batches of the n steps after the one that is asked for are
    generated meanwhile, one after the other. What generates raises Interrupted when a signal comes
    and ServerDied when a new server is needed; all of it can be asked for again.
    """

    def __init__(
        self,
        config: TrainConfig,
        fleet: Fleet,
        key: str,
        interruption: Interruption,
        shape: ModelShape,
        *,
        steps_done: int = 0,
    ) -> None:
        self.config, self.client, self.interruption = config, fleet, interruption
        self.run_dir = Path(config.run.dir)
        self.skipped_dir = self.run_dir / SKIPPED
        chat, thinking = config.data.chat_template, config.data.enable_thinking
        self.tokenizer = load_tokenizer(config, chat_template=chat, enable_thinking=thinking)
        self.judge = Judge(config.reward)
        self.sampling = Sampling(
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_response_tokens,
            stop_token_ids=stop_token_ids(shape, self.tokenizer),
        )
        self.judging = self._judging()
        rows, heldout = read_both(config.data)
        self.data = identity(config.data, rows, heldout)
        """What a checkpoint keeps of the data"""
        prompts = encode_rows(rows, config.data, self.tokenizer.encode_prompt)
        print("\n".join(["first prompt:", *lines_of(prompts[0], self.tokenizer)]), flush=True)
        self.collector = Collector(
            client=self.client,
            prompts=PromptStream(prompts, config.data.seed),
            judging=self.judging,
            journals=StepJournals(self.run_dir / "rollouts"),
            rollout=config.rollout,
            sampling=self.sampling,
        )
        found = encode_rows(heldout, config.data, self.tokenizer.encode_prompt)
        self.heldout = found[: config.eval.prompts]
        # One at least for each server: they are asked in turn.
        self.probe_prompts = prompts[: max(config.sync.check_prompts, len(fleet.clients))]
        self.log = MetricsLog(
            self.run_dir,
            config.training.steps,
            tensorboard=config.run.tensorboard,
            steps_done=steps_done,
        )
        fleet.note = self._note_of_servers
        self.batch: RolloutBatch | None = None
        self.batch_step = 0
        self._ends_are_expected = False
        self._told_failures: set[str] = set()
        self._background = BackgroundLoop()
        self._background.__enter__()
        self._ahead: dict[int, Job[RolloutBatch]] = {}
        serving = serve(own_address(), key, self._talk, _MOST_BYTES)
        self.address = self._background.submit(serving).result()
        """Where the rows of a batch are to be had, and where nodes with verifiers join"""
        self.state = self.collector.state()
        """The collector's when the current step's batch was full, for a checkpoint"""
        self._forget_skipped_after(steps_done)

    def _judging(self) -> Judging:
        self.judge.tell = lambda text: self.log.note(text)
        longest = self.config.rollout.max_response_tokens
        judging = Judging(self.tokenizer, self.judge, longest)
        judging.note = self._note_of_servers
        return judging

    def _forget_skipped_after(self, steps_done: int) -> None:
        """Those steps will be done again."""
        for path in self.skipped_dir.glob("step_*"):
            if int(path.name[5:11]) > steps_done:
                path.unlink()

    def restore(self, state: dict[str, Any]) -> None:
        self.state = state
        self.collector.restore(state)

    def close(self) -> None:
        """Whatever is being generated is given up."""
        self._background.__exit__()
        self.judge.close()
        self.collector.journals.close()
        self.log.close()

    async def _talk(self, hello: dict[str, Any], link: Link) -> None:
        """With a process of another rank, until its connection ends."""
        if hello["role"] == "verifiers":
            return await self.judging.join(hello, link)
        while True:
            asked, arrays = await link.receive()
            try:
                if self.batch is None or asked["step"] != self.batch_step:
                    raise ValueError(f"step {self.batch_step} is trained on now")
                rows = self.batch.rows(arrays["uids"].tolist())
            except Exception as error:  # the rank raises it
                await link.send({"kind": "error", "cause": repr(error)})
            else:
                await link.send({"kind": "rows"}, rows)

    def collect(self, step: int, policy_version: int) -> TokenTable:
        """The batch that the current policy version trains on, without rows."""
        self.interruption.check()
        self.batch = None  # its tokens were trained on
        self._collect_ahead(step, 0, policy_version)
        with self._telling(f"step {step:>4}", lambda: self.collector.tally):
            self.batch, self.batch_step = self._wait(self._ahead[step]), step
        self._tell_failures()
        self.state = self.batch.state
        if step == self.config.training.steps:  # nobody waits for its tail
            self._background.submit(self.collector.cancel_running()).result()
        del self._ahead[step]
        rollout = self.config.rollout
        carries = rollout.tail == "carry"  # one version of the lag is then the tail's
        for lag in range(1, rollout.max_policy_lag - carries + 1):
            if step + lag <= self.config.training.steps:
                self._collect_ahead(step + lag, lag, policy_version)
        filtering = self.config.algorithm.overlong_filtering
        return known_table(self.batch.groups, overlong_filtering=filtering)

    def _collect_ahead(self, step: int, lag: int, policy_version: int) -> None:
        """Begin with a step's batch, after those of the steps before it, unless it has begun."""
        if step not in self._ahead:
            collecting = self._collected(self._ahead.get(step - 1), step, policy_version + lag)
            self._ahead[step] = self._background.submit(collecting)

    async def _collected(
        self, before: Job[RolloutBatch] | None, step: int, trained_by: int
    ) -> RolloutBatch:
        if before is not None:
            await before.ended()
        return await self.collector.collect(step, trained_by)

    def probe(self) -> list[Group]:
        return self._generated(agreement.probe(self.client, self.probe_prompts, self.sampling))

    def evaluate(self, step: int) -> float:
        """Held-out accuracy (avg@k), also written, with more, to eval.jsonl."""
        config = self.config.eval
        sampling = replace(self.sampling, temperature=config.temperature)
        tally = Tally(groups=len(self.heldout))
        evaluating = heldout.sample(
            self.client,
            self.heldout,
            self.judging,
            sampling,
            config.samples,
            self.config.rollout.max_num_seqs * len(self.client.clients),
            tally,
        )
        with self._telling(f"step {step:>4}  evaluation", lambda: tally):
            row = heldout.row(self._generated(evaluating))
        self._tell_failures()
        self.log.evaluation(step, row)
        return row["eval/accuracy"]

    @contextlib.contextmanager
    def _telling(self, what: str, tally: Callable[[], Tally]) -> Iterator[None]:
        """Inside, a person sees how far it is."""
        telling = tell_regularly(tally, lambda text: self.log.progress(f"{what}  {text}"))
        job = self._background.submit(telling)
        try:
            yield
        finally:
            job.cancel()

    def _tell_failures(self) -> None:
        """Of each kind of a verifier's failures the first of the run; metrics.jsonl counts them."""
        for kind, cause in dict(self.judge.causes).items():
            if kind not in self._told_failures:
                self._told_failures.add(kind)
                self.log.note(f"warning: no verdict ({kind}), so the response scores 0: {cause}")

    def has_evaluated(self, step: int) -> bool:
        return any(row["step"] == step for row in read_rows(self.run_dir / "eval.jsonl"))

    def _generated(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            self.interruption.check()
        except OnEveryRank:
            work.close()
            raise
        return self._wait(self._background.submit(work))

    def _wait(self, job: Job[T]) -> T:
        try:
            return self.interruption.wait(job)
        except OnEveryRank:
            raise
        except Exception as error:
            self._give_up_ahead()
            self.check_server(error)
            raise

    def _give_up_ahead(self) -> None:
        """All batches of later steps; what was generated for them is in the journal."""
        for job in self._ahead.values():
            job.cancel()
        for job in self._ahead.values():
            with contextlib.suppress(Exception):
                job.result()
        self._ahead.clear()
        self._background.submit(self.collector.cancel_running()).result()
        self.collector.restore(self.state)

    def check_server(self, cause: Exception) -> None:
        """After a failure. Raises ServerDied when no server is left.

        One that does not answer is as good as dead. Raises Interrupted when a signal came: it may
        have ended the servers too.
        """
        self.interruption.check()
        if not self.client.health():
            self.interruption.check()
            raise ServerDied(str(cause)) from cause

    def drop_lost_servers(self, cause: Exception) -> bool:
        """After a push that failed: whether servers were lost, and others can take it.

        Raises as `check_server` does.
        """
        self.interruption.check()
        num_lost = self.client.drop_lost()
        self.check_server(cause)
        return num_lost > 0

    def give_up_server(self, death: ServerDied) -> list[str]:
        """No server is left. Returns those that do not answer."""
        self.log.note(f"warning: the rollout server died and is replaced. {death}")
        self._give_up_ahead()
        return self.client.silent()

    def wait_for_server(self) -> None:
        self.client.wait_for_one(self.config.rollout.startup_timeout_s, self.interruption.check)

    def give_up(self, death: ServerDied) -> NoReturn:
        raise UserError(
            f"the rollout server died, and rollout.max_restarts={self.config.rollout.max_restarts} "
            f"new ones did not do: {death}"
        )

    def expect_ends(self) -> None:
        """Tell no more of servers and verifiers that end: nothing is generated from here on."""
        self._ends_are_expected = True

    def _note_of_servers(self, text: str) -> None:
        # A signal may have ended them too.
        if not self._ends_are_expected and self.interruption.received is None:
            self.log.note(text)

    def report_tokens(self, step: int, report: dict[str, Any] | None) -> None:
        """Write which tokens fork, with their text, where there is something to write."""
        if report is None:
            return
        for name in ("highest_entropy", "most_selected"):
            for token in report[name]:
                token["text"] = self.tokenizer.name(token["id"])
        self.log.forking_tokens(step, report)

    def keep_entropies(
        self, step: int, histogram: dict[str, Any] | None, responses: Sequence[dict[str, Any]]
    ) -> None:
        """Write what there is of a step's entropies, the responses with their text."""
        tokenizer = self.tokenizer
        if histogram is not None:
            self.log.entropy_histogram(step, histogram)
        self.log.samples(
            [
                response
                | {
                    "prompt": tokenizer.decode(response["prompt_ids"]),
                    "text": [tokenizer.name(token) for token in response["token_ids"]],
                }
                for response in responses
            ]
        )

    def tell_end(self, final: Path) -> None:
        """Of a run whose last policy is in the folder `final`."""
        self.log.note(f"checkpoint  {final}")
        self.log.note(f"curves      {draw_curves(self.run_dir)}")
        self.write_report()
        if evaluations := read_rows(self.run_dir / "eval.jsonl"):
            first, last = (evaluations[i]["eval/accuracy"] for i in (0, -1))
            self.log.note(f"held-out accuracy  {first:.1%} before, {last:.1%} after")

    def write_report(self) -> None:
        """RUN/report.html; a run does not fail for it."""
        from megafork.report.page import write_report  # matplotlib and jinja2 take a second

        try:
            self.log.note(f"report      {write_report(self.run_dir)}")
        except Exception as error:  # a picture of what is safe on disk is worth no run
            cause = f"{type(error).__name__}: {error}"
            self.log.note(f"warning: {self.run_dir}/report.html was not written: {cause}")

    def keep_skipped(self, step: int, skipped: Sequence[Skipped], *, is_last: bool) -> None:
        """Write the groups of mini-batches without an update, and tell of them.

        Raises UserError, when all is told, if the run `is_last` of all.
        """
        assert self.batch is not None
        for part in skipped:
            members = set(part.table.group_B.tolist())
            name = f"step_{step:06d}_minibatch_{part.number:03d}{SUFFIX}"
            with Journal(self.skipped_dir / name) as journal:
                for group in self.batch.groups:
                    if group.prompt_index in members:
                        journal.append(group)
            self.log.note(
                f"warning: step {step}, mini-batch {part.number}: no update, for {part.reason}; "
                f"its groups are in {journal.path}"
            )
        if is_last:
            raise UserError(
                f"step {step}: training.max_skipped={self.config.training.max_skipped} updates in "
                f"a row were skipped, the last for {skipped[-1].reason}. The groups are in "
                f"{self.skipped_dir}, the weights as they were before: mend the cause (the "
                "verifier, training.lr, training.spike_factor) and go on with megafork train "
                f"--resume {self.config.run.dir}"
            )
