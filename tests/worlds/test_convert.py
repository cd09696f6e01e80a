"""HF folders to megatron-core checkpoints and back: bits, layouts, memory, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from megafork.checkpoint import layout as checkpoint_layout
from megafork.checkpoint.convert import hf_to_megatron
from megafork.checkpoint.hf_export import export_hf
from megafork.checkpoint.store import CheckpointStore
from megafork.checkpoint.verify import compare_logits, first_difference
from megafork.config import CheckpointConfig, ModelConfig, ParallelConfig
from megafork.errors import UserError
from megafork.model.hf_folder import SafetensorsFolder
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from tests.helpers import reference
from tests.helpers.commands import ROOT, environment, megafork
from tests.helpers.conversion import (
    LAYOUTS,
    assert_same,
    make,
    read_all,
    to_hf,
    to_megatron,
)
from tests.helpers.step import make_policy, make_table
from tools.benchmark_convert import measure, write_model
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow

FAMILIES = [(architecture, tied) for architecture in reference.ARCHITECTURES for tied in (1, 0)]


def edit(folder, change):
    """Rewrite the only file of a folder, after `change` of its {name: tensor}."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("architecture", "tied"), FAMILIES)
def test_there_and_back_is_bitwise(tmp_path, architecture, tied, dtype):
    source = make(tmp_path / "m", architecture, tied, getattr(torch, dtype))
    (source / "tokenizer.json").write_text('{"any": "thing"}')
    back = to_hf(to_megatron(source, tmp_path / "megatron"), tmp_path / "back")
    assert_same(read_all(source), read_all(back))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    # As published: numbered files and an index, which transformers reads.
    files = sorted(path.name for path in back.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert files == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_all(source))
    loaded = reference.load_model(back, getattr(torch, dtype)).state_dict()
    assert_same(reference.load_model(source, getattr(torch, dtype)).state_dict(), loaded)
    assert not list(tmp_path.glob("*.partial"))


def load_compare_and_save(folder, converted, layout, target):
    """Names of parameters that megatron-core's own reader fills otherwise than the HF folder."""
    parallel = ParallelConfig(**layout)
    mesh = initialize(parallel)
    # Padded to another vocabulary size than a checkpoint that was converted.
    model = ModelConfig(path=str(folder), dtype="bfloat16", vocab_divisible_by=4)
    gpt = Scorer(model, parallel, mesh, micro_batch_tokens=64).stages[0].gpt
    expected = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(torch.nan)
    metadata = {"dp_cp_group": mesh.groups.dp_cp}
    loaded = dist_checkpointing.load(gpt.sharded_state_dict(metadata=metadata), str(converted))
    gpt.load_state_dict(loaded)
    differ = [n for n, p in gpt.named_parameters() if not torch.equal(p, expected[n])]
    if mesh.rank == 0:
        Path(target).mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(gpt.sharded_state_dict(metadata=metadata), str(target))
    return differ


BOTH_WAYS = list(itertools.product(reference.ARCHITECTURES, LAYOUTS))


@pytest.mark.parametrize("case", BOTH_WAYS, ids="-".join)
def test_megatron_reads_ours_and_we_read_its_own(tmp_path, case):
    """At every layout: ours loads as the HF folder does, and what megatron saves comes back."""
    architecture, layout = case
    tied = (architecture == "llama") == (layout in ("tp1", "tp2-pp2"))  # in turn
    source = make(tmp_path / "m", architecture, tied)
    ours, theirs = to_megatron(source, tmp_path / "ours"), tmp_path / "theirs"
    parallel = LAYOUTS[layout]
    world = ParallelConfig(**parallel).world_size
    for differ in run_ranks(world, load_compare_and_save, source, ours, parallel, theirs):
        assert not differ
    assert_same(read_all(source), read_all(to_hf(theirs, tmp_path / "back", like=source)))
    assert first_difference(source, theirs) is None


def train_save_and_export(folder, layout, checkpoints, exported):
    policy = make_policy(
        folder, layout, dtype="bfloat16", lr=1e-3, weight_decay=0.1, forking={"select": "all"}
    )
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    policy.update(table, scores, mask)
    store = CheckpointStore(checkpoints, policy.mesh, CheckpointConfig(), model=folder)
    store.save(1, policy.stages, policy.optimizer, {})
    store.finish()
    export_hf(policy, policy.mesh, folder, exported)


def test_a_run_s_checkpoint_becomes_an_hf_folder(tmp_path):
    """From itself alone, beside an optimizer's state: the same bits as the run's own export."""
    source = make(tmp_path / "m", dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text('{"any": "thing"}')
    checkpoints, exported = tmp_path / "checkpoints", tmp_path / "exported"
    checkpoints.mkdir()
    layout = {"tp": 2, "pp": 2}
    run_ranks(4, train_save_and_export, source, layout, checkpoints, exported)
    back = to_hf(checkpoints / "step_000001", tmp_path / "back")
    assert_same(read_all(exported), read_all(back))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (exported / name).read_bytes()
    before = read_all(source)
    assert not torch.equal(before["lm_head.weight"], read_all(back)["lm_head.weight"])


def test_a_checkpoint_in_bfloat16_is_torch_s_own_cast(tmp_path):
    """A head that is stored twice, too."""
    source = make(tmp_path / "m", tied=True, dtype=torch.float32)
    edit(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    megatron, back = to_megatron(source, tmp_path / "megatron"), tmp_path / "back"
    folders = ("--megatron", megatron, "--hf", back)
    done = megafork("convert", "megatron-to-hf", *folders, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    before = {name: tensor.to(torch.bfloat16) for name, tensor in read_all(source).items()}
    assert "lm_head.weight" in before
    assert_same(before, read_all(back))
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    refused = megafork("convert", "megatron-to-hf", *folders, "--dtype", "float16")
    assert refused.returncode == 2 and "bfloat16" in refused.stderr


@pytest.mark.parametrize("task", ["HF to megatron", "megatron to HF"])
def test_memory_does_not_grow_with_the_model(many_layers, tmp_path, task):
    """Half of its 0.66 GB would already be too much: blocks are of 0.13 GB."""
    size, hf, megatron = many_layers
    source = hf if task == "HF to megatron" else megatron
    took = measure(task, source, tmp_path / "out")
    assert took["peak"] - took["before"] < size / 2


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many-layers")
    size = write_model(folder / "hf", "many-layers")
    hf_to_megatron(folder / "hf", folder / "megatron", max_file_bytes=100_000_000)
    return size, folder / "hf", folder / "megatron"


def stored_in(folder):
    """{key: (shape, dtype)}, of objects None."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key: (tuple(m.size), m.properties.dtype) if isinstance(m, TensorStorageMetadata) else None
        for key, m in stored.items()
    }


def test_a_checkpoint_is_what_megatron_would_have_saved(tmp_path):
    """The same tensors and objects under the same names, shapes and dtypes."""
    source = make(tmp_path / "m", "qwen2")
    ours, theirs = to_megatron(source, tmp_path / "ours"), tmp_path / "theirs"
    run_ranks(1, load_compare_and_save, source, ours, {}, theirs)
    of_ours, of_theirs = (stored_in(folder) for folder in (ours, theirs))
    vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}
    # What 0.16 keeps in common.pt, as we do, 0.19 keeps in an object; it reads either.
    assert set(of_ours) == set(of_theirs) - {"common_state/shard_0_1"}
    for key in set(of_ours) - vocabulary:  # padded otherwise
        assert of_ours[key] == of_theirs[key], key


def test_blocks_of_a_few_rows_are_the_same_checkpoint(tmp_path, monkeypatch):
    """As at real sizes, where an embedding comes in many blocks; here the last is all padding."""
    source = make(tmp_path / "m")
    monkeypatch.setattr(checkpoint_layout, "BLOCK_BYTES", 3 * 64 * 4)
    small = to_megatron(source, tmp_path / "small")
    read_in_small = to_hf(small, tmp_path / "a")
    monkeypatch.undo()
    assert_same(read_all(source), read_all(read_in_small))
    assert_same(read_all(source), read_all(to_hf(small, tmp_path / "b")))
    for differ in run_ranks(2, load_compare_and_save, source, small, {"tp": 2}, tmp_path / "c"):
        assert not differ


def test_a_tied_head_that_is_stored_twice_comes_back_twice(tmp_path):
    """As the published Qwen3-0.6B and 1.7B are."""
    source = make(tmp_path / "m", tied=True)
    edit(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    back = to_hf(to_megatron(source, tmp_path / "megatron"), tmp_path / "back")
    assert_same(read_all(source), read_all(back))


def add_unknown(tensors):
    tensors["model.layers.0.mlp.router.weight"] = torch.zeros(2)


def untie(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][200, 3] += 1


def cast_one(tensors):
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()


def cast_to_int(tensors):
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


def drop(tensors):
    del tensors["model.layers.3.self_attn.o_proj.weight"]


def cut(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_unknown, "holds 1 tensors that .* does not have, model.layers.0.mlp.router.weight"),
        (untie, "ties the head .* lm_head.weight and model.embed_tokens.weight differ"),
        (cast_one, r"2.mlp.up_proj.weight is torch.float32, others of its kind torch.bfloat16"),
        (cast_to_int, "2.mlp.up_proj.weight is of type I8"),
        (drop, "no tensor model.layers.3.self_attn.o_proj.weight"),
        (cut, r"model.norm.weight has shape \[63\], .* asks for \[64\]"),
    ],
)
def test_what_cannot_be_converted_is_named_before_anything_is_written(tmp_path, change, message):
    source = make(tmp_path / "m", tied=True)
    edit(source, change)
    with pytest.raises(UserError, match=message):
        to_megatron(source, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    megatron = to_megatron(make(tmp_path / "m", "llama"), tmp_path / "megatron")
    with pytest.raises(UserError, match=r"stores no tensor decoder.*q_layernorm.weight"):
        to_hf(megatron, tmp_path / "back", like=make(tmp_path / "q", "qwen3"))
    deep = reference.save_model(tmp_path / "d", tied=False, architecture="llama", layers=5)
    with pytest.raises(UserError, match=r"has shape \[4, 64\], but .* asks for \[5, 64\]"):
        to_hf(megatron, tmp_path / "back", like=deep)
    with pytest.raises(UserError, match=r"holds no \.metadata"):
        to_hf(tmp_path / "m", tmp_path / "back", like=tmp_path / "m")
    (megatron / "hf").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--like DIR"):
        to_hf(megatron, tmp_path / "back")


def flip_sign_of_zero(tensors):
    tensors["model.layers.1.mlp.gate_proj.weight"][5, 7] = -0.0


def change_two(tensors):
    tensors["model.layers.3.mlp.down_proj.weight"][1, 2] += 1
    tensors["model.layers.2.self_attn.k_proj.weight"][40, 9] = 2.5


def change_last_row(tensors):
    tensors["lm_head.weight"][reference.VOCAB - 1, 63] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_sign_of_zero, r"model.layers.1.mlp.gate_proj.weight\[5, 7\] is -0.0 in the HF"),
        (change_two, r"model.layers.2.self_attn.k_proj.weight\[40, 9\] is 2.5 in the HF folder"),
        (change_last_row, r"lm_head.weight\[250, 63\] is nan in the HF folder and "),
    ],
)
def test_the_first_tensor_that_differs_is_named(tmp_path, change, message):
    source = make(tmp_path / "m")
    edit(source, lambda t: t["model.layers.1.mlp.gate_proj.weight"][5].zero_())
    megatron = to_megatron(source, tmp_path / "megatron")
    assert first_difference(source, megatron) is None
    edit(source, change)
    assert re.search(message, first_difference(source, megatron))


def test_the_commands(tmp_path):
    """The two scripts, then `verify` in another layout, then of a folder that was changed."""
    source = make(tmp_path / "m")
    for script, *arguments in (
        ("convert_hf_to_megatron.py", "--hf", "m", "--megatron", "megatron"),
        ("convert_megatron_to_hf.py", "--megatron", "megatron", "--hf", "back"),
    ):
        command = [sys.executable, str(ROOT / "tools" / script), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert not done.stdout  # the bar is on stderr
    assert_same(read_all(source), read_all(tmp_path / "back"))
    folders = "--hf", tmp_path / "back", "--megatron", tmp_path / "megatron"
    done = megafork("convert", "verify", *folders, "parallel.tp=2", "parallel.pp=2")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "weights: every tensor has the same bits"
    assert re.match(r"logits: 48 tokens x 251, largest difference \d\.\de-0[67] ", second)

    source = make(tmp_path / "other", architecture="qwen3", tied=False)
    edit(source, lambda t: t["model.norm.weight"][0].add_(1))
    done = megafork("convert", "verify", "--hf", source, *folders[2:])
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED weights: model.norm.weight[0] is ")


def test_logits_that_differ_or_are_missing_fail():
    expected = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    ours = torch.nn.functional.pad(expected, (0, 2), value=9.0)  # the padded vocabulary
    assert compare_logits(ours, expected, "float32")[0]
    for value in (expected[3, 6] + 1e-3, torch.nan):
        ours[3, 6] = value
        assert not compare_logits(ours, expected, "float32")[0]
    ours[3, 6] = expected[3, 6] + 1e-3
    assert compare_logits(ours, expected, "bfloat16")[0]


def test_the_command_against_pickled_weights_works(tmp_path):
    folder = make(tmp_path / "m", tied=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickled file") as caught:
        SafetensorsFolder(folder)
    python, *arguments = shlex.split(str(caught.value).splitlines()[-1])
    assert python == "python"
    offline = environment() | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *arguments], env=offline, check=True, timeout=120)
    assert_same(tensors, read_all(folder))
    assert_same(tensors, read_all(to_hf(to_megatron(folder, tmp_path / "a"), tmp_path / "b")))
