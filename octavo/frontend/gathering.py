"""The other hosts of an engine, before its processes start."""

from __future__ import annotations

import asyncio
import signal
import threading

from octavo.config import EngineConfig
from octavo.frontend.nodes import STOPPED, Nodes

__all__ = ["gathered", "nodes_of"]


def nodes_of(config: EngineConfig) -> Nodes | None:
    """Those of a configuration, which are not there yet; None where all of the engine's ranks are on this host."""
    if config.distributed_executor_backend == "ray":
        from octavo.frontend.ray_nodes import ray_nodes  # Ray is no dependency of Octavo

        return ray_nodes(config)
    return Nodes(config) if config.nnodes > 1 else None


async def gathered(config: EngineConfig) -> Nodes | None:
    """As `nodes_of`, once they are there. Raises OctavoError, which names one, where they cannot compute together."""
    if (nodes := await asyncio.to_thread(nodes_of, config)) is not None:
        if threading.current_thread() is threading.main_thread():
            _keep_signals()
        try:
            await asyncio.to_thread(nodes.gather)
        except BaseException:  # a cancelled start must not leave other hosts waiting
            nodes.end(f"Node 0 {STOPPED}")
            raise
    return nodes


def _keep_signals() -> None:
    """Gives this process's signals back to Python: Ray's library takes SIGTERM when it joins a cluster, and aborts on it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if (handler := signal.getsignal(number)) is not None:
            signal.signal(number, handler)
            signal.siginterrupt(number, False)
