"""One node launcher: python -m tests.helpers.one_node TRAIN SERVE LOGS PORT STARTUP_S COMMAND...

Machines are addresses of this one (127.0.0.1, 127.0.0.2, ...), named in $SLURMD_NODENAME.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from megafork.cluster import coordinator
from megafork.cluster import node_launcher as launcher_module
from megafork.cluster.__main__ import launch_and_tell
from megafork.cluster.node_launcher import NodeLauncher, Work
from megafork.cluster.node_messages import Plan

LOST_AFTER_S = 6.0

if __name__ == "__main__":
    coordinator._SETTLE_S = 0.2  # what follows a cause changes nothing here
    launcher_module._NOTE_S = 0.5  # nobody reads the log of a launcher that is cut off
    train, serve, logs, port, startup_s, *command = sys.argv[1:]
    names = [tuple(filter(None, text.split(","))) for text in (train, serve)]
    key = os.environ["MEGAFORK_API_KEY"].encode()
    plan = Plan(*names, int(port), key, Path(logs), float(startup_s), LOST_AFTER_S)
    node = os.environ["SLURMD_NODENAME"]
    launcher = NodeLauncher(plan, node, [Work("the-work", command)])
    sys.exit(asyncio.run(launch_and_tell(plan, launcher)))
