"""The constants of the roofline, all of them."""

from __future__ import annotations

from pydantic import Field

from megafork.config.learning import Fraction, PositiveFloat, Section


class Efficiency(Section):
    """What is reached of a node's rates. Round numbers from what well-kept stacks report on dense
    models; none is fitted to the published points that
    tests/unit/test_roofline.py compares with."""

    matrices: Fraction = Field(
        0.5, description="of bf16 peak: a layer's matrices with all that is elementwise around them"
    )
    attention: Fraction = Field(0.4, description="of bf16 peak: causal attention over packs")
    head: Fraction = Field(0.25, description="of bf16 peak: log-probabilities and entropies")
    hbm: Fraction = Field(0.8, description="of GPU memory's rate")
    nvlink: Fraction = Field(0.75, description="of NVLink's rate, in collectives")
    network: Fraction = Field(0.75, description="of the network's rate, in collectives")
    host_link: Fraction = Field(0.7, description="of the rate between host and GPU")
    engine_iteration_s: PositiveFloat = Field(
        0.004, description="seconds of a decoding step beside memory and products"
    )
    all_reduce_s: PositiveFloat = Field(
        1e-5, description="seconds of latency of an all-reduce in decoding (two in each layer)"
    )
    engine_reserve_gib: PositiveFloat = Field(
        4.0, description="memory of a serving GPU for anything but weights and KV cache, GiB"
    )
