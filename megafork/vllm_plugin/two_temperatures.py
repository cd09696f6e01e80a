"""Decoding with two temperatures: one where the policy forks, another elsewhere (arXiv 2506.01939).

A logits processor for vLLM, imported by the server's processes alone. `VllmServer` loads it when it
is started with `two_temperatures=True`; `Sampling.forking_temperatures` asks for it.
"""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcRequestState,
)
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from megafork.rollout.sampling import TWO_TEMPERATURES, TwoTemperatures

_UNTOUCHED = (math.inf, 1.0, 1.0)
"""For rows without settings: no entropy is above, and a temperature of 1 changes no bit."""

_NEUTRAL = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (-1, 0),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
}


def scale_by_entropy(
    logits_RV: Tensor, threshold_R: Tensor, above_R: Tensor, below_R: Tensor
) -> Tensor:
    """Return logits [R, V] whose softmax is softmax(logits / T), with two temperatures T.

    T = above where H > threshold, else below; H in nats, of the softmax at temperature 1.
    logits_RV: float32, not written to; -inf is a probability of zero. A row with T = 1 comes back
    bit for bit, one with T = 0 as a point mass on its (first) largest logit. H is a float32 sum, so
    an entropy within some 1e-6 of the threshold may fall on either side.
    """
    entropy_R = torch.special.entr(logits_RV.softmax(-1)).sum(-1)
    temperature_R1 = torch.where(entropy_R > threshold_R, above_R, below_R)[:, None]
    greedy_R1 = temperature_R1 == 0
    # Shifted first: logits far from zero would lose digits in the division.
    shifted_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    scaled_RV = shifted_RV / temperature_R1.masked_fill(greedy_R1, 1.0)
    point_RV = torch.full_like(logits_RV, -math.inf)
    point_RV.scatter_(-1, logits_RV.argmax(-1, keepdim=True), 0.0)
    scaled_RV = torch.where(greedy_R1, point_RV, scaled_RV)
    return torch.where(temperature_R1 == 1, logits_RV, scaled_RV)


def settings_of(params: SamplingParams) -> TwoTemperatures | None:
    """Return what a request asks for, if anything.

    Raises ValueError for other values than three finite numbers, temperatures below 0, and a
    request whose other parameters change the distribution too.
    """
    values = (params.extra_args or {}).get(TWO_TEMPERATURES)
    if values is None:
        return None
    name = f"{TWO_TEMPERATURES}={values!r}"
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{name} must be [threshold, temperature above, temperature below]")
    if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be finite numbers")
    settings = TwoTemperatures(*map(float, values))
    if min(settings.above, settings.below) < 0:
        raise ValueError(f"{name}: a temperature below 0")
    changed = [
        f"{key}={getattr(params, key)}"
        for key, neutral in _NEUTRAL.items()
        if getattr(params, key) not in neutral
    ]
    if changed:
        raise ValueError(f"{name} is the whole distribution: leave out {', '.join(changed)}")
    return settings


class TwoTemperatureProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """The processor, with both of vLLM's interfaces: the engine chooses its model runner itself.

    V1: settings are kept by row of the batch, which moves; the processor runs after vLLM's own
    temperature, which is 1. V2: by slot, which a request keeps; it runs before the temperature.
    """

    def __init__(
        self,
        vllm_config: Any,
        device_or_states: torch.device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,
    ) -> None:
        if isinstance(device_or_states, LogitsProcRequestState):
            self._device, self._num_rows = device_or_states.device, device_or_states.max_num_reqs
        else:
            self._device = device_or_states
            self._num_rows = vllm_config.scheduler_config.max_num_seqs
        self._settings: dict[int, TwoTemperatures] = {}
        self._table_N3: Tensor | None = None  # the settings on the device; None: out of date

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        settings_of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Return True: no temperature changes which logit is the largest."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that came, went or moved within the batch (V1)."""
        if process_dict_updates(self._settings, batch_update, lambda p, *_: settings_of(p)):
            self._table_N3 = None

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Give a slot to a request; the settings of the one before it go (V2)."""
        settings = settings_of(sampling_params)
        self._settings.pop(req_idx, None)
        if settings is not None:
            self._settings[req_idx] = settings
        self._table_N3 = None
        return settings is not None

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Scale the logits. ctx: V2's, which names every row's slot; V1's are `update_state`'s."""
        if not self._settings:
            return logits
        if ctx is not None and self._settings.keys().isdisjoint(ctx.idx_mapping_np.tolist()):
            return logits  # V2 does not tell when a request has ended
        if self._table_N3 is None:
            rows = [self._settings.get(i) for i in range(self._num_rows)]
            values = [_UNTOUCHED if row is None else astuple(row) for row in rows]
            self._table_N3 = torch.tensor(values, dtype=torch.float32).to(self._device)
        if ctx is None:
            table_R3 = self._table_N3[: len(logits)]
        else:
            table_R3 = self._table_N3[ctx.expanded_idx_mapping.long()]
        return scale_by_entropy(logits, *table_R3.unbind(-1))
