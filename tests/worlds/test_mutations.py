"""The invariance suite is worth what it catches: five faults, put in on purpose."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from megafork.algorithms import forking, losses
from megafork.model import scorer
from megafork.ops import vocab_parallel
from megafork.trainer.policy import Policy
from tests.helpers import reference
from tests.helpers.step import assert_step, reference_step


def let_padding_columns_in():
    exact = scorer.linear_logprob_and_entropy
    scorer.linear_logprob_and_entropy = lambda *args, **options: exact(
        *args, **options | {"vocab_size": None}
    )


def take_the_threshold_over_tp_too():
    """Every entropy counts tp times: the threshold may stay where it is, the counts do not."""
    from megatron.core import parallel_state

    exact = forking.select_tokens
    forking.select_tokens = lambda tokens, *args, **options: exact(
        dataclasses.replace(
            tokens, groups=(*tokens.groups, parallel_state.get_tensor_model_parallel_group())
        ),
        *args,
        **options,
    )


def divide_by_the_micro_batch():
    exact = losses.policy_loss

    def loss(logprobs, *args, denominator, **groups):
        return exact(logprobs, *args, denominator=max(1, len(logprobs)), **groups)

    losses.policy_loss = loss


def leave_the_gradient_unsummed_over_tp():
    assert vocab_parallel.all_reduce
    vocab_parallel.all_reduce = lambda *_: None


def take_a_threshold_for_each_micro_batch():
    exact = Policy.select

    @functools.wraps(exact)
    def select(self, tables, scores, *, step):
        masks, selection = exact(self, tables, scores, step=step)
        if selection is not None:
            parts = scores[0].entropy_N.split([len(pack.rows_N) for pack in scores[0].packs])
            taus = [reference.top_threshold(part, self.forking.rho) for part in parts]
            masks = [torch.cat([h >= tau for h, tau in zip(parts, taus, strict=True)])]
        return masks, selection

    Policy.select = select


# Each at a layout where it matters, by its tp.
MUTATIONS = [
    (let_padding_columns_in, 2),
    (take_the_threshold_over_tp_too, 2),
    (divide_by_the_micro_batch, 1),
    (leave_the_gradient_unsummed_over_tp, 2),
    (take_a_threshold_for_each_micro_batch, 1),
]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    folder = reference.save_model(tmp_path_factory.mktemp("model"), tied=False, seed=3)
    return folder, reference_step(folder)


@pytest.fixture(scope="module")
def faultless(step):
    """`faultless(tp)` is what passes before a fault is put in; it runs once for each tp."""

    @functools.cache
    def run(tp):
        assert_step(*step, {"tp": tp}, {"micro_batch_tokens": 32})

    return run


@pytest.mark.parametrize(("mutate", "tp"), MUTATIONS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_is_caught(step, faultless, mutate, tp):
    """The ranks are forked, so what is changed in them is gone with them."""
    faultless(tp)
    with pytest.raises(AssertionError) as caught:
        assert_step(*step, {"tp": tp}, {"micro_batch_tokens": 32}, mutate)
    assert "--- rank" not in str(caught.value), "a rank failed instead of the comparison"
