"""A training run: ranks, updates and the loop."""

import megafork.parallel  # noqa: F401  (it has to come before megatron-core)
