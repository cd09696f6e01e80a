"""HF folders: bitwise round trips at every layout, and messages for damaged ones."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megafork.checkpoint.hf import SafetensorsWriter, write_index
from megafork.checkpoint.hf_export import export_hf
from megafork.checkpoint.model_card import model_card
from megafork.config import ModelConfig, ParallelConfig, TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.hf_folder import SafetensorsFolder, same_bits
from megafork.model.scorer import Scorer
from megafork.model.shape import ModelShape
from megafork.model.weights import load_weights
from megafork.parallel.mesh import initialize
from tests.helpers import reference
from tests.helpers.commands import QUICKSTART
from tools.benchmarks.ranks import run_ranks


def load_and_export(folder, layout, dtype, target, final=None, card=None):
    """final: dtype of the exported weights. card: text of its README.md."""
    parallel = ParallelConfig(**layout)
    mesh = initialize(parallel)
    model = ModelConfig(path=str(folder), dtype=dtype)
    scorer = Scorer(model, parallel, mesh, micro_batch_tokens=64)
    make_card = None if card is None else lambda: card
    export_hf(scorer, mesh, Path(folder), Path(target), dtype=final, card=make_card)


def weights_of(total):
    """The names that HF gives to the files of a model of so many."""
    if total == 1:
        return ["model.safetensors"]
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    return [*names, "model.safetensors.index.json"]


def read_all(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def export_without_room(folder, layout, target, rank):
    """On one rank alone the disk is full."""
    parallel = ParallelConfig(**layout)
    mesh = initialize(parallel)
    scorer = Scorer(ModelConfig(path=str(folder)), parallel, mesh, micro_batch_tokens=64)
    if mesh.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        export_hf(scorer, mesh, Path(folder), Path(target))
    except UserError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_full_disk_leaves_the_export_before_it(tmp_path, layout, rank):
    source = reference.save_model(tmp_path / "m", tied=False)
    target = tmp_path / "out"
    target.mkdir()
    (target / "older").write_text("")
    outcomes = run_ranks(2, export_without_room, source, layout, target, rank, timeout=60)
    if layout == {"tp": 2} and rank == 1:  # which writes nothing
        assert outcomes == [None, None]
        return
    [(kind, message), (other, _)] = outcomes
    assert (kind, other) == ("UserError", "PeerError")
    assert f"{target} could not be written" in message and "File too large" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]
    assert [path.name for path in target.iterdir()] == ["older"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tp": 2},
        {"pp": 2},
        {"tp": 2, "pp": 2},
        {"dp": 2},
        {"tp": 2, "cp": 2},
        {"tp": 2, "pp": 2, "vpp": 2},
    ],
    ids=str,
)
def test_hf_to_megatron_to_hf_is_bitwise(tmp_path, dtype, tied, layout):
    source = reference.save_model(tmp_path / "m", tied=tied, dtype=getattr(torch, dtype))
    world = ParallelConfig(**layout).world_size
    run_ranks(world, load_and_export, source, layout, dtype, tmp_path / "out")
    before, after = read_all(source), read_all(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    model = reference.load_model(tmp_path / "out", getattr(torch, dtype))  # transformers agrees
    assert torch.equal(model.lm_head.weight, before.get("lm_head.weight", model.lm_head.weight))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert not (tmp_path / "out.partial").exists()
    files = sorted((tmp_path / "out").iterdir())
    weights = [path.name for path in files if "safetensors" in path.name]
    assert weights == weights_of(layout.get("pp", 1))
    (tmp_path / "file").touch()  # as the umask says: others may read a model where they may others
    assert {path.stat().st_mode for path in files} == {(tmp_path / "file").stat().st_mode}
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode


EDGES = [
    0.0,
    -0.0,
    1.00390625,
    1.01171875,
    -1.00390625,
    1e-40,
    65504.0,
    3.4e38,
    1.0 + 2**-8 + 2**-20,
]
"""Ties between two bfloat16 numbers that go down and up, a denormal, one that becomes infinite"""


def save_edges(folder):
    """A float32 model some of whose weights bfloat16 rounds in every way that it knows."""
    source = reference.save_model(folder, tied=False)
    tensors = load_file(source / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[: len(EDGES)] = torch.tensor(EDGES)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_an_export_in_bfloat16_is_torch_s_own_cast(tmp_path, layout):
    source, rounded = save_edges(tmp_path / "m")
    world = ParallelConfig(**layout).world_size
    arguments = (source, layout, "float32", tmp_path / "out", torch.bfloat16)
    run_ranks(world, load_and_export, *arguments)
    exported = read_all(tmp_path / "out")
    assert exported.keys() == rounded.keys()
    assert all(same_bits(exported[name], tensor) for name, tensor in rounded.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    model = reference.load_model(tmp_path / "out", torch.bfloat16)
    assert same_bits(model.lm_head.weight.detach(), rounded["lm_head.weight"])


@pytest.mark.parametrize("is_changed", [False, True], ids=["unchanged", "changed"])
def test_an_export_keeps_what_a_user_has_put_into_the_folder(tmp_path, is_changed, capfd):
    source, target = reference.save_model(tmp_path / "m", tied=False), tmp_path / "out"
    (target / "figures").mkdir(parents=True)
    (target / "figures" / "a.png").write_bytes(b"png")
    (target / "adapter_model.safetensors.bak").write_text("mine")
    (target / "model-stage00-00001.safetensors").write_text("of an older export")
    settings = [f"run.dir={tmp_path}"]
    config = load_config(TrainConfig, QUICKSTART / "config.toml", settings)
    before = model_card(config, []) + ("And my own words.\n" if is_changed else "")
    (target / "README.md").write_text(before)
    run_ranks(1, load_and_export, source, {}, "float32", target, None, "# Newer")
    assert (target / "README.md").read_text() == (before if is_changed else "# Newer")
    assert ("was changed by hand: it is kept" in capfd.readouterr().out) is is_changed
    assert (target / "figures" / "a.png").read_bytes() == b"png"
    assert (target / "adapter_model.safetensors.bak").read_text() == "mine"
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("llama", False)])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_other_architectures_are_bitwise_too(tmp_path, architecture, tied, layout):
    source = reference.save_model(
        tmp_path / "m", tied=tied, dtype=torch.bfloat16, architecture=architecture
    )
    world = ParallelConfig(**layout).world_size
    run_ranks(world, load_and_export, source, layout, "bfloat16", tmp_path / "out")
    before, after = read_all(source), read_all(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_a_sharded_folder_reads_like_a_single_file(tmp_path):
    source = reference.save_model(tmp_path / "m", tied=True)
    whole = SafetensorsFolder(source)
    (tmp_path / "s").mkdir()
    writer = SafetensorsWriter(tmp_path / "s", "part", max_bytes=40_000)
    for name in sorted(whole.names):
        writer.add(name, whole.slice(name, None, 0, 0))
    writer.flush()
    write_index(tmp_path / "s", writer.weight_map, writer.total_bytes)
    sharded = SafetensorsFolder(tmp_path / "s")
    assert len(set(writer.weight_map.values())) > 1
    assert sharded.names == whole.names
    for name in whole.names:
        assert sharded.shape(name) == whole.shape(name)
        assert torch.equal(sharded.slice(name, 0, 3, 7), whole.slice(name, None, 0, 0)[3:7])


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def change_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor, "no tensor model.layers.2.mlp.up_proj.weight"),
        (change_shape, r"model.norm.weight has shape \[63\], .* asks for \[64\]"),
        (truncate, "model.safetensors cannot be read"),
        (pickled, "pytorch_model.bin is a pickled file"),
    ],
)
def test_damaged_weights_are_named(tmp_path, damage, message):
    folder = reference.save_model(tmp_path / "m", tied=True)
    damage(folder)
    with pytest.raises(AssertionError, match=f"UserError.*{message}"):
        run_ranks(1, load_and_export, folder, {}, "float32", tmp_path / "out")


def edit(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    raw = {k: v for k, v in (raw | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(raw))


def test_shape_reads_both_spellings_of_rope(tmp_path):
    folder = reference.save_model(tmp_path / "m", tied=True)
    assert ModelShape.from_folder(folder).rope_theta == 1e6
    edit(folder, rope_parameters=None, rope_theta=5e5)
    assert ModelShape.from_folder(folder).rope_theta == 5e5


def test_shape_takes_what_a_family_leaves_out(tmp_path):
    """Published Qwen2.5 and Llama 3 configs have no head_dim, or none but null."""
    folder = reference.save_model(tmp_path / "m", tied=True, architecture="qwen2")
    shape = ModelShape.from_folder(folder)
    assert (shape.head_dim, shape.qkv_bias, shape.qk_norm, shape.rope_factor) == (16, 1, 0, None)
    folder = reference.save_model(tmp_path / "l", tied=True, architecture="llama")
    shape = ModelShape.from_folder(folder)
    assert (shape.head_dim, shape.qkv_bias, shape.qk_norm, shape.rope_factor) == (32, 0, 0, 8.0)
    old = {key: value for key, value in reference.LLAMA3_ROPE.items() if key != "rope_theta"}
    edit(folder, rope_parameters=None, rope_scaling=old, rope_theta=5e5, head_dim=None)
    shape = ModelShape.from_folder(folder)
    assert (shape.head_dim, shape.rope_theta, shape.rope_factor) == (16, 5e5, 8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='yarn'"),
        ({"head_dim": None}, "lacks the key 'head_dim'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"\['sliding_attention'\]"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
            "lacks the key 'low_freq_factor'",
        ),
        (
            {"rope_parameters": reference.LLAMA3_ROPE | {"low_freq_factor": 2.0}},
            "low_freq_factor=2.0; megatron-core .* with 1.0",
        ),
    ],
)
def test_an_unsupported_config_is_named(tmp_path, changes, message):
    folder = reference.save_model(tmp_path / "m", tied=True)
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        ModelShape.from_folder(folder)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, "parallel.tp=3 must divide model.num_kv_heads=2: use 1 or 2"),
        ({"pp": 3}, "parallel.pp=3 must divide model.num_layers=4"),
        ({"pp": 2, "pipeline_layers": [2, 1]}, "sum to model.num_layers=4"),
        ({"pp": 2, "vpp": 2, "pipeline_layers": [2, 2]}, r"must have pp \* vpp=4 entries"),
        ({"pp": 2, "vpp": 3}, r"parallel.pp=2 \* vpp=3 must divide model.num_layers=4"),
        ({"vpp": 2}, "parallel.vpp=2 needs parallel.pp > 1"),
        ({"sequence_parallel": True}, "needs parallel.tp > 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(tmp_path, layout, message):
    shape = ModelShape.from_folder(reference.save_model(tmp_path / "m", tied=True))
    with pytest.raises(UserError, match=message):
        shape.check_layout(ParallelConfig(**layout))


class CountingFolder(SafetensorsFolder):
    """Counts the elements that are read out of the files."""

    elements = 0

    def slice(self, *arguments):
        tensor = super().slice(*arguments)
        self.elements += tensor.numel()
        return tensor


def elements_read(folder, layout):
    parallel = ParallelConfig(**layout)
    mesh = initialize(parallel)
    model = ModelConfig(path=str(folder), dtype="float32")
    scorer = Scorer(model, parallel, mesh, micro_batch_tokens=64)
    counting = CountingFolder(folder)
    load_weights(scorer.stages, counting, mesh)
    held = sum(p.numel() for stage in scorer.stages for p in stage.gpt.parameters())
    return counting.elements, held


def test_a_rank_reads_and_holds_its_slices_only(tmp_path):
    folder = reference.save_model(tmp_path / "m", tied=False)
    total = sum(tensor.numel() for tensor in read_all(folder).values())
    for layout in ({"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}):
        world = ParallelConfig(**layout).world_size
        for read, held in run_ranks(world, elements_read, folder, layout):
            # Norms are on every tp rank, and the vocabulary is padded where it is held.
            assert read <= 1.02 * total / world
            assert held <= 1.05 * total / world
