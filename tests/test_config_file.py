"""--config: a YAML file whose keys are flags, and dotted flags."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from cases import cases

from octavo.cli import engine_config, make_parser
from octavo.command_words import with_config_file, with_dashes
from octavo.errors import OctavoError
from octavo.server import serve


def parse(path: Path, text: str, *words: str) -> argparse.Namespace:
    path.write_text(text)
    parser = make_parser("serve", serve.add_arguments)
    return parser.parse_intermixed_args(with_config_file(parser, with_dashes(["--config", str(path), *words])))


def test_keys_are_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    text = """
model: FILE
port: 12
served-model-name: [a, b]
max_model_len: 32k
allowed-origins: ["http://x"]
api-key: [one]
enable-prefix-caching: false
enable-auto-tool-choice: true
trust-remote-code: false
hf-overrides: {rope_theta: 5.0}
limit-mm-per-prompt: {image: 2}
quantization-ignore: ["re:.*down.*", x]
swap-space: 4
"""
    args = parse(tmp_path / "c.yaml", text, "--port", "34", "--api-key", "two")
    config = engine_config(args)
    assert (args.port, args.api_key, args.served_model_name, config.model) == (34, ["two"], ["a", "b"], "FILE")
    assert (config.max_model_len, config.enable_prefix_caching, config.trust_remote_code) == (32000, False, False)
    assert (config.hf_overrides, config.limit_mm_per_prompt) == ({"rope_theta": 5.0}, {"image": 2})
    assert [spelled for _, spelled, _ in args.peers] == ["--enable-auto-tool-choice", "--swap-space"]
    args = parse(tmp_path / "c.yaml", "model: FILE\nseed: 1\nquantization: fp8", "MODEL", "-q=ptpc_fp8")
    config = engine_config(args)
    assert (config.model, config.seed, config.quantization) == ("MODEL", 1, "ptpc_fp8")


def test_values_are_as_they_are_written(tmp_path: Path) -> None:
    """But for objects, whose numbers are JSON's. YAML 1.1 has 83 for 0123, 90 for 1:30, and a text for 1e6."""
    text = """
hf-overrides: {rope_theta: 1e6, a: [.5, 12, -3.0E-2], b: 0123, c: "1e6", d: 2024-05-01}
served-model-name: [1.10, 1e5, 2024-05-01]
api-key: 01234567
revision: 12e4567
root-path: 1:30
"""
    args = parse(tmp_path / "c.yaml", text)
    assert json.loads(args.hf_overrides) == {
        "rope_theta": 1e6, "a": [0.5, 12, -0.03], "b": 123, "c": "1e6", "d": "2024-05-01",
    }  # fmt: skip
    assert (args.served_model_name, args.api_key) == (["1.10", "1e5", "2024-05-01"], ["01234567"])
    assert (args.revision, args.root_path) == ("12e4567", "/1:30")


@cases(
    ("text", "sentence"),
    [
        ("max-model-len: long", "max-model-len: argument --max-model-len: invalid integer value: 'long'."),
        ("max-mdel-len: 1", "max-mdel-len is not a flag that it can have; did you mean max-model-len (see octavo serve --"),
        ("help: true", "help is not a flag that it can have (see octavo serve --help)."),
        ("config: x", "config is not a flag that it can have (see octavo serve --help)."),
        ("seed: 1\nseed: 2", "seed is given twice; give it once."),
        ("max-model-len: 1\nmax_model_len: 2", "max_model_len is the same flag as max-model-len; give one of them."),
        ("api-key: [one, null]", "api-key is empty; give it a value, or leave it out."),
        ("served-model-name: [a, yes]", "served-model-name needs a value, and true is none."),
        ("enforce-eager: 1", "enforce-eager must be true or false, not 1."),
        ("quantization-ignore: [-x]", "quantization-ignore: argument --quantization-ignore: expected at least one argument."),
        ("allowed-origins: [a, -x]", "allowed-origins: -x cannot be a value."),
        ("api-key:", "api-key is empty; give it a value, or leave it out."),
        ("seed: true", "seed needs a value, and true is none."),
        ("- seed", "must hold flags as keys, such as `max-model-len: 8192`."),
        ("seed: [1", "is not valid YAML (while parsing a flow sequence"),
        ("", "must hold flags as keys, such as"),
    ],
)
def test_what_is_wrong_names_the_file_and_the_key(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(OctavoError) as error:
        parse(tmp_path / "c.yaml", text)
    assert str(error.value).startswith(f"--config {tmp_path / 'c.yaml'}")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    parser = make_parser("serve", serve.add_arguments)
    for words, sentence in ((["--config", "/nowhere.yaml"], "there is no such file"), (["--config"], "needs the name")):
        with pytest.raises(OctavoError, match=sentence):
            with_config_file(parser, words)


@cases(
    ("line", "words"),
    [
        (["--hf-overrides.rope_theta", "1e6", "M"], ["M", "--hf-overrides", '{"rope_theta": 1000000.0}']),
        (
            ["--hf-overrides.text_config.a=b", "--hf-overrides.c", "1"],
            ["--hf-overrides", '{"text_config": {"a": "b"}, "c": 1}'],
        ),
        (["-cc.mode=3"], ["-cc", '{"mode": 3}']),
        (["--max_model_len=1.5", "--x", "a.b=c"], ["--max-model-len=1.5", "--x", "a.b=c"]),
    ],
)
def test_dotted_flags_are_json(line: list[str], words: list[str]) -> None:
    assert with_dashes(line) == words


def test_dotted_flags_that_contradict() -> None:
    for line, sentence in (
        ("--hf-overrides {} --hf-overrides.a 1", "--hf-overrides is given whole and by --hf-overrides.a; give one of them."),
        (
            "--hf-overrides.a 1 --hf-overrides.a.b 1",
            "--hf-overrides.a.b: a is given a value of its own, too; give one of them.",
        ),
    ):
        with pytest.raises(OctavoError, match=sentence):
            with_dashes(line.split())
