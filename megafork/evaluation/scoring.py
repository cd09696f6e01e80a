"""`megafork score`: log-probability and entropy of every response token of a jsonl file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megafork.config import ScoreConfig
from megafork.data.sample import Group, Sample
from megafork.data.text_files import read_jsonl
from megafork.data.token_table import token_table
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.errors import UserError
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import Mesh, initialize, shutdown
from megafork.system.disk import naming

Batch = Sequence[tuple[dict, Group]]
"""input objects, each with its response"""
Scores = Sequence[tuple[list[float], list[float]]]
"""(logprobs, entropies) of each response of a batch"""
Write = Callable[[Batch, Scores], None]


def score_file(config: ScoreConfig, input_path: Path, output_path: Path) -> None:
    """Write every input object with "logprobs" and "entropies" added, in input order: as jsonl, or
    as parquet if the output's name ends in .parquet.

    Collective; rank 0 reads and writes. The output appears under its name when it is complete.
    Raises UserError naming file and line for an input that cannot be scored.
    """
    mesh = initialize(config.parallel)
    scorer = Scorer(
        config.model,
        config.parallel,
        mesh,
        micro_batch_tokens=config.micro_batch_tokens,
        temperature=config.temperature,
    )
    partial = output_path.with_name(output_path.name + ".partial")
    with contextlib.ExitStack() as stack:
        source: Iterator[tuple[dict, Group]] = iter(())
        write: Write | None = None
        if mesh.rank == 0:
            source = read_responses(input_path, config, scorer.shape.vocab_size)
            stack.callback(partial.unlink, missing_ok=True)
            stack.enter_context(naming(partial))
            writer = _parquet_writer if output_path.suffix == ".parquet" else _jsonl_writer
            opened = stack.enter_context(contextlib.ExitStack())
            write = opened.enter_context(writer(partial))
        while True:
            batch = mesh.on_rank_zero(lambda: list(islice(source, config.batch_sequences)))
            if not batch:
                break
            values = _score([group for _, group in batch], scorer, mesh)
            if write is not None:
                write(batch, values)
        if mesh.rank == 0:
            opened.close()
            os.replace(partial, output_path)
    shutdown()


@contextlib.contextmanager
def _jsonl_writer(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(batch: Batch, scores: Scores) -> None:
            for (row, _), (logprobs, entropies) in zip(batch, scores, strict=True):
                scored = row | {"logprobs": logprobs, "entropies": entropies}
                file.write(json.dumps(scored, ensure_ascii=False) + "\n")

        yield write


@contextlib.contextmanager
def _parquet_writer(path: Path) -> Iterator[Write]:
    """Columns of token ids and scores, and `input`, the rest of the input object as JSON."""
    import pyarrow
    from pyarrow import parquet

    ids, numbers = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
    columns = {"prompt_ids": ids, "response_ids": ids, "logprobs": numbers, "entropies": numbers}
    schema = pyarrow.schema({"input": pyarrow.string()} | columns)
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:

        def write(batch: Batch, scores: Scores) -> None:
            # The JSON is ASCII, because a lone surrogate has no UTF-8.
            rest = [{k: v for k, v in row.items() if k not in columns} for row, _ in batch]
            found = {
                "input": [json.dumps(row) for row in rest],
                "prompt_ids": [group.prompt_ids for _, group in batch],
                "response_ids": [group.samples[0].token_ids for _, group in batch],
                "logprobs": [logprobs for logprobs, _ in scores],
                "entropies": [entropies for _, entropies in scores],
            }
            file.write_table(pyarrow.table(found, schema=schema))

        yield write


def _score(groups: list[Group], scorer: Scorer, mesh: Mesh) -> Scores:
    """Return (logprobs, entropies) of each group's one response on rank 0, elsewhere []."""
    table = token_table(groups)
    scores = scorer.score(table)
    mine = None
    if mesh.is_last_stage and mesh.tp_rank == 0:
        mine = (scores.rows_N, scores.old_logprobs_N, scores.entropy_N)
    parts = [None] * mesh.world_size if mesh.rank == 0 else None
    torch.distributed.gather_object(mine, parts)
    if parts is None:
        return []
    columns = torch.full((2, table.num_rows), torch.nan)
    for part in parts:
        if part is not None:
            rows, logprobs, entropies = part
            columns[:, rows] = torch.stack([logprobs, entropies])
    return [
        (columns[0, table.rows(b)].tolist(), columns[1, table.rows(b)].tolist())
        for b in range(table.num_samples)
    ]


def read_responses(
    path: Path, config: ScoreConfig, vocab_size: int
) -> Iterator[tuple[dict, Group]]:
    """Yield each object with its response, as the only sample of a group.

    Raises UserError for a line that cannot be scored.
    """
    tokenizer: Tokenizer | None = None
    for index, (where, row) in enumerate(read_jsonl(path, number=None, kinds=".jsonl")):
        if not isinstance(row, dict):
            raise UserError(f"{where}: not an object")
        if "prompt_ids" in row and "response_ids" in row:
            prompt, response = row["prompt_ids"], row["response_ids"]
            for key in ("prompt_ids", "response_ids"):
                _check_ids(row[key], f"{where}: {key}", vocab_size)
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
            tokenizer = tokenizer or load_tokenizer(config, chat_template=False)
            prompt = tokenizer.encode_prompt(row["prompt"])
            response = tokenizer.encode(row["response"])
        else:
            raise UserError(
                f"{where}: needs prompt_ids and response_ids, or prompt and response (strings)"
            )
        if not prompt:
            raise UserError(f"{where}: the prompt has no token, so nothing predicts the response")
        on_one_rank = config.parallel.tokens_on_one_rank(len(prompt) + len(response) - 1)
        if on_one_rank > config.micro_batch_tokens:
            raise UserError(
                f"{where}: {len(prompt) + len(response)} tokens do not fit micro_batch_tokens="
                f"{config.micro_batch_tokens}: raise it to at least {on_one_rank}"
            )
        sample = Sample(index, np.array(response), np.zeros(len(response)), truncated=False)
        yield row, Group(index, prompt, 0, [sample])


def _check_ids(ids: Any, where: str, vocab_size: int) -> None:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{where} must be a list of integers")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise UserError(
            f"{where} holds {outside[0]}, outside the model's vocabulary of {vocab_size}: was it "
            "made with another tokenizer?"
        )
