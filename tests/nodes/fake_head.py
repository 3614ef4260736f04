"""The head of an engine of small deterministic cores over two hosts, until it is killed: `python -m nodes.fake_head PORT`."""

from __future__ import annotations

import asyncio
import sys

from octavo.config import EngineConfig
from octavo.frontend.async_engine import AsyncEngine

if __name__ == "__main__":
    from frontend.test_rank_processes import OnRank

    async def main() -> None:
        config = EngineConfig(nnodes=2, master_port=int(sys.argv[1]), tensor_parallel_size=4)
        await AsyncEngine.start(config, make_core=OnRank)
        print("ready", flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
