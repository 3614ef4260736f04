"""Ranks as actors of a Ray cluster (--distributed-executor-backend ray)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from nodes.hosts import FLAGS, PATHS, Node, TwoHosts, ended, no_namespaces
from nodes.test_nodes import PROMPT, answer, asked, expected, first_token
from server.processes import free_port

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.gathering import nodes_of
from octavo.frontend.ray_nodes import unmet

__all__ = ["expected"]  # a fixture

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray, which is not installed")


@needs_ray
def test_stages_are_actors_until_a_node_is_lost(expected: str) -> None:
    """Tokens are those of one rank; no rank is the API process's. A lost node ends streams; its room is free again."""
    words = [sys.executable, "-m", "nodes.ray_engine", json.dumps(PROMPT)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=PATHS), timeout=400)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    found = json.loads(lines[0])
    assert (found["text"], found["processes"]) == (expected, 0)
    assert "needs a node with 3 CPUs, and the largest of the cluster's 3, " in found["large"], found
    assert "3 stages of 2 CPUs are asked for" in found["many"]
    assert "has ended or is unreachable" in found["dead"] or "has not been heard of" in found["dead"]
    assert found["dead"].startswith("Stage ")
    assert found["seconds"] < 30
    assert not found["healthy"]
    assert found["free"] == 2


def ray_node(hosts: TwoHosts, number: int, directory: str) -> Node:
    """A Ray node with a CPU, in one of the namespaces. A token of this user would be asked for, and not be sent."""
    head = f"{hosts.addresses[0]}:6379"
    where = ["--head", "--port", "6379", "--include-dashboard", "false"] if number == 0 else ["--address", head]
    words = [*where, "--node-ip-address", hosts.addresses[number], "--num-cpus", "1", "--object-store-memory", "100000000"]
    ray = str(Path(sys.executable).with_name("ray"))
    start = ["env", "RAY_AUTH_MODE=disabled", ray, "start", *words, "--temp-dir", directory, "--block", "--disable-usage-stats"]
    return Node(start, hosts.names[number])


@needs_ray
def test_a_ray_node_on_each_of_two_hosts(expected: str) -> None:
    """Namespaces with a slow link: a stage in each; when nothing passes any more, the stage there is named."""
    if reason := no_namespaces():
        pytest.skip(f"needs network namespaces: {reason}")
    with TwoHosts() as hosts, ExitStack() as ends:
        hosts.slow(50)
        nodes = []
        for number in range(2):
            directory = ends.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))  # short: it has sockets
            nodes.append(ray_node(hosts, number, directory))
            ends.enter_context(ended(nodes[-1]))
            nodes[-1].wait_for("Ray runtime started")
        http = free_port()
        flags = ("-pp", "2", "--distributed-executor-backend", "ray", "--host", "127.0.0.1", "--port", str(http))
        words = [
            "env",
            "RAY_AUTH_MODE=disabled",
            f"RAY_ADDRESS={hosts.addresses[0]}:6379",
            sys.executable,
            "-m",
            "octavo.cli",
            "serve",
            *FLAGS,
            *flags,
        ]
        server = Node(words, hosts.names[0])
        with ended(server):
            server.wait_for("Octavo is ready")
            assert answer(http, PROMPT, namespace=hosts.names[0]) == expected
            with asked(http, PROMPT, 700, hosts.names[0], stream=True) as client:
                first_token(client)
                hosts.cut()
                rest, _ = client.communicate(timeout=60)
            assert re.search(r"Stage \d .*has (not been heard of|ended or is unreachable)", rest), rest
            assert server.end(60) == 1


@needs_ray
def test_a_signal_ends_the_command_in_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's library takes SIGTERM for itself when a process joins a cluster. Here two engines join one, which Ray starts."""
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not the cluster of another test
    flags = ("-dp", "2", "--distributed-executor-backend", "ray", "--host", "127.0.0.1", "--port", str(free_port()))
    server = Node([sys.executable, "-m", "octavo.cli", "serve", *FLAGS, *flags])
    with ended(server):
        server.wait_for("Octavo is ready")
        server.process.terminate()
        assert server.process.wait(60) == 0, server.said


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OctavoError, match=r"^Ray cannot be imported here .*; pip install 'octavo\[ray\]'"):
        nodes_of(EngineConfig(distributed_executor_backend="ray"))


def test_a_placement_that_cannot_be_met_names_what_is_there() -> None:
    nodes = {"10.0.0.1 (a)": {"GPU": 8.0}, "10.0.0.2 (b)": {"GPU": 4.0, "CPU": 9.0}}
    assert unmet(nodes, "GPU", 3, 4) is None
    assert unmet(nodes, "GPU", 1, 8) is None
    assert unmet(nodes, "GPU", 2, 8) == (
        "2 stages of 8 GPUs are asked for (--pipeline-parallel-size, --tensor-parallel-size), and the Ray cluster has room for "
        "1 (10.0.0.1 (a): 8, 10.0.0.2 (b): 4); add nodes, or ask for less."
    )
    assert str(unmet(nodes, "GPU", 1, 16)).startswith("--tensor-parallel-size 16 needs a node with 16 GPUs, and the largest of")
    assert unmet({}, "GPU", 1, 1) == "The Ray cluster has no node that is alive."


def test_nothing_imports_ray_before_it_is_asked_for() -> None:
    code = "import sys, octavo.server.serve, octavo.frontend.ray_nodes, octavo.frontend.llm; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_ray
def test_replicas_behind_serve_lose_no_request_with_a_node() -> None:
    """The OpenAI client's requests that have not begun to stream run elsewhere; streams end whole, or with an error."""
    words = [sys.executable, "-m", "nodes.served_by_ray"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=PATHS), timeout=400)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    found = json.loads(lines[0])
    assert (found["models"], found["keyless"], found["health"]) == (["model"], 401, 200)
    assert found["streamed"] == found["whole"] != ""
    assert (found["answered"], found["lost"]) == (24, [])
    lost = "The replica that wrote this answer is lost; send the request again."
    died = [end for end in found["ends"] if end != "length"]
    assert all(end == lost or "Stage " in end or "engine" in end for end in died), found["ends"]


@needs_ray
def test_a_config_of_serve_and_its_app() -> None:
    """deploy/ray-serve.yaml is one that Serve reads; flags are judged as the command line's; beginnings are told apart."""
    script = """
import sys, yaml
from types import SimpleNamespace
from ray.serve.schema import ServeDeploySchema
from ray.serve.exceptions import RayServeException
from octavo import ray_serve
from octavo.errors import OctavoError
config = yaml.safe_load(open(sys.argv[1]))
(application,) = ServeDeploySchema.model_validate(config).applications
assert application.import_path == "octavo.ray_serve:app"
assert {one["name"] for one in config["applications"][0]["deployments"]} == {"Front", "Engine"}
for flags, sentence in (
    ({"tensor-parallel": 2}, "args: tensor-parallel is not a flag that it can have; did you mean tensor-parallel-size"),
    ({"enable-lora": True}, "--enable-lora is not served: there are no LoRA adapters"),
    ({"tool-call-parser": "nonsense"}, "--tool-call-parser 'nonsense' is not known"),
    ({"allowed-media-domains": ["a b"]}, "--allowed-media-domains takes names of hosts"),
    ({"port": 9000}, "args: port is for octavo serve's own HTTP server; Ray Serve's has http_options."),
    ({"ssl_certfile": "x"}, "args: ssl_certfile is for octavo serve's own HTTP server"),
):
    try:
        ray_serve.app(flags)
    except OctavoError as error:
        assert str(error).startswith(sentence), error
        assert isinstance(error, RayServeException)  # which Serve does not try again
    else:
        raise AssertionError(flags)
def chunks(*said):
    import json
    return ray_serve.chunks_of_body(json.dumps({"model": "m", "messages": [{"content": "s" * 600}, *said]}).encode())
one, other = chunks("a" * 600), chunks("b" * 600)
assert len(one) == len(other) == 4 and one[:2] == other[:2] and one[3] != other[3]
assert ray_serve.chunks_of_body(b"{") == ray_serve.chunks_of_body(b"[]") == []
def wanted(ready, target, waiting, running):
    metrics = {"waiting": {1: waiting}, "running": {1: running}, "room": {n: 256 for n in range(ready)}}
    return ray_serve.by_waiting(SimpleNamespace(aggregated_metrics=metrics, running_replicas=list(range(ready)),
        target_num_replicas=target, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=4))[0]
given = (1, 1, 0, 250), (1, 1, 3, 256), (1, 2, 3, 256), (1, 1, 99, 256), (2, 2, 0, 20), (2, 2, 0, 300)
found = [wanted(*one) for one in given]
assert found == [1, 2, 2, 4, 1, 2], found
"""
    config = str(Path(__file__).parents[2] / "deploy" / "ray-serve.yaml")
    done = subprocess.run([sys.executable, "-c", script, config], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
