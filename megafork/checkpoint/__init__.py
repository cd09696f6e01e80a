"""Checkpoints of a run, and conversion between Hugging Face and megatron-core."""

import megafork.parallel  # noqa: F401  (it has to come before megatron-core)
