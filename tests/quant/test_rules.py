"""Which layers `--quantization-ignore` leaves out."""

from __future__ import annotations

import pytest
from cases import cases

from octavo.errors import OctavoError
from octavo.quant import BF16, FP8_PER_CHANNEL, QuantRules

DOWN = "model.layers.0.mlp.down_proj"


@cases(
    ("pattern", "hit", "miss"),
    [
        (DOWN, DOWN, "model.layers.1.mlp.down_proj"),
        ("down_proj", DOWN, "model.layers.0.mlp.up_proj"),
        ("down_proj", "model.layers.11.mlp.down_proj", "model.layers.0.mlp.quick_down_proj"),
        ("mlp.down_proj", DOWN, "model.layers.0.attn.down_proj"),
        ("model.layers.0.*", DOWN, "model.layers.10.mlp.down_proj"),
        ("*.layers.[01].*", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"),
        ("re:model.layers.0", DOWN, "language.model.layers.0"),  # from the start, as compressed-tensors has it
        (r"re:.*\.(0|3)\.mlp", "model.layers.3.mlp.up_proj", "model.layers.30.mlp.up_proj"),
        ("lm_head", "lm_head", "lm_head_2"),
        ("mlp.experts.*.down_proj", "model.layers.0.mlp.experts.11.down_proj", "model.layers.0.mlp.experts.11.up_proj"),
        ("experts.*", "model.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.shared_experts.up_proj"),
        ("*.down_proj", DOWN, "model.layers.0.mlp.quick_down_proj"),
    ],
)
def test_patterns(pattern: str, hit: str, miss: str) -> None:
    rules = QuantRules(FP8_PER_CHANNEL, [pattern])
    assert rules.scheme_for([miss]) is FP8_PER_CHANNEL
    assert not rules.used
    assert rules.scheme_for([hit]) is BF16
    rules.check_used()


def test_leaving_out_one_matrix_leaves_out_the_stack() -> None:
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    rules = QuantRules(FP8_PER_CHANNEL, ["q_proj", "v_proj"])
    assert rules.scheme_for(names) is BF16
    rules.check_used()  # both patterns, though the first alone decided
    assert QuantRules(FP8_PER_CHANNEL, ["o_proj"]).scheme_for(names) is FP8_PER_CHANNEL


def test_overlapping_patterns_are_both_used() -> None:
    rules = QuantRules(FP8_PER_CHANNEL, ["model.layers.0.*", "down_proj"])
    assert rules.ignored(DOWN)
    rules.check_used()


@pytest.mark.parametrize(
    ("ignore", "asked", "expected"),
    [((), False, BF16), ((), True, FP8_PER_CHANNEL), (("lm_head",), True, BF16)],
)
def test_the_head_is_left_out_unless_asked_for(ignore: tuple[str, ...], asked: bool, expected: object) -> None:
    rules = QuantRules(FP8_PER_CHANNEL, ignore, quantize_lm_head=asked)
    assert rules.scheme_for(["lm_head"], is_head=True) is expected
    alone = QuantRules(ignore=ignore, quantize_lm_head=asked, head_scheme=FP8_PER_CHANNEL)
    assert alone.scheme_for(["lm_head"], is_head=True) is expected
    assert alone.scheme_for(["model.layers.0.mlp.down_proj"]) is BF16


def test_a_regular_expression_that_does_not_compile() -> None:
    with pytest.raises(OctavoError, match=r"--quantization-ignore 're:\(' is not a regular expression: .+"):
        QuantRules(FP8_PER_CHANNEL, ["re:("])


def test_a_pattern_that_matches_nothing_is_said() -> None:
    rules = QuantRules(FP8_PER_CHANNEL, ["down_proj", "dwon_proj"])
    rules.scheme_for([DOWN])
    with pytest.raises(OctavoError, match="'dwon_proj' matches no layer"):
        rules.check_used()


def test_patterns_do_not_matter_where_nothing_is_quantized() -> None:
    QuantRules(BF16, ["nothing"]).check_used()
