"""A run on several machines: one launcher on each, all in touch with the one on the first machine.

    python -m megafork.cluster --train node0,node1 --serve node2 ... CONFIG.toml [section.key=value]

is started once on every machine, by srun or anything else. The launchers wait for each other, start
the ranks and the servers, pass a request to stop on, and end everything everywhere when a process
fails or a machine is not heard of: a job never waits for what will not come. What failed first is
told last. Standard library and psutil alone, so that a launcher is up in a moment.
"""
