"""One engine over two hosts, by --nnodes and torch.distributed: tokens, and a sentence for each fault, which names the host."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from frontend.test_async_engine import SLOW, collect
from frontend.test_rank_processes import OnRank
from nodes.hosts import Node, ended, serve
from server.processes import free_port

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.frontend.async_engine import AsyncEngine, EngineDead
from octavo.frontend.node import run_node
from octavo.frontend.node_facts import difference, facts
from octavo.frontend.nodes import Nodes

ME = re.escape(socket.gethostname())
READY = "Octavo is ready"
PROMPT = list(range(5, 300))  # in chunks


def asked(port: int, prompt: Any, tokens: int, namespace: str | None = None, stream: bool = False) -> subprocess.Popen[str]:
    """A client on a host, whose standard output is the answer's body."""
    body = json.dumps(
        dict(model="octavo-demo", prompt=prompt, max_tokens=tokens, temperature=0, stream=stream, ignore_eos=True)
    )
    where = [] if namespace is None else ["ip", "netns", "exec", namespace]
    words = ["curl", "-sN", f"http://127.0.0.1:{port}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    return subprocess.Popen([*where, *words], stdout=subprocess.PIPE, text=True)


def answer(port: int, prompt: Any, tokens: int = 12, namespace: str | None = None) -> str:
    with asked(port, prompt, tokens, namespace) as client:
        said, _ = client.communicate(timeout=100)
    return str(json.loads(said)["choices"][0]["text"])


@pytest.fixture(scope="module")
def expected() -> str:
    """What one rank says."""
    llm = LLM(device="cpu", threads=1, dtype="float32", max_num_batched_tokens=256)
    params = SamplingParams(temperature=0, repetition_penalty=1.05, max_tokens=12, ignore_eos=True)  # as the server
    return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].text


def first_token(client: subprocess.Popen[str]) -> None:
    assert client.stdout is not None
    assert client.stdout.readline().startswith("data: {")


def rank_of(node: Node) -> int:
    """The process of a host's rank."""
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    found = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (pid,) = found
    return pid


def test_stages_on_two_hosts_say_what_one_rank_says_until_a_rank_dies(expected: str) -> None:
    """Then the stream ends with an error, /health is not 200, and both commands end with 1 and name the host."""
    port, http = free_port(), free_port()
    other = serve(1, "127.0.0.1", port, "-pp", "2")
    head = serve(0, "127.0.0.1", port, "-pp", "2", http=http)
    with ended(head, other):
        head.wait_for(READY)
        assert [answer(http, PROMPT) for _ in range(2)] == [expected] * 2  # the second from the prefix cache
        with asked(http, PROMPT, 700, stream=True) as client:
            first_token(client)
            os.kill(rank_of(other), signal.SIGKILL)
            rest, _ = client.communicate(timeout=30)
        assert '"error"' in rest
        assert "Rank 1 of the engine was killed" in rest, rest
        with pytest.raises(urllib.error.URLError, match=r"refused|503"):  # 503 for a moment, then nobody
            urllib.request.urlopen(f"http://127.0.0.1:{http}/health")
        assert (head.end(), other.end()) == (1, 1)
    for node in (head, other):
        assert f"Node 1 ({socket.gethostname()}): Rank 1 of the engine was killed" in node.said, node.said
        assert "Traceback" not in node.said, node.said
    assert "start it again" in head.said


def fake(node: int, port: int, **options: Any) -> Node:
    given = dict(nnodes=2, node_rank=node, master_port=port, tensor_parallel_size=4) | options
    return Node([sys.executable, "-m", "nodes.fake_node", json.dumps(given)], module_path=True)


def with_two(test: Callable[[AsyncEngine, Node], Awaitable[None]], **options: Any) -> Node:
    """An engine of four ranks, two of which are another host's, which has ended afterwards."""
    port = free_port()
    other = fake(1, port, **options)

    async def main() -> None:
        config = EngineConfig(nnodes=2, master_port=port, tensor_parallel_size=4, **options)
        engine = await AsyncEngine.start(config, make_core=OnRank)
        try:
            await test(engine, other)
        finally:
            await engine.shutdown()

    with ended(other):
        asyncio.run(main())
        other.end()
    return other


def test_ranks_of_two_hosts_answer_as_one_does_and_end_with_it() -> None:
    async def test(engine: AsyncEngine, _: Node) -> None:
        assert len(engine._processes._processes) == 2
        found = await asyncio.gather(*(collect(engine, [n], str(n), max_tokens=20) for n in (5, 50, 500)))
        tokens = [[token for delta in one for token in delta.token_ids] for one in found]
        assert tokens == [list(range(n + 1, n + 21)) for n in (5, 50, 500)]

    other = with_two(test)
    assert other.process.returncode == 0, other.said


def stop(other: Node) -> None:
    other.process.send_signal(signal.SIGTERM)


def lose(other: Node) -> None:
    other.process.kill()


@cases(
    ("end", "sentence", "code"),
    [
        (stop, f"Node 1 ({ME}) was stopped by a signal.", 0),
        (lose, f"Node 1 ({ME}) has ended or is unreachable", -9),
    ],
)
def test_a_host_that_ends_ends_every_stream(end: Callable[[Node], None], sentence: str, code: int) -> None:
    async def test(engine: AsyncEngine, other: Node) -> None:
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=90))
        await asyncio.sleep(0.3)
        end(other)
        with pytest.raises(EngineDead) as error:
            await asyncio.wait_for(task, 20)
        assert str(error.value).startswith(sentence.replace("\\", ""))
        assert not engine.healthy

    assert with_two(test).process.returncode == code


def test_a_head_that_is_lost_ends_the_other_host() -> None:
    port = free_port()
    other, head = fake(1, port), Node([sys.executable, "-m", "nodes.fake_head", str(port)], module_path=True)
    with ended(other, head):
        head.wait_for("ready")
        head.process.kill()
        assert other.end() == 1
        assert "ends: Node 0 has ended or is unreachable" in other.said, other.said


def test_a_rank_of_another_host_that_hangs_is_named() -> None:
    async def test(engine: AsyncEngine, other: Node) -> None:
        children = Path(f"/proc/{other.process.pid}/task/{other.process.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(ranks[1], signal.SIGSTOP)
        task = asyncio.create_task(collect(engine, [SLOW], max_tokens=90))
        await asyncio.sleep(0.2)
        await engine.end_if_a_rank_hangs()
        assert (await engine.death()).startswith("Of the engine's 4 ranks rank 3 hangs (no answer)")
        await asyncio.gather(task, return_exceptions=True)

    other = with_two(test)
    assert other.process.returncode == 1
    assert "rank 3 hangs" in other.said


def refused(monkeypatch: pytest.MonkeyPatch, there: Callable[[EngineConfig], int], **options: Any) -> tuple[str, str]:
    """What host 0 says, and host 1, which is a thread that `there` runs."""
    config = EngineConfig(nnodes=2, master_port=free_port(), pipeline_parallel_size=2, **options)
    said: list[str] = []

    def run() -> None:
        try:
            there(EngineConfig(nnodes=2, node_rank=1, master_port=config.master_port, pipeline_parallel_size=2, **options))
        except OctavoError as error:
            said.append(str(error))

    other = threading.Thread(target=run)
    other.start()
    nodes = Nodes(config)
    with pytest.raises(OctavoError) as error:
        nodes.gather()
    other.join(10)
    assert not other.is_alive()
    return str(error.value), "".join(said)


def with_change(**changes: Any) -> Callable[[EngineConfig], int]:
    from dataclasses import replace

    return lambda config: run_node(replace(config, **changes), signals=False)


def test_what_hosts_do_not_have_in_common_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flags; a path that one lacks; another checkpoint; two of one number; one that never comes."""
    said, _ = refused(monkeypatch, with_change(max_num_seqs=7))
    assert re.match(rf"Node 1 \({ME}\) was started with --max-num-seqs 7, and node 0 with --max-num-seqs 256; give", said)
    said, own = refused(monkeypatch, with_change(model=str(tmp_path / "nowhere")))
    assert re.match(rf"Node 1 \({ME}\): .*nowhere", said), said
    assert "nowhere" in own
    (tmp_path / "config.json").write_text("{}")
    said, _ = refused(monkeypatch, with_change(model=str(tmp_path)))
    assert re.match(rf"Node 1 \({ME}\) has another config.json than is on node 0 \({tmp_path} there, ", said), said
    said, _ = refused(monkeypatch, lambda config: 0, distributed_timeout_seconds=1)
    assert re.match(r"Node 1 did not come to 127.0.0.1:\d+ within 1 s; start octavo serve there with --nnodes 2", said), said


def test_versions_that_differ_are_a_sentence() -> None:
    own = facts(EngineConfig(model=str(MODEL_DIR)))
    assert difference("Node 1 (b)", own, own) is None
    for name, title in (("octavo", "Octavo"), ("torch", "torch")):
        said = difference("Node 1 (b)", own | {name: "0.0.1"}, own)
        assert said == f"Node 1 (b) has {title} 0.0.1, and node 0 has {own[name]}; install one version on all nodes."


def test_a_host_that_cannot_be_reached_and_an_address_that_is_not_ours() -> None:
    config = EngineConfig(nnodes=2, node_rank=1, master_port=free_port(), tensor_parallel_size=2, distributed_timeout_seconds=1)
    with pytest.raises(
        OctavoError, match=rf"^Node 1 \({ME}\) cannot reach node 0 at 127.0.0.1:\d+ \(Connection refused; tried"
    ):
        run_node(config, signals=False)
    with pytest.raises(OctavoError, match=rf"^Node 0 \({ME}\) cannot listen at 192.0.2.1:29501 .*--master-addr"):
        Nodes(EngineConfig(nnodes=2, tensor_parallel_size=2, master_addr="192.0.2.1"))


@cases(
    ("options", "sentence"),
    [
        (dict(nnodes=2, tensor_parallel_size=3), "--nnodes 2 does not divide the engine's 3 ranks"),
        (dict(nnodes=2, node_rank=2, tensor_parallel_size=2), "--node-rank must be 0 to 1, below --nnodes 2, not 2"),
        (dict(node_rank=1), "--node-rank must be 0 to 0"),
        (dict(nnodes=2, tensor_parallel_size=2, data_parallel_size=2), "--data-parallel-size is of one host"),
        (dict(nnodes=2, tensor_parallel_size=2, quantization="fp8", save_quantized="x"), "--save-quantized writes to one host"),
        (dict(master_port=70000), "--master-port must be 1 to 65535"),
        (dict(nnodes=2, tensor_parallel_size=2, distributed_executor_backend="ray"), "--nnodes is for hosts without Ray"),
        (
            dict(tensor_parallel_size=2, distributed_executor_backend="uni"),
            "--distributed-executor-backend uni is for one rank",
        ),
    ],
)
def test_flags_that_do_not_fit(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OctavoError, match=f"^{re.escape(sentence)}"):
        EngineConfig(**options)
