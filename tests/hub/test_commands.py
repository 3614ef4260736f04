"""Every command that reads a checkpoint takes a name of the hub, from the environment of its process to the answer."""

from __future__ import annotations

import argparse
import http.client
import io
import json
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from hub.hub_server import Hub, Repo
from server.processes import Server, free_port

from octavo.cli import engine_config, main
from octavo.config import EngineConfig
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.frontend.llm import LLM
from octavo.messages import SamplingParams

NAME = "an-org/a-model"
FILES = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir()}
SMALL = ["--threads", "1", "--cpu-kv-cache-gib", "0.01"]


@pytest.fixture
def demo(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the demo model, for this process and those that it starts."""
    hub.repos[NAME] = Repo(FILES)
    for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", "1"), ("HF_HUB_OFFLINE", "0"), ("HF_HOME", tmp_path)):
        monkeypatch.setenv(name, str(value))
    return hub


def test_serve_downloads_once_for_all_ranks_and_lists_the_name(demo: Hub, tmp_path: Path) -> None:
    server = Server(NAME, *SMALL, "--tensor-parallel-size", "2", "--device", "cpu")
    try:
        log = "".join(server.log)
        assert f"octavo: downloading the weights of {NAME}: 0 B of 11.5 MB" in log
        assert log.index("downloading config") < log.index("downloading the weights") < log.index("octavo: loading")
        assert json.loads(server.get("/v1/models")[1])["data"][0]["id"] == NAME
        body = json.dumps({"model": NAME, "prompt": "def f", "max_tokens": 4})
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.stop()
    assert demo.sent(".safetensors") == len(FILES["model.safetensors"])
    assert (tmp_path / "hub/models--an-org--a-model/refs/main").exists()


def test_a_server_that_downloads_listens_to_ctrl_c_alone(demo: Hub) -> None:
    demo.stall_after = 100_000
    server = Server(NAME, *SMALL, ready=False)
    try:
        server.wait_for("octavo: downloading the weights")
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", server.port)) == 0  # whoever comes now waits
        began = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.end() == 130
        assert time.monotonic() - began < 5
        assert "Traceback" not in "".join(server.log)
    finally:
        server.stop()


def test_a_port_that_is_taken_is_found_before_the_download(demo: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", NAME, "--host", "127.0.0.1", "--port", str(port)]) == 1
    assert f"Port {port} is in use" in capsys.readouterr().err
    assert not demo.requests


def test_quantize_and_llm(demo: Hub, tmp_path: Path) -> None:
    assert main(["quantize", NAME, "-o", str(tmp_path / "out"), "--download-dir", str(tmp_path / "else")]) == 0
    found = LLM(NAME, download_dir=str(tmp_path / "else"), cpu_kv_cache_gib=0.01, threads=1)
    assert demo.sent(".safetensors") == len(FILES["model.safetensors"])
    own = LLM(cpu_kv_cache_gib=0.01, threads=1)
    params = SamplingParams(max_tokens=8, temperature=0)
    texts = [llm.generate("def read(self", params, use_tqdm=False)[0].outputs[0].text for llm in (found, own)]
    assert texts[0] == texts[1]
    assert (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out/model.safetensors").is_symlink()


COMMANDS = (
    ["serve"], ["quantize", "-o", "out"], ["chat"], ["compare"], ["plan"], ["bench", "throughput"], ["bench", "latency"],
    ["bench", "profile"],
)  # fmt: skip


def test_every_command_asks_the_hub(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for command in COMMANDS:
        hub.requests.clear()
        assert main([*command, "an-org/none", "--download-dir", str(tmp_path), "--revision", "v1"]) == 1, command
        assert [request.path for request in hub.requests] == ["/api/models/an-org/none/revision/v1"], command
        told = capsys.readouterr().err
        assert told.startswith("octavo: There is no directory an-org/none here, and no model of that name on"), (command, told)


def test_a_start_from_a_directory_does_not_import_the_library(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, octavo.cli; octavo.cli.main(['serve', '.'])\n"
        "import octavo.server.app, octavo.frontend.async_engine\n"
        "print([name for name in sys.modules if name.startswith('huggingface_hub')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_format_is_named_that_the_model_is_stored_in(demo: Hub) -> None:
    """--quantization fp8 keeps the codes of a checkpoint in Hugging Face's fp8, which config.json on the hub says it is."""
    known = json.loads(FILES["config.json"])
    stored = known | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    demo.repos[NAME] = Repo(FILES | {"config.json": json.dumps(stored).encode()})
    given = argparse.Namespace(model=NAME, quantization="fp8")
    assert engine_config(given).quantization == EngineConfig().quantization
    assert engine_config(given, downloads=False).quantization == "fp8"
    assert demo.sent(".safetensors") == 0
    with pytest.raises(OctavoError, match="is stored as fp8: leave it out"):
        engine_config(argparse.Namespace(model=NAME, quantization="modelopt"))
