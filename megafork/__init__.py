"""RLVR training of language models where only the forking tokens carry the policy gradient."""

__version__ = "0.1.0"
