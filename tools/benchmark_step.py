"""Times a whole optimizer step on the top rho of the tokens against the same step on all of them.

    OMP_NUM_THREADS=1 python tools/benchmark_step.py [--shapes small,qwen3-0.6b]

Linux only, one thread, one process at a time, float32, random weights. "head" is the output layer
with its loss alone, forward and backward into `main_grad`, on the selected rows. The step is
score (all rows: selection needs their entropies), selection and Policy.update; every advantage is
non-zero, so rho = 1 is the dense step. Least CPU times of some repetitions that take turns: of one
thread, so the time itself on an idle machine. Peak is resident memory beyond what lies there
between steps. Qwen3-0.6B needs 13 GiB, and as many minutes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.configs import learner_config
from benchmarks.measuring import Job, in_a_fork, memory, on_ranks, peak_from_here
from transformers import Qwen3Config, Qwen3ForCausalLM

from megafork.config import (
    ForkingConfig,
)
from megafork.data.sample import Group, Sample
from megafork.data.token_table import TokenTable, token_table
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from megafork.parallel.mesh import initialize
from megafork.parallel.ports import free_port
from megafork.trainer.policy import Policy

RHOS = (1.0, 0.5, 0.2, 0.1)
VOCAB = 151_936
SHAPES = {
    "small": {
        "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip


def make_head(rows: int, hidden: int) -> Job:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator).requires_grad_()
    w = torch.nn.Parameter(torch.randn(VOCAB, hidden, generator=generator).mul_(hidden**-0.5))
    w.main_grad = torch.zeros_like(w)
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)

    def work() -> None:
        linear_logprob_and_entropy(x, w, targets)[0].sum().backward()
        x.grad = None

    return Job(work)


def save_model(folder: Path, shape: dict[str, int]) -> None:
    config = Qwen3Config(
        vocab_size=VOCAB, max_position_embeddings=4096, tie_word_embeddings=True, rope_theta=1e6,
        **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_table(tokens: int, group_size: int = 4, length: int = 128) -> TokenTable:
    """Responses of `length` tokens less 16 of prompt, with advantages of both signs."""
    generator = torch.Generator().manual_seed(0)

    def random_ids(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    groups = []
    for index in range(tokens // (length * group_size)):
        responses = [random_ids(length - 16) for _ in range(group_size)]
        samples = [
            Sample(index * group_size + i, ids, [-1.0] * len(ids), False)
            for i, ids in enumerate(responses)
        ]
        groups.append(Group(index, random_ids(16), 1, samples))
    table = token_table(groups)
    signs = torch.arange(table.num_samples) % 2 * 2.0 - 1.0
    return table.with_columns(advantage_R=signs[table.sample_R])


def make_policy(folder: Path, tokens: int) -> Policy:
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    training = {"micro_batch_tokens": tokens, "warmup_steps": 0}
    config = learner_config(folder, training=training, rollout={"max_response_tokens": 64})
    return Policy(config, initialize(config.parallel))


def time_steps(folder: Path, tokens: int, repeats: int) -> dict[float, dict[str, float]]:
    """By rho: seconds of score and selection, of update and of both, and the peak in MiB."""
    torch.set_num_threads(1)
    policy, table = make_policy(folder, tokens), make_table(tokens)
    best: dict[float, dict[str, float]] = {}
    for repeat in range(repeats + 1):  # the first allocates the optimizer's moments
        for rho in RHOS if repeat else RHOS[-1:]:
            policy.forking = ForkingConfig(select="top", rho=rho)
            before = peak_from_here()
            started = time.process_time()
            scores = policy.score(table)
            [mask], _ = policy.select([table], [scores], step=1)
            scored = time.process_time()
            metrics = policy.update(table, scores, mask)
            ended = time.process_time()
            seen = {
                "score": scored - started,
                "update": ended - scored,
                "step": ended - started,
                "peak": memory("VmHWM") - before,
                "rows": metrics["head_rows"],
            }
            if repeat:
                known = best.setdefault(rho, seen)
                best[rho] = {name: min(known[name], value) for name, value in seen.items()}
    return best


def report(name: str, tokens: int, repeats: int) -> None:
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        in_a_fork(save_model, Path(folder), shape)
        steps = in_a_fork(time_steps, Path(folder), tokens, repeats)
    dense = steps[1.0]
    heads = {rho: int(costs["rows"]) for rho, costs in steps.items()}
    head_costs = {
        rho: on_ranks(1, make_head, rows, shape["hidden_size"], repeats=repeats + 1)
        for rho, rows in heads.items()
    }
    print(
        f"\n### {name}: hidden {shape['hidden_size']}, {shape['num_hidden_layers']} layers, "
        f"vocabulary {VOCAB:,}, {tokens} tokens\n"
    )
    print(
        "| rho | rows | head | of dense | score + select | update | of dense | whole step "
        "| of dense | peak of the step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for rho, costs in steps.items():
        head = head_costs[rho].cpu_seconds
        print(
            f"| {rho} | {heads[rho]} | {head:.2f} s | {head / head_costs[1.0].cpu_seconds:.2f} "
            f"| {costs['score']:.2f} s "
            f"| {costs['update']:.2f} s | {costs['update'] / dense['update']:.2f} "
            f"| {costs['step']:.2f} s | {costs['step'] / dense['step']:.2f} "
            f"| {costs['peak']:.0f} MiB |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    for name in args.shapes.split(","):
        report(name, args.tokens, args.repeats)


if __name__ == "__main__":
    main()
