"""Our name table against mbridge, which shares no code with it: the same parameters, both ways.

mbridge (0.15.1, requirements/mbridge.txt) fills and reads our own GPTModel. It knows the norms by
the names of TransformerEngine's fused layers alone; it is told those of megatron's local layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from megafork.config import ModelConfig, ParallelConfig
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from tests.helpers import reference
from tests.helpers.conversion import LAYOUTS, assert_same, read_all
from tools.benchmarks.ranks import run_ranks

INSTALLED = Path(__file__).parents[2] / ".venv" / "mbridge"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (INSTALLED / "mbridge").is_dir(),
        reason="mbridge is not in .venv/mbridge: run tools/setup_cpu.sh --test",
    ),
]
# mbridge pads the vocabulary where the ranks' shards are equal already, to a multiple of this.
DIVISIBLE_BY = 128
# Of a tied Llama mbridge looks for a head on the last of several stages.
FAMILIES = [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", False)]


def make_bridge(folder, tp):
    sys.path.append(str(INSTALLED))
    from mbridge import AutoBridge

    bridge = AutoBridge.from_config(
        AutoConfig.from_pretrained(folder), make_vocab_size_divisible_by=DIVISIBLE_BY * tp
    )
    # What its own model provider, which wants TransformerEngine, would set.
    bridge.vocab_size = reference.VOCAB
    bridge.padded_vocab_size = -(-reference.VOCAB // (DIVISIBLE_BY * tp)) * DIVISIBLE_BY * tp
    layer = "model.layers.{layer_number}."
    bridge._OTHER_MAPPING = {"input_layernorm.weight": [layer + "input_layernorm.weight"]}
    bridge._MLP_MAPPING = bridge._MLP_MAPPING | {
        "pre_mlp_layernorm.weight": [layer + "post_attention_layernorm.weight"]
    }
    return bridge


def compare(folder, layout):
    """Parameters that mbridge fills otherwise than we do, and what it reads out of the model."""
    parallel = ParallelConfig(**layout)
    model = ModelConfig(path=str(folder), dtype="bfloat16", vocab_divisible_by=DIVISIBLE_BY)
    scorer = Scorer(model, parallel, initialize(parallel), micro_batch_tokens=64)
    gpt = scorer.stages[0].gpt
    expected = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    bridge = make_bridge(folder, parallel.tp)
    with torch.no_grad():
        exported = {name: value.clone() for name, value in bridge.export_weights([gpt])}
        for parameter in gpt.parameters():
            parameter.fill_(torch.nan)
        bridge.load_weights([gpt], str(folder))
    differ = [n for n, p in gpt.named_parameters() if not torch.equal(p, expected[n])]
    return differ, exported


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("architecture", "tied"), FAMILIES)
def test_mbridge_agrees(tmp_path, architecture, tied, layout):
    source = reference.save_model(
        tmp_path / "m", tied=tied, dtype=torch.bfloat16, architecture=architecture
    )
    parallel = LAYOUTS[layout]
    world = ParallelConfig(**parallel).world_size
    for differ, exported in run_ranks(world, compare, source, parallel):
        assert not differ
        assert_same(read_all(source), exported)
