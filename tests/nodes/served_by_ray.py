"""Two replicas behind Ray Serve on a cluster of this machine, of which one's node is lost: prints what happened, as JSON."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import ray
from ray import serve
from ray.cluster_utils import Cluster

from octavo.ray_serve import app

FLAGS: dict[str, Any] = {"device": "cpu", "threads": 1, "served-model-name": ["model"], "api-key": ["key"]}
OTHERS = 24  # requests that run while the node is lost


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(cluster: Cluster, nodes: list[Any]) -> dict[str, Any]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve.start("HeadOnly", {"host": "127.0.0.1", "port": port})  # the lost node's proxy would have the same port here
    policy = {"policy_function": "octavo.ray_serve:by_waiting"}
    deployments = {
        "Engine": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2, "policy": policy}},
        "Front": {"ray_actor_options": {"num_cpus": 0, "resources": {"front": 1}}},
    }
    serve.run(app({**FLAGS, "deployments": deployments}))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=150)
    found: dict[str, Any] = {"models": [one.id for one in client.models.list()]}
    found["keyless"] = httpx.get(f"{url}/v1/models").status_code
    found["health"] = httpx.get(f"{url}/health").status_code

    def ask(number: int, stream: bool = False, tokens: int = 60) -> Any:
        prompt = [5 + number] * 20
        return client.completions.create(
            model="model", prompt=prompt, max_tokens=tokens, temperature=0, stream=stream, extra_body={"ignore_eos": True}
        )

    found["streamed"] = "".join(part.choices[0].text for part in ask(1, stream=True))
    found["whole"] = ask(1).choices[0].text
    streams = [ask(number, stream=True, tokens=900) for number in range(4)]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(OTHERS) as pool:
        answers = [pool.submit(ask, number) for number in range(OTHERS)]
        time.sleep(0.3)
        cluster.remove_node(nodes[0], allow_graceful=False)
        found["answered"], found["lost"] = 0, []
        for answer in answers:
            try:
                found["answered"] += bool(answer.result().choices[0].text)
            except Exception as error:
                found["lost"].append(str(error)[:300])
    found["ends"] = []
    for stream in streams:
        try:
            found["ends"].append(list(stream)[-1].choices[0].finish_reason)
        except openai.APIError as error:
            found["ends"].append(str(error)[:300])
    return found


if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, resources={"front": 1}))
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="warning")
    try:
        print("RESULT " + json.dumps(main(cluster, nodes)), flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
