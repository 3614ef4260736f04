"""`octavo compare --decode-activations bf16`: windows whose second half is read by decode steps, and what is made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative_error

from octavo.config import EngineConfig
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.errors import OctavoError
from octavo.text.tokenizer import Tokenizer
from octavo.tools.compare.compare import compare, write_config
from octavo.tools.compare.loss_table import basis, cells, command
from octavo.tools.compare.measure import REFERENCE, Measurement, Variant, cut, open_core
from octavo.tools.compare.read_text import hidden_states, states_of
from octavo.tools.compare.search import Budget, name_of, rungs, search

IDS = Tokenizer(str(MODEL_DIR)).encode(HELDOUT.read_text("utf-8"))
WINDOW = 64
HYBRID = Variant("ptpc_fp8", decode="bf16")


def config(**options: object) -> EngineConfig:
    return EngineConfig(model=str(MODEL_DIR), device="cpu", threads=1, cpu_kv_cache_gib=0.05, **options)


@pytest.fixture(scope="module")
def found():  # type: ignore[no-untyped-def]
    asked = config(decode_activations="bf16")
    return compare(asked, IDS, ["ptpc_fp8", "fp8_w8a16"], ["auto"], window=WINDOW, tokens=10 * WINDOW)


def test_decode_steps_read_what_prompts_do() -> None:
    """In BF16, where nothing else differs: of fewer windows at a time than there are, too."""
    text = cut(IDS, 40, 200, 1024, decoded=True)
    assert (text.decoded_from, text.decoded, text.predictions) == (20, 20, 5 * 19)
    for options in ({}, {"num_gpu_blocks_override": 8}):  # room for two windows of three blocks
        core = open_core(config(**options), REFERENCE, text)
        found = list(states_of(core.runner, text.windows, text.decoded_from))
        assert len(found) == len(text.windows) == 5
        for states, window in zip(found, text.windows, strict=True):
            assert states.shape[0] == 20
            assert relative_error(states, hidden_states(core.runner, window)[20:]) < 0.01
        assert all(torch.equal(a, b) for a, b in zip(states_of(core.runner, text.windows, 20), found, strict=True))


def test_what_it_gains(found) -> None:  # type: ignore[no-untyped-def]
    kl = {m.variant: m.kl for m in found.measured if not m.variant.ignore}
    assert set(kl) == {Variant("ptpc_fp8"), HYBRID, Variant("fp8_w8a16")}
    assert kl[Variant("fp8_w8a16")] < 1.1 * kl[HYBRID] < 0.9 * kl[Variant("ptpc_fp8")]
    assert (found.decoded, found.predictions) == (32, 10 * 31)
    assert "windows of 64 tokens, the last 32 of each by decode steps" in basis(found)
    assert len({m.weight_bytes for m in found.measured if not m.variant.ignore}) == 1


def test_its_rung_its_name_and_its_command(found, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    own = next(m for m in found.measured if m.variant == HYBRID)
    plain = [m for m in found.measured if not m.variant.ignore]
    calibrated = [replace(m, variant=replace(m.variant, calibrated="x")) for m in plain]
    steps = [(m.variant.scheme, m.variant.decode, m.variant.calibrated) for m in rungs([*plain, *calibrated])]
    assert steps == [
        (scheme, decode, made)
        for scheme, decode in (("ptpc_fp8", "auto"), ("ptpc_fp8", "bf16"), ("fp8_w8a16", "auto"))
        for made in ("", "x")
    ]
    assert name_of(HYBRID) == "ptpc_fp8 with a BF16 KV cache, BF16 activations in decode"
    assert cells(found, own)[0] == "ptpc_fp8, bf16 decode"
    chosen = replace(found, chosen=own)
    assert "--quantization ptpc_fp8 --kv-cache-dtype auto --decode-activations bf16" in command(chosen)
    write_config(tmp_path / "q.json", chosen, config())
    assert json.loads((tmp_path / "q.json").read_text())["decode_activations"] == "bf16"
    assert EngineConfig(quantization_config=str(tmp_path / "q.json")).decode_activations == "bf16"


def test_the_search_climbs_over_it(found) -> None:  # type: ignore[no-untyped-def]
    """It is tried behind its scheme, and kept while the cache and layers are looked for."""
    seen: list[Variant] = []

    def measure(variant: Variant) -> Measurement:
        seen.append(variant)
        loss = 0.2 if variant.scheme == "bf16" else 0.5 - 0.2 * (variant.decode == "bf16") - 0.25 * (variant.kv == "auto")
        return replace(found.reference, variant=variant, kl=loss)

    for limit, last in ((0.4, replace(HYBRID, kv="fp8_e4m3")), (0.1, HYBRID)):
        seen.clear()
        chosen = search(Budget(limit, False), measure, lambda scheme: [], ["ptpc_fp8"], ["fp8_e4m3", "auto"], True)
        assert chosen is not None
        assert chosen.variant == last
        assert seen[:2] == [Variant("ptpc_fp8", "fp8_e4m3"), replace(HYBRID, kv="fp8_e4m3")]
    assert not [v for v in seen if v.scheme == "ptpc_fp8" and v.decode == "auto"][1:]


def test_a_window_of_which_no_half_predicts_anything() -> None:
    with pytest.raises(OctavoError, match="second half"):
        cut(IDS, 3, None, 1024, decoded=True)
