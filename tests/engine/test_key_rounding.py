"""Keys of an FP8 cache rounded by what queries read of them: measured by calibration, read by a start, served."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LoadModel
from engine.test_core import ENGINE, LENGTH, TWELVE, run, token_ids
from engine.test_ranks import checkpoint
from safetensors.torch import load_file, save_file

from octavo import ops
from octavo.batch import Span
from octavo.config import EngineConfig
from octavo.convert.calibrated_layer import CalibratedLayer, together
from octavo.convert.key_rounding import key_rounding, read_key_rounding, write_key_rounding
from octavo.demo import HELDOUT, MODEL_DIR
from octavo.engine import model_lifecycle
from octavo.engine.block_pool import BlockPool
from octavo.engine.calibration_text import calibration_windows
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING
from octavo.models import read_config
from octavo.platform import detect
from octavo.quant import SCHEMES, QuantRules
from octavo.text.tokenizer import Tokenizer
from octavo.tools.quantize.quantize import quantize_checkpoint

OPTIONS: dict[str, Any] = dict(kv_cache_dtype="fp8", kv_cache_rounding="calibrated")


def measure(path: Path, windows: Sequence[Sequence[int]]) -> None:
    """What calibration does to keys, without its weights."""
    platform, config = detect("cpu"), read_config(path)
    ops.bind(platform)
    made, states, batches = {}, [], together(windows, platform.device)
    for number in range(config["num_hidden_layers"]):
        layer = CalibratedLayer(path, config, number, max(map(len, windows)), platform, {})
        states = layer.quantize(batches, states or [layer.embed(batch) for batch in batches])  # type: ignore[arg-type]
        assert layer.key_rounding is not None
        made[number] = layer.key_rounding
        layer.close()
    write_key_rounding(path / KEY_ROUNDING, made)


def random_rounding(path: Path, layers: int, heads: int, dim: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(layers, heads, 2 * dim, dim, generator=g) @ torch.randn(dim, dim, generator=g)
    grams = queries.mT @ queries
    write_key_rounding(path / KEY_ROUNDING, {number: key_rounding(gram) for number, gram in enumerate(grams)})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two of the same shapes, with KV heads of 16 dimensions, and with a rounding each."""
    paths = []
    for seed in range(2):
        path = tmp_path_factory.mktemp("tiny") / "model"
        paths.append(checkpoint("llama", path, seed))
        config = read_config(path)
        random_rounding(path, config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"], seed)
    return paths


def core_of(path: str, **options: Any) -> EngineCore:
    return EngineCore(EngineConfig(**dict(model=path) | ENGINE | OPTIONS | options))


def tokens_of(core: EngineCore) -> dict[str, list[int]]:
    return token_ids(run(core, TWELVE)[0])


def test_a_text_that_did_not_calibrate_is_served_more_exactly(tmp_path: Path, load_model: LoadModel) -> None:
    """KL of the demo model's FP8 cache to one in its own dtype: measured 0.72 of plain rounding's, of which a part is the
    values', which are rounded as before."""
    path = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    measure(path, calibration_windows(path, "default", 2048))
    ids = Tokenizer(path).encode(HELDOUT.read_text("utf-8"))
    parts = [ids[at : at + 150] for at in range(0, 6000, 1000)]
    own, nearest, calibrated = (load_model(path, kv=kv) for kv in ("auto", "fp8_e4m3", "fp8_e4m3"))
    calibrated.model.set_key_rounding(partial(read_key_rounding, path), check_only=False)
    calibrated.model.bind_cache(calibrated.cache.views)
    exact = [own.logits(part).log_softmax(-1) for part in parts]

    def kl(loaded: Any) -> float:
        found = [loaded.logits(part).log_softmax(-1) for part in parts]
        return float(sum((p.exp() * (p - q)).sum(-1).mean() for p, q in zip(exact, found, strict=True)))

    assert kl(calibrated) < 0.85 * kl(nearest)


def test_a_key_has_the_same_codes_however_it_came(tiny: list[str], load_model: LoadModel) -> None:
    """In a prompt, in parts of one, alone: of the first layer, whose keys are the same numbers then."""
    loaded = load_model(Path(tiny[0]), kv="fp8_e4m3", on=detect("cpu"))
    loaded.model.set_key_rounding(partial(read_key_rounding, Path(tiny[0])), check_only=False)
    loaded.model.bind_cache(loaded.cache.views)
    ids = TWELVE[1].prompt_token_ids
    found = []
    for chunks in ((len(ids),), (20, len(ids) - 20), (1,) * len(ids)):
        start = 0
        for length in chunks:
            loaded.hidden([Span(ids[start : start + length], start, range(1, 20))])
            start += length
        found.append(loaded.cache.views[0]["k"].view(torch.uint8)[1 : 1 + len(ids) // 4].clone())
    assert found[0].any()
    assert all(one.equal(found[0]) for one in found[1:])


def test_prefixes_preemption_and_recorded_steps_change_nothing(tiny: list[str]) -> None:
    core = core_of(tiny[0])
    expected = tokens_of(core)
    assert any("keys are rounded by what queries read" in line for line in core.info.report)
    assert "keys are rounded by what queries read" in ops.table()["attend"]
    again, sums = run(core, TWELVE)
    assert sums.prefix_cache_hits > 50
    assert token_ids(again) == expected
    core.scheduler = Scheduler(BlockPool(26, 4, True), 256, 23, LENGTH)
    parts, sums = run(core, TWELVE, apart=1)
    assert sums.num_preemptions
    differ = [name for name, ids in token_ids(parts).items() if ids != expected[name]]
    assert len(differ) <= 1  # FP8 lets one in twelve differ, as in test_company_changes_nothing
    assert tokens_of(core_of(tiny[0], enforce_eager=True)) == expected
    assert tokens_of(core_of(tiny[0], kv_cache_rounding="nearest")) != expected


def test_sleep_and_reload_take_the_rounding_with_them(tiny: list[str], tmp_path: Path) -> None:
    """A checkpoint without one is refused, and the old one stays."""
    core = core_of(tiny[0])
    first = tokens_of(core)
    core.sleep()
    core.wake()
    assert tokens_of(core) == first
    bare = shutil.copytree(tiny[1], tmp_path / "bare", ignore=shutil.ignore_patterns(KEY_ROUNDING))
    with pytest.raises(OctavoError, match=f"{KEY_ROUNDING}, which .*bare does not have"):
        core.reload(str(bare))
    assert tokens_of(core) == first
    core.reload(tiny[1])
    assert tokens_of(core) == tokens_of(core_of(tiny[1])) != first


def test_layers_in_another_dtype_are_not_rounded(tiny: list[str]) -> None:
    layers = core_of(tiny[0], kv_cache_dtype_skip_layers=("0",)).runner.model.attention_layers()  # type: ignore[attr-defined]
    assert [layer.cache.key_rounding is None for layer in layers] == [True] + [False] * (len(layers) - 1)


def test_what_is_refused(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = shutil.copytree(tiny[0], tmp_path / "bare", ignore=shutil.ignore_patterns(KEY_ROUNDING))
    torn, other = (shutil.copytree(tiny[0], tmp_path / name) for name in ("torn", "other"))
    (torn / KEY_ROUNDING).write_bytes((torn / KEY_ROUNDING).read_bytes()[:-9])
    random_rounding(other, read_config(other)["num_hidden_layers"], 3, 16)
    faults: list[tuple[Any, dict[str, Any], str]] = [
        (bare, {}, f"needs {KEY_ROUNDING}, which .* does not have; write it with octavo quantize --calibrate"),
        (torn, {}, f"{KEY_ROUNDING} cannot be read"),
        (other, {}, "rounding of keys is for 3 KV heads of 16, and the model has others"),
        (tiny[0], dict(kv_cache_dtype="auto"), "is for an FP8 cache with one scale a layer or head, not for .* auto"),
        (tiny[0], dict(kv_cache_dtype="fp8_per_token_head"), "not for .* fp8_per_token_head"),
        (tiny[0], dict(kv_cache_rounding="best"), "best"),
    ]
    for path, options, sentence in faults:
        with pytest.raises(OctavoError, match=sentence) as caught:
            core_of(str(path), **options)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(model_lifecycle, "load_model", lambda *_: pytest.fail("weights were read first"))
    with pytest.raises(OctavoError, match=faults[0][2]):
        core_of(str(bare))


@pytest.mark.parametrize("scheme", ["fp8", "ptpc_fp8"])
def test_a_checkpoint_made_of_one_that_has_it_has_it_too(tiny: list[str], scheme: str, tmp_path: Path) -> None:
    """Written by `octavo quantize`, and by a start: keys are rounded the same whatever codes the weights have."""
    made, saved = tmp_path / "made", tmp_path / "saved"
    quantize_checkpoint(Path(tiny[0]), made, QuantRules(SCHEMES[scheme]), threads=1, say=lambda line: None)
    found = tokens_of(core_of(str(made)))
    assert (made / KEY_ROUNDING).read_bytes() == (Path(tiny[0]) / KEY_ROUNDING).read_bytes()
    assert found == tokens_of(core_of(tiny[0], quantization=scheme, save_quantized=str(saved)))
    assert found == tokens_of(core_of(tiny[0], quantization=scheme, save_quantized=str(saved)))  # from what is there
    assert found != tokens_of(core_of(str(made), kv_cache_rounding="nearest"))


def test_values_that_no_calibration_writes_are_refused(tiny: list[str], tmp_path: Path) -> None:
    """Kernels would read and write at the indices of `order` whatever they are: a file from elsewhere must not crash an engine,
    nor make keys NaN."""
    path = shutil.copytree(tiny[0], tmp_path / "other") / KEY_ROUNDING
    right = load_file(path)
    influence, order = right["1.influence"], right["1.order"]
    once, shapes = "order does not name each dimension once", "influence has shape .* and order"
    faults: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"1.order": order + 1}, once),
        ({"1.order": order - 1}, once),
        ({"1.order": order + (1 << 20)}, once),
        ({"1.order": torch.zeros_like(order)}, once),
        ({"1.order": order.float()}, "order torch.float32"),
        ({"1.order": torch.tensor(3, dtype=torch.int32)}, shapes),
        ({"1.order": order[0].contiguous()}, shapes),
        ({"1.influence": torch.tensor(1.0)}, shapes),
        ({"1.influence": influence.half()}, "influence is torch.float16"),
        ({"1.influence": influence.clone().index_fill_(2, torch.tensor(3), torch.nan)}, "influence has NaN or infinity"),
    ]
    for changed, sentence in faults:
        save_file(right | changed, path)
        with pytest.raises(OctavoError, match=f"{KEY_ROUNDING} holds no rounding of layer 1's keys: .*{sentence}"):
            core_of(str(path.parent))
    save_file(right, path)
    core_of(str(path.parent))


def test_the_file_has_what_is_described(tiny: list[str]) -> None:
    config, found = read_config(Path(tiny[0])), load_file(Path(tiny[0]) / KEY_ROUNDING)
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    assert found.keys() == {f"{n}.{name}" for n in range(config["num_hidden_layers"]) for name in ("influence", "order")}
    for name, tensor in found.items():
        kind = (torch.float32, (heads, dim, dim)) if name.endswith("influence") else (torch.int32, (heads, dim))
        assert (tensor.dtype, tuple(tensor.shape)) == kind
    for head in range(heads):
        influence, order = found["0.influence"][head], found["0.order"][head].long()
        assert order.sort().values.equal(torch.arange(dim))
        assert not influence[:, order].tril().any()
