"""Values that papers and other trainers use, and what to write for them here."""

from __future__ import annotations

from typing import Any

_GROUP = "a reward against its group's is algorithm.advantages=group, the default"
_CENTRED = f"{_GROUP}; without the standard deviation: algorithm.normalize_advantage=false"
_GAE = "a critic's advantages are algorithm.advantages=gae"
_TOKENS = "the mean over the mini-batch's tokens is tokens, the default"
_SEQUENCES = "the mean of the sequences' means is sequence_tokens"
_LONGEST = "the constant denominator is max_response_tokens"
_TOP = "the tokens of highest entropy are top, the default"
_TURNS = "on the same GPUs in turns is colocated"

COUNTERPARTS: dict[str, dict[str, str]] = {
    "algorithm.objective": {
        "grpo": "GRPO clips each token's ratio, which is algorithm.objective=ppo, with "
        "algorithm.advantages=group: both are the defaults. As in its paper: "
        "algorithm.clip_high=0.2 algorithm.denominator=sequence_tokens",
        "dapo": "DAPO clips each token's ratio, which is algorithm.objective=ppo; that and its "
        "clip-higher, token mean, dynamic sampling and overlong filtering are the defaults",
        "dr_grpo": "Dr. GRPO is algorithm.objective=ppo algorithm.denominator=max_response_tokens "
        "algorithm.normalize_advantage=false",
        "rloo": "RLOO has no clip of its own: algorithm.objective=ppo "
        "algorithm.normalize_advantage=false takes the group's mean as the baseline, whose "
        "advantage is (group_size - 1) / group_size times RLOO's",
        "reinforce": "with one update for each batch (training.prompts_per_minibatch as "
        "rollout.prompts_per_step) the gradient of algorithm.objective=ppo is that of REINFORCE",
        "gae": f"{_GAE}; the objective beside it is ppo",
    },
    "algorithm.advantages": {
        "grpo": _GROUP,
        "dapo": _GROUP,
        "dr_grpo": _CENTRED,
        "rloo": _CENTRED,
        "ppo": _GAE,
        "critic": _GAE,
    },
    "algorithm.denominator": {
        "dapo": _TOKENS,
        "bnpo": _TOKENS,
        "token_mean": _TOKENS,
        "grpo": _SEQUENCES,
        "gspo": _SEQUENCES,
        "seq_mean_token_mean": _SEQUENCES,
        "dr_grpo": _LONGEST,
        "seq_mean_token_sum_norm": _LONGEST,
    },
    "forking.select": {
        "entropy": _TOP,
        "forking": _TOP,
        "high": _TOP,
        "low": "the tokens of lowest entropy are bottom",
        "none": "a gradient through every token is all",
    },
    "forking.scope": {
        "response": "a threshold for each response is sequence",
        "global": "a threshold for the whole rollout batch is batch",
    },
    "kl.estimator": {
        "kl": "the plain log-ratio is k1",
        "mse": "half of the squared log-ratio is k2",
        "low_var_kl": "the estimator of low variance is k3, the default",
    },
    "mismatch.correction": {
        "tis": "truncated importance sampling is truncate",
        "mis": "masked importance sampling is mask",
        "true": "the ratio, bounded, is truncate; without those out of bounds, mask",
    },
    "rollout.placement": {"hybrid": _TURNS, "colocate": _TURNS, "sync": _TURNS},
    "model.dtype": {
        "bf16": "write bfloat16",
        "fp32": "write float32",
        "fp16": "nothing is trained in float16: write bfloat16",
        "float16": "nothing is trained in float16: write bfloat16",
    },
}


def counterpart(key: str, value: Any) -> str:
    """Return what to write for a value of the setting `key` that is not known here; empty: none."""
    spelled = str(value).lower().replace("-", "_").replace(" ", "_")
    return COUNTERPARTS.get(key, {}).get(spelled, "")
