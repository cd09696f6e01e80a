"""Which GPUs there are, asked without torch."""

from __future__ import annotations

import torch

from megafork.rollout.placement import visible_gpus


def test_gpus_are_counted_as_torch_does(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == [str(number) for number in range(torch.cuda.device_count())]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, MIG-a")
    assert visible_gpus() == ["3", "MIG-a"]
