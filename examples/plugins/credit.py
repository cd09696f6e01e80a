"""Two rules of credit: a weight that grows with the entropy, and a mask of late tokens.

megafork train config.toml 'algorithm.credit=["credit:by_entropy", "credit:early"]'
"""

from torch import Tensor

from megafork.algorithms.rules import Tokens


def by_entropy(tokens: Tokens, step: int) -> Tensor:
    """Return the entropy over the mean of all loss tokens on all ranks, at most 2."""
    return (tokens.entropy_T / tokens.mean(tokens.entropy_T).clamp(min=1e-6)).clamp(max=2.0)


def early(tokens: Tokens, step: int) -> Tensor:
    """Return which tokens are in the first part of their response, which grows over 100 steps."""
    share = min(1.0, 0.5 + step / 200)
    return tokens.position_T < share * tokens.length_T
