"""Soft overlong punishment: a response loses reward as it nears the limit (DAPO, arXiv 2503.14476).

It is part of `Sample.reward`, set once when a response is judged, and not of the advantages: the
journal, the checkpoint's carried groups, reward/mean and the files of skipped mini-batches then
hold the very reward that is trained on, and a resumed step replays it bit for bit, even where the
setting has been changed since. `Sample.accuracy`, by which dynamic sampling admits groups and by
which policies are evaluated, stays the verifier's.
"""

from __future__ import annotations

from megafork.config import RewardConfig


def overlong_punishment(
    num_tokens: int, config: RewardConfig, *, max_response_tokens: int
) -> float:
    """Return the reward that a response of num_tokens loses: 0 up to the buffer, overlong_penalty
    at the limit.

    It is linear in between (eq. 13, times overlong_penalty), and 0 where overlong_buffer_tokens is
    unset.
    """
    buffer = config.overlong_buffer_tokens
    if buffer is None:
        return 0.0
    inside = num_tokens - (max_response_tokens - buffer)
    return config.overlong_penalty * min(max(inside / buffer, 0.0), 1.0)
