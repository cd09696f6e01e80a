"""`megafork plan`: what a layout needs of a cluster, before a GPU is asked for."""
