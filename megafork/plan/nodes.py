"""What a node is made of: the common ones by name, any other from a TOML file.

Numbers are the vendor's, dense (without sparsity) and of one direction; what of them is reached is
the business of roofline.py. Sources:

- A100 80 GB (SXM): data sheet "NVIDIA A100 Tensor Core GPU"; DGX A100 640GB: 8 x 200 Gb/s, 2 TB.
- H100 SXM5: data sheet "NVIDIA H100 Tensor Core GPU", its bf16 figure halved (it is with sparsity);
  DGX H100: 8 x 400 Gb/s, 2 TB.
- H200 SXM: data sheet "NVIDIA H200 Tensor Core GPU"; the rest of the node as DGX H100's.
- H20: HGX H20 has no public data sheet of NVIDIA's; the figures are those that its sellers agree
  on, the node as DGX H100's.
- B200: data sheet "NVIDIA DGX B200" (72 PFLOP/s of fp8 with sparsity for 8 GPUs, 64 TB/s of HBM).

The memory is what torch.cuda.get_device_properties(0).total_memory is on them, which is what its
out-of-memory errors call the total capacity: less than the data sheet's, ECC and driver are off.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megafork.config import Section
from megafork.config.learning import Positive, PositiveFloat
from megafork.config.load import load_config
from megafork.errors import UserError

GIB = 1 << 30


class NodeType(Section):
    """One node. Rates are of one GPU and one direction."""

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

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s of a GPU."""
        return self.bf16_tflops * 1e12

    @property
    def hbm(self) -> float:
        """bytes/s"""
        return self.hbm_gb_per_s * 1e9

    @property
    def nvlink(self) -> float:
        """bytes/s"""
        return self.nvlink_gb_per_s * 1e9

    @property
    def network(self) -> float:
        """bytes/s"""
        return self.network_gb_per_s * 1e9

    @property
    def host_link(self) -> float:
        """bytes/s"""
        return self.host_link_gb_per_s * 1e9


NODES = {
    node.name: node
    for node in (
        NodeType(
            name="a100-80g",
            gpu_memory_gib=79.15,
            bf16_tflops=312,
            hbm_gb_per_s=2039,
            nvlink_gb_per_s=300,
            network_gb_per_s=25,
            host_link_gb_per_s=32,
        ),
        NodeType(
            name="h100",
            gpu_memory_gib=79.11,
            bf16_tflops=989.4,
            hbm_gb_per_s=3350,
            nvlink_gb_per_s=450,
            network_gb_per_s=50,
            host_link_gb_per_s=64,
        ),
        NodeType(
            name="h200",
            gpu_memory_gib=139.8,
            bf16_tflops=989.4,
            hbm_gb_per_s=4800,
            nvlink_gb_per_s=450,
            network_gb_per_s=50,
            host_link_gb_per_s=64,
        ),
        NodeType(
            name="h20",
            gpu_memory_gib=95.0,
            bf16_tflops=148,
            hbm_gb_per_s=4000,
            nvlink_gb_per_s=450,
            network_gb_per_s=50,
            host_link_gb_per_s=64,
        ),
        NodeType(
            name="b200",
            gpu_memory_gib=178.35,
            bf16_tflops=2250,
            hbm_gb_per_s=8000,
            nvlink_gb_per_s=900,
            network_gb_per_s=50,
            host_link_gb_per_s=64,
        ),
    )
}


def node_type(name_or_file: str) -> NodeType:
    """One of NODES, or the TOML file of another with the keys of NodeType. Raises UserError."""
    if name_or_file in NODES:
        return NODES[name_or_file]
    if not Path(name_or_file).is_file():
        raise UserError(
            f"--node {name_or_file} is neither one of {', '.join(NODES)} nor a TOML file with the "
            f"keys {', '.join(NodeType.model_fields)}"
        )
    return load_config(NodeType, name_or_file, [])
