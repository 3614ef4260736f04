"""Values of --quantization that name the format of a checkpoint, and of --dtype that are served as another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import cases

from octavo.checkpoint_values import settled
from octavo.cli import engine_config, make_parser
from octavo.errors import OctavoError
from octavo.server import serve

FORMATS = Path(__file__).parent / "data" / "formats"  # written by the tools themselves
PLAIN = FORMATS / "original"


@cases(
    ("value", "directory"),
    [
        ("compressed-tensors", "llm_compressor_fp8"),
        ("Compressed-Tensors", "llm_compressor_w4a16"),
        ("modelopt", "modelopt_fp8"),
        ("modelopt_fp8", "modelopt_fp8"),
        ("quark", "quark_fp8_channel"),
    ],
)
def test_the_checkpoints_own_format_may_be_named(value: str, directory: str) -> None:
    options, notes = settled({"quantization": value, "seed": 1}, str(FORMATS / directory))
    assert options == {"seed": 1}
    assert notes == [f"--quantization {value} is what {FORMATS / directory} is stored in, and it is served so."]


def test_fp8_is_hugging_faces_where_the_checkpoint_is(tmp_path: Path) -> None:
    """And else the scheme, which re-quantizes: as it is where the weights are to be saved."""

    def quantization(config: dict[str, Any], **options: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return settled({"quantization": "FP8", **options}, str(tmp_path))[0].get("quantization")

    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert quantization({"quantization_config": stored}) is None
    assert quantization({"text_config": {"quantization_config": stored}}) is None
    assert quantization({"quantization_config": stored}, save_quantized="x") == "FP8"
    assert quantization({"quantization_config": {"quant_method": "compressed-tensors"}}) == "FP8"
    assert quantization({}) == "FP8"


@cases(
    ("value", "directory", "sentence"),
    [
        ("modelopt", "original", "is not quantized: use --quantization fp8 or ptpc_fp8 to quantize it, or leave it out."),
        ("mxfp8", "original", "is not quantized: use --quantization fp8"),
        ("fbgemm_fp8", "quark_fp8_tensor", "is stored as quark: leave it out."),
        ("compressed-tensors", "modelopt_fp8", "is stored as modelopt: leave it out."),
        (
            "awq",
            "original",
            "--quantization awq is not served: Octavo reads checkpoints in BF16, FP8 and compressed-tensors INT4",
        ),
        ("GPTQ_marlin", "original", "--quantization GPTQ_marlin is not served"),
        ("bitsandbytes", "modelopt_fp8", "is not served"),
        ("gguf", "original", "is not served"),
    ],
)
def test_another_format_is_one_sentence(value: str, directory: str, sentence: str) -> None:
    with pytest.raises(OctavoError) as error:
        settled({"quantization": value}, str(FORMATS / directory))
    assert sentence in str(error.value)


def test_half_is_bfloat16_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("half", "Float16"):
        args = make_parser("serve", serve.add_arguments).parse_args([str(PLAIN), "--dtype", value])
        assert engine_config(args).dtype == "bfloat16"
        said = f"octavo: --dtype {value} is served in bfloat16, which has the same size and a wider range.\n"
        assert capsys.readouterr().err == said
    args = make_parser("serve", serve.add_arguments).parse_args([str(PLAIN), "--dtype", "float32"])
    assert engine_config(args).dtype == "float32"
    assert capsys.readouterr().err == ""
