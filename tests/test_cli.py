"""The command line: flags, sentences, exit codes."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cases

import octavo
from octavo.cli import engine_config, main, make_parser
from octavo.command_words import with_dashes
from octavo.config import EngineConfig, config_fields, flag_of
from octavo.errors import OctavoError
from octavo.flags import COMMANDS
from octavo.option_values import KV_CACHE_DTYPES, QUANTIZATIONS
from octavo.server import serve
from octavo.server.parsers.registry import REASONING_NAMES, TOOL_CALL_NAMES, choose_parser, choose_reasoning_parser
from octavo.tools.quantize import quantize
from octavo.version import __version__


def parse(line: str) -> tuple[argparse.Namespace, EngineConfig]:
    args = make_parser("serve", serve.add_arguments).parse_args(with_dashes(line.split()))
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
        ("-q FP8", "quantization", "fp8"),
        ("-q fp8_per_channel", "quantization", "ptpc_fp8"),
        ("--calibrate --save-quantized D -q fp8", "calibrate", "default"),
        ("--calibrate T --save-quantized D -q fp8", "calibrate", "T"),
        ("-tp 2", "tensor_parallel_size", 2),
        ("--block-size 32", "block_size", 32),
        ("--max-model-len auto", "max_model_len", None),
        ("--max-model-len -1", "max_model_len", None),
        ("--kv-cache-dtype FP8", "kv_cache_dtype", "fp8_e4m3"),
        ("--kv-cache-dtype-skip-layers 0,2 sliding_window 2", "kv_cache_dtype_skip_layers", ("0", "2", "sliding_window")),
        ("--hf-overrides.rope_theta=3", "hf_overrides", {"rope_theta": 3}),
        ("--kv-cache-memory-bytes 1G", "kv_cache_memory_bytes", 2**30),
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
        ("serve -q compressed-tensors", 1, "the checkpoint says itself which it has: leave --quantization out."),
        ("serve -q nothing-near", 1, "octavo: --quantization 'nothing-near' is not known; known are: none, bf16,"),
        ("serve -q int4", 1, "octavo: --quantization int4 is not served: Octavo reads checkpoints in BF16, FP8"),
        ("serve --speculative-confg x", 2, "octavo serve: unrecognized arguments: --speculative-confg (see octavo serve"),
        ("serve --hf-overrides [1]", 1, "octavo: --hf-overrides must be a JSON object, such as '{\"name\": 1}', not [1]."),
        ("serve --hf-overrides {", 1, "octavo: --hf-overrides must be a JSON object, and '{' is not valid JSON"),
        ('serve --override-generation-config {"x":1}', 1, "--override-generation-config: x is no sampling parameter;"),
        ("serve --generation-config /nowhere", 1, "octavo: --generation-config /nowhere has no generation_config.json;"),
        ("serve --tokenizer /nowhere", 1, "octavo: --tokenizer /nowhere has no tokenizer.json; give a directory"),
        ("serve --max-logprobs 101", 1, "octavo: --max-logprobs must be 0 to 100, the most that are served, not 101."),
        ("serve --kv-cache-dtype-skip-layers one", 1, "takes numbers of layers, from 0, and sliding_window for all"),
        ("serve --default-chat-template-kwargs 1", 2, "--default-chat-template-kwargs: invalid JSON object value: '1'"),
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
        ("quantize -o x --max-num-seqs 3", 2, "--max-num-seqs is a flag of octavo serve that this command has no use for"),
        ("plan --no-enable-prefix-caching", 2, "--no-enable-prefix-caching is a flag of octavo serve that this command"),
        ("compare -q fp8", 2, "-q is a flag of octavo serve that this command has no use for"),
        ("bench serve --shape qwen3-8b", 2, "unrecognized arguments: --shape"),
        ("chat --device cpu 127.0.0.1:9", 1, "octavo: --device is for a model that this command loads, and the server at"),
        ("chat . --api-key K", 1, "octavo: --api-key is for a server, and . is none; leave it out."),
        ("chat localhost:9/v1", 1, "octavo: No server answers at http://localhost:9; start one with"),
        ("help sevre", 2, "octavo: 'sevre' is not a command; did you mean serve (see octavo --help)"),
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


EMPTY = {
    "serve": "served_model_name api_key tool_call_parser reasoning_parser revision allowed_origins host chat_template "
    "quantization save_quantized calibrate quantization_config",
    "quantize": "output quantization revision",
    "chat": "api_key revision",
    "plan": "accelerator revision",
    "compare": "auto scheme kv",
    "bench serve": "base_url api_key json workload",
}


@cases(("command", "name"), [(command, name) for command, names in EMPTY.items() for name in names.split()])
def test_an_empty_value_is_not_one_that_is_left_out(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = flag_of(name)
    output = ["-o", "x"] if command == "quantize" and name != "output" else []
    rest = "." if name == "output" else ", or leave it out."
    for value in ([""], [" "]):
        assert main([*command.split(), *output, flag, *value]) == 1
        assert capsys.readouterr().err == f"octavo: {flag} is empty; give it a value{rest}\n"


def test_an_occupied_port_is_told_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")  # of no model
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"octavo: Port {port} is in use; stop what uses it, or choose another with --port.\n"


def made(name: str) -> argparse.ArgumentParser:
    return make_parser(name, importlib.import_module(COMMANDS[name].module).add_arguments)


def sections(name: str) -> dict[str, str]:
    """The groups of a command's help: heading -> text."""
    parts = re.split(r"(?m)^(\S.*):\n", made(name).format_help())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_serve_lists_its_flags_in_groups() -> None:
    found = sections("serve")
    flags = {
        "model": ["--dtype {auto,bfloat16,float32}", "--hf-overrides JSON", "--load-format {auto,dummy}"],
        "quantization and KV cache": ["-q, --quantization {bf16,fp8,ptpc_fp8,fp8_block,fp8_w8a16}", "--calibrate [FILE]"],
        "memory and scheduling": ["--max-num-seqs N", "-tp, --tensor-parallel-size N", "(default: 256)"],
        "several hosts": ["-n, --nnodes N", "-r, --node-rank N", "--master-addr ADDRESS"],
        "images and videos": ["--limit-mm-per-prompt JSON", "--language-model-only", "--allowed-media-domains HOST"],
        "parsers and templates": ["--chat-template FILE", "--tool-call-parser {hermes,", "--reasoning-parser {qwen3,"],
        "HTTP and security": ["--host ADDRESS", "--api-key KEY", "--allowed-origins"],
        "logging, timeouts and shutdown": ["--uvicorn-log-level {critical,", "--shutdown-timeout SECONDS"],
        "taken from vLLM's command line, without effect": ["--trust-remote-code", "--swap-space", "--attention-backend"],
    }
    assert list(found) == ["positional arguments", "options", *flags, "example"]
    assert re.findall(r"--\S+", found["options"]) == ["--help", "--config"]
    assert [(heading, flag) for heading, those in flags.items() for flag in those if flag not in found[heading]] == []


def test_an_example_is_a_line_that_its_command_takes() -> None:
    for name in COMMANDS:
        line = sections(name)["example"].strip()
        assert line.startswith(f"octavo {name} ")
        nothing = made(name).parse_intermixed_args(["-o", "x"] if name == "quantize" else [])
        assert vars(made(name).parse_intermixed_args(shlex.split(line)[1 + len(name.split()) :])) != vars(nothing)


def test_quantize_takes_of_the_engines_flags_what_it_reads() -> None:
    """Of the configuration it is given; revision and cache are part of what the model's path comes from."""
    read = set(re.findall(r"\bconfig\.(\w+)", inspect.getsource(quantize.run)))
    assert read == {*COMMANDS["quantize"].engine} - {"revision", "download_dir"}


def test_values_that_the_help_lists_are_taken() -> None:
    for field in config_fields():
        for value in field.metadata.get("values", ()):
            EngineConfig(**{field.name: value})
    for name in TOOL_CALL_NAMES:
        assert choose_parser(name, None, "") == name
    for name in REASONING_NAMES:
        choose_reasoning_parser(name, "")
    for flag in ("--scheme", "--kv"):
        known = QUANTIZATIONS if flag == "--scheme" else KV_CACHE_DTYPES
        listed = re.search(rf"{flag} {{(.*?)}}", made("compare").format_help())
        assert listed is not None
        assert set(listed[1].split(",")) <= set(known)


def test_what_is_ignored_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line; --chat-template ends this run before a port is bound."""
    flags = "--swap-space 4 --trust-remote-code --enable-chunked-prefill --no-async-scheduling --chat-template /nowhere"
    assert main(["serve", *flags.split()]) == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "octavo: taken without effect: --trust-remote-code, --swap-space, --no-async-scheduling."


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "-V"):
        assert main([flag]) == 0
        assert capsys.readouterr().out == f"octavo {__version__}\n"
    assert main([]) == main(["--help"]) == main(["help"]) == 0
    overview = capsys.readouterr().out
    assert overview == 3 * overview[: len(overview) // 3]
    for name in {full.split()[0] for full in COMMANDS}:
        assert f"\n  {name} " in overview
    assert main(["help", "help"]) == 0
    assert "usage: octavo" in capsys.readouterr().out
    assert main(["help", "bench"]) == 0
    assert "\n  profile " in capsys.readouterr().out
    for name in ("plan", "bench serve"):
        with pytest.raises(SystemExit) as exit:
            main(["help", *name.split()])
        assert (exit.value.code, capsys.readouterr().out) == (0, made(name).format_help())


def test_help_brings_nothing_slow() -> None:
    code = "import sys; from octavo.__main__ import main; sys.argv[1:] = {}\ntry: main()\nfinally: print(sorted(sys.modules))"
    slow = "torch", "transformers", "pydantic", "starlette", "uvicorn", "numpy", "tokenizers"
    for words, not_loaded in ((["--help"], slow), (["serve", "--help"], slow[:2]), (["chat", "--help"], slow)):
        done = subprocess.run([sys.executable, "-c", code.format(words)], check=True, capture_output=True, text=True)
        assert done.stderr == ""
        loaded = done.stdout.splitlines()[-1]
        assert [name for name in not_loaded if f"'{name}'" in loaded] == []


@pytest.mark.parametrize(("module", "line"), [("difflib", "--help"), ("torch", "quantize -o x"), ("torch", "compare")])
def test_ctrl_c_while_modules_are_imported(module: str, line: str, tmp_path: Path) -> None:
    """Neither a traceback nor what an extension module makes of the exception."""
    code = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT); [None for _ in range(1000)]\n"
    code += "except KeyboardInterrupt: raise ImportError('cannot load module more than once per process')\n"
    (tmp_path / f"{module}.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), str(Path(octavo.__file__).parents[1])])
    command = [sys.executable, "-m", "octavo", *line.split()]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background processes ignore it
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_directory_without_a_name_is_refused() -> None:
    with pytest.raises(OctavoError, match="--save-quantized needs the name of a directory"):
        EngineConfig(quantization="fp8", save_quantized="")


def test_closed_standard_streams_stay_nobody_elses(tmp_path: Path) -> None:
    """What is opened later must not get their numbers: what a library writes to standard error would go into it."""
    code = """
import os, sys
from octavo.cli import main
codes = main(["--version"]), main(["nonsense"])
found = *codes, os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev, os.open("/", os.O_RDONLY) > 2
open(sys.argv[1], "w").write(repr(found))
"""
    told = tmp_path / "told"
    shell = ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, code, str(told)]
    assert subprocess.run(shell, timeout=60).returncode == 0
    assert told.read_text() == "(0, 2, True, True)"
