"""What `benchmark_ops.py` and `benchmark_step.py` are made of."""
