"""The hosts of one engine as actors of a Ray cluster (--distributed-executor-backend ray).

A stage of the pipeline is an actor, and its ranks are that actor's processes. Each actor has a bundle of one placement group:
Ray keeps a bundle on one host, so that layers are split inside it, and puts bundles on as few hosts as it can. All else is as
with --nnodes (`octavo.frontend.nodes`), but that no rank is a process of this command, which may run where there is no GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.node import run_node
from octavo.frontend.nodes import Nodes
from octavo.version import __version__

__all__ = ["Stage", "imported_ray", "ray_nodes", "unmet"]

END_SECONDS = 10.0  # for which actors may take to end by themselves
_joining = threading.Lock()  # engines of --data-parallel-size start side by side


def imported_ray() -> Any:
    """Ray's package. Raises OctavoError where it is not installed."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it would hold lines of actors back that differ in a number alone
    try:
        import ray
    except ImportError as error:
        raise OctavoError(f"Ray cannot be imported here ({error}); pip install 'octavo[ray]', or leave Ray out.") from None
    return ray


class Stage:
    """What an actor runs: a host of the engine, until the engine ends."""

    def run(self, version: str, options: dict[str, Any]) -> None:
        """Raises OctavoError, which Ray hands to the API process, where this host cannot take part."""
        if version != __version__:
            raise OctavoError(f"it has Octavo {__version__}, and node 0 has {version}; install one version on all nodes.")
        run_node(EngineConfig(**options), signals=False, api=True)


def ray_nodes(config: EngineConfig) -> Nodes:
    """The engine's hosts, placed and starting. Raises OctavoError where Ray is not there, or has no room."""
    ray = imported_ray()
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    for name in ("worker", "authentication.authentication_token_setup"):
        logging.getLogger(f"ray._private.{name}").addFilter(_is_news)
    with _joining:
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=True, logging_level="warning")
            except Exception as error:  # of many kinds; a version of Ray or Python that differs from the cluster's, too
                raise OctavoError(f"No Ray cluster can be joined ({_first_line(error)}); start one with ray start.") from None
    stages, each = config.pipeline_parallel_size, config.tensor_parallel_size
    unit = "CPU" if config.device == "cpu" or not ray.cluster_resources().get("GPU") else "GPU"
    if (sentence := unmet(_nodes(ray), unit, stages, each)) is not None:
        raise OctavoError(sentence)
    bundle = {"CPU": each} | ({"GPU": each} if unit == "GPU" else {})
    group = placement_group([bundle] * stages, strategy="PACK")
    seconds = config.distributed_timeout_seconds
    if not group.wait(seconds):
        remove_placement_group(group)
        free = "; ".join(f"{name} has {int(have.get(unit, 0))} free" for name, have in sorted(_free(ray).items()))
        raise OctavoError(
            f"Ray has placed no {stages} x {each} {unit}s within {seconds} s, since other work has them ({free}); end that, or "
            "add nodes."
        )
    actors: list[Any] = []
    running: list[Any] = []

    def close() -> None:
        threading.Thread(target=_end, args=(ray, group, actors, running), name="octavo-ray-end", daemon=True).start()

    model = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
    inner = replace(config, model=model, distributed_executor_backend=None, nnodes=stages, data_parallel_size=1)
    nodes = Nodes(inner, address=ray.util.get_node_ip_address(), here=False, closing=close)
    for number in range(stages):
        own = replace(inner, node_rank=number, master_addr=nodes.address, master_port=nodes.port)
        actor = ray.remote(Stage).options(
            num_cpus=each,
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        )
        actors.append(actor.remote())
        running.append(actors[-1].run.remote(__version__, asdict(own)))
    threading.Thread(target=_report, args=(ray, running, nodes), name="octavo-ray", daemon=True).start()
    return nodes


def _is_news(record: logging.LogRecord) -> bool:
    """Whether one of Ray's warnings is none that every start has: signals are Octavo's, and a token is Ray's default."""
    return not record.getMessage().startswith(("SIGTERM handler is not set", "Token authentication is enabled"))


def unmet(nodes: Mapping[str, Mapping[str, float]], unit: str, stages: int, each: int) -> str | None:
    """Why `stages` bundles of `each` GPUs or CPUs can never be placed, in a sentence. nodes: name -> what it has in all."""
    have = {name: int(resources.get(unit, 0)) for name, resources in nodes.items()}
    if not have:
        return "The Ray cluster has no node that is alive."
    largest = max(have, key=lambda name: have[name])
    if have[largest] < each:
        return (
            f"--tensor-parallel-size {each} needs a node with {each} {unit}s, and the largest of the cluster's {len(have)}, "
            f"{largest}, has {have[largest]}; lower it, and raise --pipeline-parallel-size."
        )
    if (places := sum(count // each for count in have.values())) < stages:
        each_has = ", ".join(f"{name}: {count}" for name, count in sorted(have.items()))
        return (
            f"{stages} stages of {each} {unit}s are asked for (--pipeline-parallel-size, --tensor-parallel-size), and the Ray "
            f"cluster has room for {places} ({each_has}); add nodes, or ask for less."
        )
    return None


def _nodes(ray: Any) -> dict[str, dict[str, float]]:
    """The nodes that are alive -> what each has in all. Two of one host have one address and differ by their number."""
    return {f"{one['NodeManagerAddress']} ({one['NodeID'][:6]})": one["Resources"] for one in ray.nodes() if one["Alive"]}


def _free(ray: Any) -> dict[str, dict[str, float]]:
    found = ray._private.state.available_resources_per_node()
    named = {one["NodeID"]: f"{one['NodeManagerAddress']} ({one['NodeID'][:6]})" for one in ray.nodes() if one["Alive"]}
    return {named[number]: have for number, have in found.items() if number in named}


def _report(ray: Any, running: Sequence[Any], nodes: Nodes) -> None:
    """Runs in a thread: tells `nodes` of an actor that ends with an error, such as one that cannot import Octavo."""
    left = list(running)
    while left:
        try:
            (done, *_), left = ray.wait(left)
        except Exception:  # this process has left the cluster
            return
        try:
            ray.get(done)
        except Exception as error:
            nodes.report(running.index(done), _first_line(getattr(error, "cause", None) or error))


def _end(ray: Any, group: Any, actors: Sequence[Any], running: Sequence[Any]) -> None:
    """Runs in a thread: frees what the engine had of the cluster."""
    with contextlib.suppress(Exception):  # the cluster, or this process's part in it, may be gone
        ray.wait(list(running), num_returns=len(running), timeout=END_SECONDS)
        for actor in actors:
            ray.kill(actor)
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(group)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:300] if isinstance(error, OctavoError) else f"{type(error).__name__}: {text[:300].rstrip('.')}"
