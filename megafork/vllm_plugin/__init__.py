"""The part that runs inside vLLM. Needs no megatron-core: vLLM may have a Python of its own."""
