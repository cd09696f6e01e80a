"""A selection of one's own: the tokens that surprised the policy, in place of its forks.

A rule gives a score; the top rho by score is taken exactly, over all ranks.

    megafork train config.toml forking.select=selection:surprisal
"""

from torch import Tensor

from megafork.algorithms.rules import Tokens, needs


@needs("logprobs")
def surprisal(tokens: Tokens) -> Tensor:
    """Return the surprisal of each sampled token, in nats."""
    return -tokens.logprobs_T
