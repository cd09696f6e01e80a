"""The controller of a training run, a process of its own, and the ranks' end of it."""
