"""The layout's process groups, and what megatron-core needs before it is imported."""

from megafork.parallel import megatron_jit

megatron_jit.install()
