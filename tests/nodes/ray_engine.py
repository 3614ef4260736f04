"""An engine on a Ray cluster of three nodes of this machine, of which one is lost: prints what happened, as JSON.

`python -m nodes.ray_engine '[token, ...]'`, the prompt. In a process of its own, since Ray leaves threads and files in it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.async_engine import AsyncEngine, EngineDead
from octavo.messages import SamplingParams

OPTIONS: dict[str, Any] = dict(
    device="cpu", threads=1, dtype="float32", max_num_batched_tokens=256, tensor_parallel_size=2, pipeline_parallel_size=2,
    distributed_executor_backend="ray",
)  # fmt: skip


async def refused(**options: Any) -> str:
    try:
        await AsyncEngine.start(EngineConfig(**OPTIONS | options))
    except OctavoError as error:
        return str(error)
    return "started"


async def main(prompt: list[int], cluster: Cluster, nodes: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"large": await refused(tensor_parallel_size=3), "many": await refused(pipeline_parallel_size=3)}
    engine = await AsyncEngine.start(EngineConfig(**OPTIONS))
    found["processes"] = len(engine._processes._processes)
    params = SamplingParams(temperature=0, repetition_penalty=1.05, max_tokens=12, ignore_eos=True)
    found["text"] = "".join([delta.text async for delta in engine.generate(prompt, params, "one")])
    long = SamplingParams(temperature=0, max_tokens=700, ignore_eos=True)
    deltas = engine.generate(prompt, long, "two")
    await anext(deltas)
    began = time.monotonic()
    await asyncio.to_thread(cluster.remove_node, nodes[1], False)
    try:
        async for _ in deltas:
            pass
    except EngineDead as error:
        found["dead"] = str(error)
    found["seconds"], found["healthy"] = time.monotonic() - began, engine.healthy
    await engine.shutdown()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    found["free"] = ray.available_resources().get("CPU", 0)
    return found


if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="warning")
    try:
        print("RESULT " + json.dumps(asyncio.run(main(json.loads(sys.argv[1]), cluster, nodes))), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
