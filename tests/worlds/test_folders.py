"""Every reader of a folder refuses the same ones, and what is accepted is what transformers has."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megafork.config import ModelConfig, ParallelConfig
from megafork.data.token_table import token_table
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from tests.helpers import folders, reference
from tests.helpers.commands import QUICKSTART, megafork, small_run
from tests.helpers.folders import Null, change, configure
from tools.benchmarks.ranks import run_ranks

CLOSE = 2e-5
"""float32 of four layers against transformers' float32, whose products have other orders."""


def quickstart(tmp_path):
    """The quickstart's model, tied and with its tokenizer, in a folder of its own."""
    return folders.copy(QUICKSTART / "model", tmp_path / "m")


def yarn(folder):
    configure(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})


def extra_layer(folder):
    change(folder, folders.add_layer)


def other_head(folder):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][20, 3] += 1

    change(folder, untie)


def stale_single(folder):
    stale = (folder / folders.SINGLE).read_bytes()
    folders.shard(folder)
    (folder / folders.SINGLE).write_bytes(stale)


VARIANTS = [folders.to_fp8, yarn, extra_layer, other_head, stale_single]


def readers(tmp_path, folder):
    """{reader: command line that reads `folder`}"""
    (tmp_path / "in.jsonl").write_text('{"prompt_ids": [3], "response_ids": [4, 5]}\n')
    score = ["score", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    run = small_run(tmp_path / "run", "parallel.tp=1")
    dry = [*run, "--dry-run"]
    problems = QUICKSTART / "data" / "heldout.jsonl"
    short = ["data.max_prompt_tokens=24", "rollout.max_response_tokens=24"]
    keys = ["data.prompt_key=prompt", "data.id_key=", *short]
    return {
        "score": [*score, "--model", folder],
        "train": [*run, f"model.path={folder}"],
        "dry run": [*dry, f"model.path={folder}"],
        "kl.reference": [*dry, f"kl.reference={folder}", "kl.coefficient=0.1"],
        "critic.path": [*dry, "algorithm.advantages=gae", f"critic.path={folder}"],
        "convert": ["convert", "hf-to-megatron", "--hf", folder, "--megatron", tmp_path / "out"],
        "plan": ["plan", "--model", folder, "--node", "h100", "--nodes", "2", *short],
        "eval": [
            *("eval", "--model", folder, "--output", tmp_path / "out"),
            *(problems, *keys, "reward.verifier=countdown"),
        ],
        "generate": [
            *("generate", "--model", folder, "--data", problems),
            *("--output", tmp_path / "out.jsonl", *keys),
        ],
    }


@pytest.mark.parametrize("make", VARIANTS, ids=lambda make: make.__name__)
def test_every_reader_refuses_with_one_message(tmp_path, make):
    folder = quickstart(tmp_path)
    make(folder)
    told = {}
    for reader, command in readers(tmp_path, folder).items():
        done = megafork(*command)
        assert done.returncode == 2, (reader, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, reader
        told[reader] = done.stderr.strip().splitlines()[-1]
        assert str(folder) in told[reader]
    assert len(set(told.values())) == 1, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "m"]


# ---- what is accepted ----


def llama3_as_before(folder):
    """transformers 4's spelling"""
    old = {key: value for key, value in reference.LLAMA3_ROPE.items() if key != "rope_theta"}
    configure(folder, rope_parameters=None, rope_scaling=old, rope_theta=5e5)


def llama3_twice(folder):
    configure(folder, rope_scaling=reference.LLAMA3_ROPE)


def llama3_with_outer_positions(folder):
    inner = reference.LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
    configure(folder, rope_parameters=inner, original_max_position_embeddings=8192)


def empty_scaling(folder):
    configure(folder, rope_scaling={}, sliding_window=16, max_window_layers=1)


def stored_head(folder):
    copy = {"lm_head.weight": "model.embed_tokens.weight"}
    change(folder, lambda t: t.update({k: t[v].clone() for k, v in copy.items()}))


def no_head_dim(folder):
    configure(
        folder, head_dim=None, rope_scaling=Null, layer_types=None, mlp_bias=False, pretraining_tp=2
    )


def stored_frequencies(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    inverse = 1e6 ** -(torch.arange(0, 32, 2) / 32)
    change(folder, lambda t: t.update({name: inverse}))


def half_precision(folder):
    change(folder, lambda t: t.update({name: value.half() for name, value in t.items()}))
    configure(folder, dtype=None, torch_dtype="float16")
    folders.shard(folder, 3)


def other_eps_and_theta(folder):
    configure(folder, rms_norm_eps=1e-2, rope_parameters=None, rope_theta=500)


ACCEPTED = [
    ("llama", False, llama3_as_before),
    ("llama", False, llama3_twice),
    ("llama", True, llama3_with_outer_positions),
    ("qwen3", False, empty_scaling),
    ("qwen3", True, stored_head),
    ("qwen2", False, no_head_dim),
    ("qwen3", False, stored_frequencies),
    ("qwen3", False, half_precision),
    ("qwen3", False, other_eps_and_theta),
]


def scores(paths, groups):
    """Log-probabilities of every response token, for each folder, on one rank."""
    mesh = initialize(ParallelConfig())
    table = token_table(groups)
    found = []
    for path in paths:
        model = ModelConfig(path=str(path), dtype="float32")
        scorer = Scorer(model, ParallelConfig(), mesh, micro_batch_tokens=256)
        scored = scorer.score(table)
        logprobs = torch.empty(table.num_rows)
        logprobs[scored.rows_N] = scored.old_logprobs_N
        found.append(logprobs)
    return found


def test_what_is_accepted_is_what_transformers_computes(tmp_path):
    paths = []
    for architecture, tied, make in ACCEPTED:
        folder = tmp_path / f"{architecture}-{make.__name__}"
        reference.save_model(folder, tied=tied, architecture=architecture)
        make(folder)
        paths.append(folder)
    groups = reference.make_groups(3, 2, longest=40)
    ((*found,),) = run_ranks(1, scores, paths, groups)
    for path, ours in zip(paths, found, strict=True):
        model = reference.load_model(path)
        theirs = []
        for group in groups:
            for sample in group.samples:
                with torch.no_grad():
                    z = reference.response_logits(model, group.prompt_ids, sample.token_ids)
                theirs.append(reference.logprobs_and_entropies(z, sample.token_ids)[0])
        assert float((ours - torch.cat(theirs)).abs().max()) < CLOSE, path.name


def test_no_reader_minds_a_repeated_head(tmp_path):
    """As Qwen3-0.6B has it: a plan, a check before the start and a conversion take it."""
    folder = quickstart(tmp_path)
    stored_head(folder)
    for reader in ("plan", "convert"):
        done = megafork(*readers(tmp_path, folder)[reader])
        assert done.returncode in (0, 1), done.stderr  # 1: the plan does not fit
        assert "error" not in done.stderr
    assert json.loads((tmp_path / "out" / "hf" / "copies.json").read_text())
    assert "lm_head.weight" in load_file(folder / folders.SINGLE)
