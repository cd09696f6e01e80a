"""Advantages of one's own: a reward against the mean of the other responses of its group.

RLOO (arXiv 2402.14740).

    megafork train config.toml algorithm.advantages=advantages:leave_one_out
"""

import torch
from torch import Tensor

from megafork.data.token_table import TokenTable


def leave_one_out(rewards_B: Tensor, group_B: Tensor, table: TokenTable) -> Tensor:
    """Return the advantage of each row that is here; rewards_B are those of all responses."""
    _, index_B = group_B.unique(return_inverse=True)
    sums = torch.bincount(index_B, weights=rewards_B.double())[index_B]
    num_others_B = (torch.bincount(index_B)[index_B] - 1).clamp(min=1)
    advantages_B = rewards_B - (sums - rewards_B) / num_others_B
    return advantages_B.float()[table.sample_R]
