"""Files, processes, signals and text: what no part of the training is about."""
