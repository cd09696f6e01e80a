"""The names of `from megafork import ...`, what they load, and the plain functions."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import torch.distributed as dist

import megafork
from megafork import clipped_policy_loss, forking_mask, group_advantages
from megafork.errors import UserError
from megafork.rollout.vllm_server import VllmServer
from megafork.system.extras import missing
from tests.helpers.commands import ROOT
from tests.helpers.reference import top_threshold
from tools.benchmarks.ranks import run_ranks

HEAVY = ("torch", "megatron", "vllm", "pydantic", "transformers", "numpy")
FUNCTIONS = ", ".join(sorted(set(megafork.__all__) - {"TrainConfig", "train"}))


def loaded_after(statement: str) -> set[str]:
    """The heavy packages that a new process has loaded after this statement."""
    program = f"{statement}\nimport sys\nprint(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_loads_what_is_used():
    assert loaded_after("import megafork; megafork.__version__; dir(megafork)") == set()
    assert loaded_after("from megafork import TrainConfig") == {"pydantic"}
    assert loaded_after(f"from megafork import {FUNCTIONS}") == {"torch", "numpy"}


def test_every_name_is_there():
    assert set(megafork.__all__) <= set(dir(megafork))
    for name in megafork.__all__:
        assert callable(getattr(megafork, name)), name
    with pytest.raises(AttributeError, match="'megafork' has no attribute 'forking'"):
        _ = megafork.forking


@pytest.mark.parametrize("first", ["from megafork import train", "import megafork.train"])
def test_train_can_be_called_whatever_was_imported_first(first):
    program = f"{first}\nfrom megafork import train\ntrain(None)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("AttributeError: 'NoneType' object"), done.stderr


METADATA = ["numpy", 'megatron-core>=0.16; extra == "train"', "vllm>=0.33; extra == 'vllm'"]


@pytest.mark.parametrize(
    "module, extra", [("megatron.core.utils", "train"), ("vllm", "vllm"), ("mega", None)]
)
def test_a_missing_package_is_told_with_its_extra(module, extra, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: METADATA)
    package = module.partition(".")[0]
    told = extra and f"{package}, which is not installed: pip install 'megafork[{extra}]'"
    assert missing(module) == told


def test_a_server_without_vllm_says_which_extra_brings_it(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    monkeypatch.setattr(metadata, "requires", lambda name: METADATA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    server = VllmServer(
        tmp_path,
        dtype="float32",
        max_model_len=8,
        max_num_seqs=1,
        log_path=tmp_path / "log",
        device="cpu",
    )
    with pytest.raises(UserError, match=r"a rollout server needs vllm, .*'megafork\[vllm\]'"):
        server.start()


def batch(dtype=torch.float32):
    """Entropies of padded responses, with ties, and their loss mask."""
    draw = torch.Generator().manual_seed(0)
    entropy = (torch.rand(6, 50, generator=draw) * 3).mul(40).round().div(40).to(dtype)
    lengths = torch.tensor([50, 1, 17, 0, 33, 50])
    mask = torch.arange(50) < lengths[:, None]
    entropy[~mask] = torch.nan  # padding decides nothing
    return entropy, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rho", [0.2, 0.5, 0.001, 1.0])
def test_the_mask_is_the_top_fraction_of_the_loss_tokens(rho, dtype):
    entropy, loss_mask = batch(dtype)
    mask = forking_mask(entropy, loss_mask.long(), rho=rho)
    threshold = top_threshold(entropy[loss_mask].double(), rho)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, loss_mask & (entropy.double() >= threshold))


def test_a_nan_among_the_loss_tokens_is_an_error():
    entropy, loss_mask = batch()
    entropy[0, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        forking_mask(entropy, loss_mask)


def part_of_the_mask():
    rank = torch.distributed.get_rank()
    entropy, loss_mask = batch()
    parts = slice(0, 1) if rank == 0 else slice(1, None)
    return forking_mask(entropy[parts], loss_mask[parts], groups=[dist.group.WORLD])


def join_and_select():
    dist.init_process_group("gloo")
    try:
        return part_of_the_mask()
    finally:
        dist.destroy_process_group()


def test_the_mask_of_two_ranks_is_that_of_one():
    parts = run_ranks(2, join_and_select)
    assert torch.equal(torch.cat(parts), forking_mask(*batch()))


def test_the_loss_against_its_formula_in_float64():
    draw = torch.Generator().manual_seed(1)
    shape, eps = (4, 9), {"clip_low": 0.2, "clip_high": 0.28}
    logprobs = (-torch.rand(shape, generator=draw)).requires_grad_()
    old = logprobs.detach() + 0.5 * torch.randn(shape, generator=draw)
    advantages = torch.randn(4, 1, generator=draw)
    mask = torch.rand(shape, generator=draw) < 0.4
    clipped_policy_loss(logprobs, old, advantages, mask, num_tokens=30, **eps).backward()
    exact = logprobs.detach().double().requires_grad_()
    ratio = (exact - old.double()).exp()
    a = advantages.double().expand(shape)
    terms = torch.minimum(ratio * a, ratio.clamp(1 - 0.2, 1 + 0.28) * a)
    expected = -(terms * mask).sum() / 30
    expected.backward()
    again = clipped_policy_loss(logprobs.detach(), old, advantages, mask, num_tokens=30, **eps)
    assert float(again) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(logprobs.grad.double(), exact.grad, rtol=1e-5, atol=1e-9)


def test_what_is_not_masked_changes_nothing():
    logprobs = torch.tensor([[-1.0, torch.nan, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.0, torch.inf, torch.nan]])
    mask = torch.tensor([[1, 0, 0]])
    loss = clipped_policy_loss(
        logprobs, old, torch.tensor([[2.0]]), mask, clip_low=0.2, clip_high=0.28, num_tokens=4
    )
    loss.backward()
    assert loss.item() == -0.5 and logprobs.grad.tolist() == [[-0.5, 0.0, 0.0]]
    nothing = clipped_policy_loss(
        logprobs, old, old, torch.zeros(1, 3), clip_low=0.2, clip_high=0.28, num_tokens=4
    )
    assert nothing.item() == 0.0


def test_advantages_are_normalized_by_default():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([5, 5, 2, 2])
    expected = group_advantages(rewards, group, normalize=True)
    assert torch.equal(group_advantages(rewards, group), expected)


def test_a_module_of_the_table_has_its_name():
    for name, module in megafork._MODULES.items():
        assert hasattr(importlib.import_module(module), name)
