"""Nodes and models that a plan knows by name; others come from a TOML file or an HF folder.

A node's numbers are the vendor's, dense (without sparsity) and of one direction; step_time.py says
what of them is reached. Sources:

- A100 80 GB (SXM): data sheet "NVIDIA A100 Tensor Core GPU"; DGX A100 640GB: 8 x 200 Gb/s, 2 TB.
- H100 SXM5: data sheet "NVIDIA H100 Tensor Core GPU", its bf16 figure halved (it is with sparsity);
  DGX H100: 8 x 400 Gb/s, 2 TB.
- H200 SXM: data sheet "NVIDIA H200 Tensor Core GPU"; the rest of the node as DGX H100's.
- H20: HGX H20 has no public data sheet of NVIDIA's; the figures are those that its sellers agree
  on, the node as DGX H100's.
- B200: data sheet "NVIDIA DGX B200" (72 PFLOP/s of fp8 with sparsity for 8 GPUs, 64 TB/s of HBM).

The memory is what torch.cuda.get_device_properties(0).total_memory is on them, which is what its
out-of-memory errors call the total capacity: less than the data sheet's, ECC and driver are off.

Shapes are those of config.json of Qwen/Qwen3-8B-Base, Qwen/Qwen3-14B-Base and Qwen/Qwen3-32B on the
Hugging Face hub. There is no published base model of 32B; all three have the same family,
vocabulary and head dimension, and heads that are not tied to the embedding. The base models were
trained for 32,768 positions, the 32B for 40,960.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from megafork.config import Section
from megafork.config.learning import Positive, PositiveFloat
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.model.shape import ModelShape

GIB = 1 << 30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class NodeType(Section):
    """Figures of one node. Rates are of one GPU and one direction."""

    name: str = Field(description="what the plan calls it")
    gpus: Positive = Field(8, description="GPUs of a node")
    gpu_memory_gib: PositiveFloat = Field(description="memory of a GPU as torch sees it, GiB")
    bf16_tflops: PositiveFloat = Field(description="dense bfloat16 products, TFLOP/s")
    hbm_gb_per_s: PositiveFloat = Field(description="GPU memory, GB/s")
    nvlink_gb_per_s: PositiveFloat = Field(description="between GPUs of a node, GB/s")
    network_gb_per_s: PositiveFloat = Field(description="of each GPU to other nodes, GB/s")
    host_link_gb_per_s: PositiveFloat = Field(description="between GPU and host memory, GB/s")
    host_memory_gib: PositiveFloat = Field(2048, description="memory of the node, GiB")

    @property
    def gpu_memory(self) -> int:
        """Bytes that torch can have of a GPU."""
        return int(self.gpu_memory_gib * GIB)

    @property
    def host_memory(self) -> int:
        """Bytes of a node."""
        return int(self.host_memory_gib * GIB)


@dataclass(frozen=True)
class Nodes:
    """The nodes of a plan, all of one type."""

    node: NodeType
    train: int
    serve: int = 0
    """beside them, full of servers; 0 where rollout.placement=colocated"""

    @property
    def train_gpus(self) -> int:
        return self.train * self.node.gpus


_RATES = "bf16_tflops", "hbm_gb_per_s", "nvlink_gb_per_s", "network_gb_per_s", "host_link_gb_per_s"
_FIGURES = {
    "a100-80g": (79.15, 312, 2039, 300, 25, 32),
    "h100": (79.11, 989.4, 3350, 450, 50, 64),
    "h200": (139.8, 989.4, 4800, 450, 50, 64),
    "h20": (95.0, 148, 4000, 450, 50, 64),
    "b200": (178.35, 2250, 8000, 900, 50, 64),
}
"""GiB of a GPU, then the rates"""

NODES = {
    name: NodeType.model_validate(
        dict(zip(("name", "gpu_memory_gib", *_RATES), (name, *figures), strict=True))
    )
    for name, figures in _FIGURES.items()
}


def node_type(name_or_file: str) -> NodeType:
    """Return one of NODES, or that of a TOML file with the keys of NodeType. Raises UserError."""
    if name_or_file in NODES:
        return NODES[name_or_file]
    if not Path(name_or_file).is_file():
        raise UserError(
            f"--node {name_or_file} is neither one of {', '.join(NODES)} nor a TOML file with the "
            f"keys {', '.join(NodeType.model_fields)}; --dry-run also takes `this`, a machine "
            "without GPUs"
        )
    return load_config(NodeType, name_or_file, [])


def _qwen3(
    layers: int, hidden: int, inner: int, heads: int, positions: int, eos: int
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_positions=positions,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        rope_factor=None,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        eos_token_ids=(eos,),
    )


SHAPES = {
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, 32768, 151643),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, 32768, 151643),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, 40960, 151645),
}


def named_shape(name: str, *, setting: str = "--model") -> ModelShape:
    """Return one of SHAPES, or that of an HF folder, whose weights are checked if it has any.

    setting: what the user calls it. Raises UserError.
    """
    if name in SHAPES:
        return SHAPES[name]
    if not name or not Path(name).is_dir():
        raise UserError(
            f"{setting}={name} is neither one of {', '.join(SHAPES)} nor a folder with a "
            "config.json"
        )
    from megafork.model.hf_model import check_folder, has_weights

    if has_weights(name):
        return check_folder(name, setting=setting).shape
    return ModelShape.from_folder(name, setting=setting)


def layer_parameters(shape: ModelShape) -> int:
    """Return the parameters of one layer's matrices (norms and biases are negligible)."""
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (query + 2 * key) + query * shape.hidden_size
    return attention + 3 * shape.hidden_size * shape.intermediate_size


def num_parameters(shape: ModelShape) -> int:
    """Return the parameters of the whole model's matrices, embedding and head included."""
    vocabulary = shape.vocab_size * shape.hidden_size
    return shape.num_layers * layer_parameters(shape) + vocabulary * (2 - shape.tied_embeddings)
