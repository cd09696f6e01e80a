"""The model in every layout against transformers, one sequence at a time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megafork.config import (
    ModelConfig,
    ParallelConfig,
)
from megafork.data.token_table import token_table
from megafork.model.gpt import (
    head_input,
    head_weight,
    refuse_unsafe_sends,
    transformer_config,
)
from megafork.model.shape import ModelShape
from megafork.model.weights import export_weights
from megafork.parallel.mesh import initialize
from megafork.trainer.policy import Policy
from tests.helpers import reference
from tools.benchmarks.configs import learner_config
from tools.benchmarks.ranks import run_ranks

LAYOUTS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2-uneven": {"pp": 2, "pipeline_layers": [3, 1]},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """(architecture, tied) -> a folder with such a model."""
    made = {}

    def make(architecture, tied):
        key = architecture, tied
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[key] = reference.save_model(folder, tied=tied, architecture=architecture)
        return made[key]

    return make


def make_policy(folder, layout, **model):
    config = learner_config(
        folder,
        parallel=layout,
        model=model,
        training={"micro_batch_tokens": 64, "grad_clip": 1e9},
    )
    return Policy(config, initialize(config.parallel))


def logits_and_gradients(folder, layout, model):
    """On every rank: ({table row: logits of its rank's vocabulary}, {HF name: gradient})."""
    policy = make_policy(folder, layout, **model)
    table = token_table(reference.make_groups(3, 3))
    packs = policy.packs(table)
    logits = {}
    inner = policy.stages[-1].gpt

    def keep_logits(_, inputs, hidden_1TH):
        pack = keep_logits.pack
        with torch.no_grad():
            rows = head_input(inner, hidden_1TH, pack.slots_N) @ head_weight(inner).T
        logits.update(zip(pack.rows_N.tolist(), rows, strict=True))

    def loss_of(pack, logprobs, entropy):
        rows = pack.rows_N.float()
        return (logprobs * rows.cos() + entropy * rows.sin()).sum(), {}

    if policy.mesh.is_last_stage:
        packs_left = iter(packs)
        inner.register_forward_pre_hook(lambda *_: setattr(keep_logits, "pack", next(packs_left)))
        inner.register_forward_hook(keep_logits)
    for ddp in policy.ddp:
        ddp.train()
        ddp.zero_grad_buffer()
    policy.run_packs(packs, loss_of, forward_only=False)
    gradients = dict(export_weights(policy.stages, policy.mesh, lambda p: p.main_grad))
    return logits, {name: value.clone() for name, value in gradients.items()}


def reference_logits_and_gradients(folder, table):
    model = reference.load_model(folder)
    logits = {}
    loss = torch.zeros(())
    for b in range(table.num_samples):
        span = table.rows(b)
        response = table.token_R[span].tolist()
        z = reference.response_logits(model, table.prompt(b).tolist(), response)
        logprobs, entropies = reference.logprobs_and_entropies(z, response)
        rows = torch.arange(span.start, span.stop).float()
        loss = loss + (logprobs * rows.cos() + entropies * rows.sin()).sum()
        logits |= dict(zip(range(span.start, span.stop), z.detach(), strict=True))
    loss.backward()
    return logits, {n: p.grad for n, p in model.named_parameters()}


FAMILIES = [("qwen3", True), ("qwen3", False)]
CASES = [(*family, layout, {}) for family in FAMILIES for layout in LAYOUTS]
CASES += [
    (*family, layout, {"recompute": kind})
    for family in FAMILIES
    for layout in ("tp1", "tp2-pp2")
    for kind in ("full", "selective")
]
# The others differ in the attention only: the four layouts once, tied and untied in turn.
CASES += [
    (architecture, tied, layout, {})
    for architecture, first in (("qwen2", True), ("llama", False))
    for layout, tied in (("tp1", first), ("tp2", first), ("pp2", not first), ("tp2-pp2", first))
]


@pytest.mark.parametrize(
    ("architecture", "tied", "layout", "model"),
    CASES,
    ids=[f"{a}-{'tied' if t else 'untied'}-{layout}-{m}" for a, t, layout, m in CASES],
)
def test_logits_and_gradients_match_transformers(model_folder, architecture, tied, layout, model):
    model_folder = model_folder(architecture, tied)
    layout = LAYOUTS[layout]
    parallel = ParallelConfig(**layout)
    ranks = run_ranks(parallel.world_size, logits_and_gradients, model_folder, layout, model)
    table = token_table(reference.make_groups(3, 3))
    expected_logits, expected = reference_logits_and_gradients(model_folder, table)

    last_stage = ranks[-parallel.tp :]
    assert set(last_stage[0][0]) == set(range(table.num_rows))
    for row, z in expected_logits.items():
        ours = torch.cat([logits[row] for logits, _ in last_stage])[: reference.VOCAB]
        assert (ours - z).abs().max() <= 1e-5

    gradients = {name: g for _, of_rank in ranks for name, g in of_rank.items()}
    assert set(gradients) == set(expected)
    for name, g in expected.items():
        error = (gradients[name] - g).abs().max() / g.abs().max()
        assert error <= 1e-5, f"{name}: {error:.2e}"


def test_a_virtual_pipeline_is_built_with_safe_sends_only(tmp_path):
    shape = ModelShape.from_folder(reference.save_model(tmp_path, tied=False))
    model, parallel = ModelConfig(path=str(tmp_path)), ParallelConfig(pp=2, vpp=2)
    safe = transformer_config(shape, model, parallel)
    refuse_unsafe_sends(safe)
    for change in ({"batch_p2p_comm": True}, {"overlap_p2p_comm": False}):
        with pytest.raises(ValueError, match=r"a virtual pipeline with .* computes wrong values"):
            refuse_unsafe_sends(replace(safe, **change))


def test_the_cpu_patch_leaves_device_contexts_alone():
    """transformers builds its models under `with torch.device("meta")`."""
    code = (
        "import torch; from megafork.parallel import cpu_patch; cpu_patch.apply()\n"
        "with torch.device('meta'): made = [torch.arange(3), torch.empty(2), torch.zeros(1)]\n"
        "assert all(t.device.type == 'meta' for t in made), made"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
