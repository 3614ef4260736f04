"""The command line: flags, sentences, exit codes."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cases

from octavo.cli import _with_dashes, engine_config, main, make_parser
from octavo.config import EngineConfig, config_fields, flag_of
from octavo.server import serve
from octavo.version import __version__


def parse(line: str) -> tuple[argparse.Namespace, EngineConfig]:
    args = make_parser("serve", serve.add_arguments).parse_args(_with_dashes(line.split()))
    return args, engine_config(args)


def test_the_peers_command_line_is_taken_unchanged() -> None:
    _, config = parse(
        "--model M --quantization ptpc_fp8 --kv-cache-dtype fp8 --tensor-parallel-size 8 --max-model-len 32768 "
        "--gpu-memory-utilization 0.95 --disable-log-requests --swap-space 4 --enable-auto-tool-choice --trust-remote-code"
    )
    assert (config.model, config.quantization, config.kv_cache_dtype) == ("M", "ptpc_fp8", "fp8_e4m3")
    assert (config.tensor_parallel_size, config.max_model_len, config.gpu_memory_utilization) == (8, 32768, 0.95)


def test_every_field_has_its_flag() -> None:
    parser = make_parser("serve", serve.add_arguments)
    for field in config_fields():
        assert flag_of(field.name) in parser._option_string_actions


@cases(
    ("line", "name", "value"),
    [
        ("M", "model", "M"),
        ("M --model M", "model", "M"),
        ("--quantization-ignore a b --quantization-ignore c", "quantization_ignore", ("a", "b", "c")),
        ("--no-enable-prefix-caching", "enable_prefix_caching", False),
        ("--enable_prefix_caching", "enable_prefix_caching", True),
        ("--max_model_len=32k", "max_model_len", 32000),
        ("--max-model-len 32K", "max_model_len", 32768),
        ("-q fp8_per_channel", "quantization", "ptpc_fp8"),
        ("-tp 2", "tensor_parallel_size", 2),
        ("--block-size 32", "block_size", 32),
    ],
)
def test_flags(line: str, name: str, value: object) -> None:
    assert getattr(parse(line)[1], name) == value


@cases(
    ("line", "code", "sentence"),
    [
        ("sevre", 2, "octavo: 'sevre' is not a command; did you mean serve (see octavo --help)"),
        ("serve --quantisation fp8", 2, "unrecognized arguments: --quantisation; did you mean --quantization (see"),
        ("serve --max-model-len long", 2, "argument --max-model-len: invalid integer value: 'long'"),
        ("serve --quantization pttc_fp8", 1, "octavo: --quantization 'pttc_fp8' is not known; did you mean 'ptpc_fp8'?"),
        ("serve --max-model-len 0", 1, "octavo: --max-model-len must be positive, not 0."),
        ("serve A --model B", 1, "octavo: Two models were given, A and --model B; give one."),
        ("serve --tool-call-parser hermse", 1, "octavo: --tool-call-parser 'hermse' is not known"),
        ("serve --reasoning-parser x", 1, "octavo: --reasoning-parser 'x' is not known"),
        ("serve --chat-template /nowhere --port 0", 1, "octavo: --chat-template /nowhere cannot be read"),
        ("serve --chat-template /dev/zero --port 0", 1, "octavo: --chat-template /dev/zero is no file"),
        ("serve --chat-template / --port 0", 1, "octavo: --chat-template / is no file"),
        (f"quantize -o /tmp/{'a' * 300}", 1, "octavo: File name too long: /tmp/aaa"),
        ("serve --model= --port 0", 1, "octavo: The model's name is empty"),
        ("serve --port 99999", 2, "argument --port: invalid port value: '99999'"),
        ("serve --host 203.0.113.1", 1, "octavo: Cannot listen on 203.0.113.1 port 8000"),
        ("chat http://127.0.0.1:9", 1, "octavo: No server answers at http://127.0.0.1:9; start one with"),
    ],
)
def test_what_is_wrong_is_one_sentence(line: str, code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:  # argparse's way; the rest returns
        raise SystemExit(main(line.split()))
    assert exit.value.code == code
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_an_occupied_port_is_told_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")  # of no model
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"octavo: Port {port} is in use; stop what uses it, or choose another with --port.\n"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"octavo {__version__}\n"
    assert main([]) == main(["--help"]) == 0
    assert "serve" in capsys.readouterr().out


def test_help_brings_nothing_slow() -> None:
    code = "import sys; from octavo.cli import main; main(['--help']); main(['serve', '--version'])"
    code = code.replace("main(['serve', '--version'])", "import octavo.server.app; assert 'torch' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
    code = "import sys; from octavo.cli import main; main(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    for slow in ("torch", "transformers", "pydantic", "starlette", "uvicorn", "numpy", "tokenizers"):
        assert f"'{slow}'" not in loaded
