"""The other hosts of an engine, before its processes start."""

from __future__ import annotations

import asyncio

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.nodes import Nodes

__all__ = ["gathered", "nodes_of"]


def nodes_of(config: EngineConfig) -> Nodes | None:
    """Those of a configuration, which are not there yet; None where all of the engine's ranks are on this host."""
    if config.distributed_executor_backend == "ray":
        raise OctavoError("--distributed-executor-backend ray is not served yet; use --nnodes.")
    return Nodes(config) if config.nnodes > 1 else None


async def gathered(config: EngineConfig) -> Nodes | None:
    """As `nodes_of`, once they are there. Raises OctavoError, which names one, where they cannot compute together."""
    if (nodes := nodes_of(config)) is not None:
        try:
            await asyncio.to_thread(nodes.gather)
        except BaseException:  # a cancelled start must not leave other hosts waiting
            nodes.end("The start was stopped on node 0.")
            raise
    return nodes
