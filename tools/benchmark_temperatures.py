"""What two-temperature decoding costs: tokens a second of a server without the processor, of one
that has loaded it but is not asked, and of one that is asked for it.

    OMP_NUM_THREADS=1 python tools/benchmark_temperatures.py [--vocabulary 151936] [--device cpu]

The model is a random Qwen3 of four small layers, whose weights are made in a temporary folder, so
the processor's share is larger than with any model of use. Each server is warmed up, then the best
of --repeats counts. Prints a table with the ratios to the server without it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megafork.rollout.client import RolloutClient
from megafork.rollout.sampling import Sampling, TwoTemperatures
from megafork.rollout.vllm_server import VllmServer

PROMPT = list(range(3, 19))


def save_model(folder: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


async def generated(client: RolloutClient, responses: int, sampling: Sampling) -> int:
    """Tokens of so many responses, all asked for at once; none ends before its limit."""
    groups = await asyncio.gather(
        *(client.generate(PROMPT, 8, sampling) for _ in range(responses // 8))
    )
    return sum(len(one.token_ids) for group in groups for one in group)


def tokens_per_second(
    server: VllmServer, sampling: Sampling, arguments: argparse.Namespace
) -> float:
    asyncio.run(generated(server.client(), 8, sampling))
    best = 0.0
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        tokens = asyncio.run(generated(server.client(), arguments.responses, sampling))
        best = max(best, tokens / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    plain = Sampling(max_tokens=arguments.tokens)
    two = Sampling(
        max_tokens=arguments.tokens, forking_temperatures=TwoTemperatures(0.672, 1.2, 0.8)
    )
    cases = (("not loaded", False, plain), ("not asked for", True, plain), ("asked for", True, two))
    print(f"{arguments.vocabulary:,} logits, {arguments.responses} responses at once\n")
    print("| processor | tokens/s | ratio |")
    print("|" + " --- |" * 3)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        save_model(model, arguments.vocabulary)
        baseline = 0.0
        for label, is_loaded, sampling in cases:
            server = VllmServer(
                model,
                dtype="float32",
                max_model_len=len(PROMPT) + arguments.tokens,
                max_num_seqs=arguments.responses,
                log_path=Path(name) / "vllm.log",
                device=arguments.device,
                two_temperatures=is_loaded,
            )
            with server:
                rate = tokens_per_second(server, sampling, arguments)
            baseline = baseline or rate
            print(f"| {label} | {rate:,.0f} | {rate / baseline:.2f} |", flush=True)


if __name__ == "__main__":
    main()
