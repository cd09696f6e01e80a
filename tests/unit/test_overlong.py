"""Soft overlong punishment against DAPO's equation 13."""

from __future__ import annotations

import pytest

from megafork.config import RewardConfig, TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.verifiers.overlong import overlong_punishment
from tests.helpers.commands import REQUIRED


def paper(num_tokens, limit, cache):
    """R_length, eq. 13."""
    if num_tokens <= limit - cache:
        return 0.0
    if num_tokens <= limit:
        return ((limit - cache) - num_tokens) / cache
    return -1.0


@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_the_reward_falls_linearly_over_the_buffer(penalty):
    config = RewardConfig(verifier="a:b", overlong_buffer_tokens=4096, overlong_penalty=penalty)
    for num_tokens in (1, 16383, 16384, 16385, 18432, 20479, 20480, 20481):
        lost = overlong_punishment(num_tokens, config, max_response_tokens=20480)
        assert lost == pytest.approx(-penalty * paper(num_tokens, 20480, 4096), abs=1e-12)


def test_it_is_off_unless_asked_for():
    config = RewardConfig(verifier="a:b")
    assert overlong_punishment(20480, config, max_response_tokens=20480) == 0.0


def test_a_buffer_longer_than_the_limit_is_refused():
    with pytest.raises(UserError, match=r"overlong_buffer_tokens=99 is more than .*=64: set it to"):
        load_config(
            TrainConfig,
            None,
            [*REQUIRED, "reward.overlong_buffer_tokens=99", "rollout.max_response_tokens=64"],
        )
