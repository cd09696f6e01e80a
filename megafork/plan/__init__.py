"""`megafork plan`: what a layout needs of a cluster, before a GPU is asked for."""

import megafork.parallel  # noqa: F401  (it has to come before megatron-core)
