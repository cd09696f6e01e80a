"""The policy's model on megatron-core, and its weights by their Hugging Face names."""

import megafork.parallel  # noqa: F401  (it has to come before megatron-core)
