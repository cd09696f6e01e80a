"""RLVR training of Qwen3 policies where only the forking tokens carry the policy gradient."""

__version__ = "0.1.0"
