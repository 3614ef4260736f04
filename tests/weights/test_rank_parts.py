"""What ranks hold together is what one holds, code by code: shapes that do not divide, tiles and groups, experts whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error, tokens
from models.test_kimi import kimi, write
from models.test_logits import deepseek_v3, glm4_moe, llama, minimax_m2, mixtral, qwen3_moe, randomize
from models.test_quantized import CPU
from models.test_qwen3_vl import qwen3_vl
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from weights.test_stacked_experts import rewritten, stack

from octavo import batch, ops
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.kvcache import KVCache, Layout
from octavo.models import build_model, read_config
from octavo.quant import BF16, FP8_BLOCK, QTensor, QuantRules, Scheme, quantize
from octavo.quant.formats import WHOLE, Shard
from octavo.quant.scheme import BLOCK, SCHEMES, Granularity
from octavo.weights import Loader, SafetensorsSource, load
from octavo.weights.checkpoint import Checkpoint, StoredTensor
from octavo.weights.parts_of_codes import PartsOfCodes
from octavo.weights.transfer import Transfer

# Tiles of 128 that four ranks do not share evenly, or that are fewer than they; a head is a tile.
WIDE = dict(hidden_size=256, intermediate_size=712, head_dim=128, num_hidden_layers=2)
EXPERTS = WIDE | dict(moe_intermediate_size=300)
MLA = dict(
    hidden_size=256, intermediate_size=712, moe_intermediate_size=300, num_hidden_layers=2, qk_nope_head_dim=96,
    qk_rope_head_dim=32, v_head_dim=128, num_key_value_heads=4, n_routed_experts=7, n_group=1, topk_group=1,
)  # fmt: skip
MAKE: dict[str, Any] = {
    "llama": lambda: llama(**WIDE),
    "qwen3_moe": lambda: qwen3_moe(**EXPERTS),
    "mixtral": lambda: mixtral(**WIDE | dict(intermediate_size=300, num_local_experts=7)),
    "glm4_moe": lambda: glm4_moe(**EXPERTS | dict(n_shared_experts=2)),
    "minimax_m2": lambda: minimax_m2(**WIDE | dict(intermediate_size=300, rotary_dim=64)),
    "deepseek_v3": lambda: deepseek_v3(**MLA),
}
MIXTURES = tuple(MAKE)[1:]


@dataclass
class Part:
    shard: Shard
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None
    scheme: Scheme = BF16

    @property
    def slice(self) -> slice:
        return self.shard.slice(self.shape[self.shard.dim])


@dataclass
class Noting(Loader):
    """A Loader that keeps what it gave, by name."""

    parts: dict[str, Part] = field(default_factory=dict)

    def stored(self, name: str, shape: tuple[int, int], shard: Shard, scheme: Scheme, codes: PartsOfCodes) -> QTensor:
        q = super().stored(name, shape, shard, scheme, codes)
        self.parts[f"{self.prefix}{name} {shard.within}"] = Part(shard, shape, q.data, q.scale, q.scheme)
        return q

    def vector(self, name: str, shape: Sequence[int], shard: Shard = WHOLE, *, dtype: torch.dtype | None = None) -> Tensor:
        found = super().vector(name, shape, shard, dtype=dtype)
        self.parts[f"{self.prefix}{name} {shard.within}"] = Part(shard, tuple(shape), found)
        return found

    def dense(self, name: str, shape: tuple[int, int], shard: Shard = WHOLE) -> Tensor:
        found = super().dense(name, shape, shard)
        self.parts[f"{self.prefix}{name}"] = Part(shard, shape, found)
        return found


def loaded(directory: Path, tp: TensorParallel, rules: QuantRules, *, vision: bool = False) -> tuple[Noting, Tensor]:
    """The loader, after it gave one rank's parts, and logits of all of the vocabulary."""
    model = build_model(read_config(directory), tp, 512, vision=vision)
    loader = Noting(SafetensorsSource(directory), CPU, rules, torch.float32, tp)
    load(model, loader, model.ignored)  # type: ignore[arg-type]
    cache = KVCache(model.kv_specs("auto", torch.float32, CPU.fp8_dtype, Layout.on(True)), 20, 4, CPU.device)
    model.bind_cache(cache.views)
    ids = tokens(40)
    with torch.inference_mode():
        built = batch.build([batch.Span(ids, 0, range(1, 12))], 4, CPU.device)
        hidden = model(built, model.embed(built.input_ids))
        return loader, Vocabulary(model.limits().vocab_size, tp).whole(model.logits(hidden)).float()  # type: ignore[arg-type]


def assert_parts_are_the_whole(one: dict[str, Part], ranks: list[dict[str, Part]]) -> None:
    """Codes and scales, bit for bit, so to the byte; what several ranks have is the same on each."""
    assert {name for rank in ranks for name in rank} == set(one)
    for name, whole in one.items():
        pieces: dict[tuple[int, int], Part] = {}
        for part in (rank[name] for rank in ranks if name in rank):
            same = pieces.setdefault((part.slice.start, part.slice.stop), part)
            assert equal(same.data, part.data), name
            assert same.scale is None or torch.equal(same.scale, part.scale), name  # type: ignore[arg-type]
        ordered = [piece for at, piece in sorted(pieces.items()) if at[0] < at[1]]
        dim = ordered[0].shard.dim
        assert equal(torch.cat([p.data.view(torch.uint8) for p in ordered], dim).view(whole.data.dtype), whole.data), name
        assert {p.scheme for p in ordered} == {whole.scheme}, name
        if whole.scale is None:
            continue
        if whole.scheme.weight in (Granularity.BLOCK, Granularity.GROUP) or dim == 0:
            assert torch.equal(torch.cat([p.scale for p in ordered], dim), whole.scale), name  # type: ignore[misc]
        else:
            assert all(torch.equal(p.scale, whole.scale) for p in ordered), name  # type: ignore[arg-type]


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(
    path: Path,
    sizes: Sequence[int],
    scheme: Scheme = BF16,
    *,
    whole_experts: bool = False,
    vision: bool = False,
    ignore: tuple[str, ...] = (),
    head: bool = False,
) -> None:
    def on(tp: TensorParallel) -> tuple[Noting, Tensor]:
        return loaded(path, replace(tp, expert_parallel=whole_experts), QuantRules(scheme, ignore, head), vision=vision)

    ops.bind(CPU)
    one, logits = on(TensorParallel())
    bound = 1e-5 if all(part.scale is None for part in one.parts.values()) else 0.1  # a last bit of a sum may turn a code
    for size in sizes:
        found = run_ranks(size, on)
        assert_parts_are_the_whole(one.parts, [loader.parts for loader, _ in found])
        for rank, (loader, theirs) in enumerate(found):
            assert loader.report.total("parameters") == one.report.total("values"), (size, rank)
            if scheme in (BF16, FP8_BLOCK):  # else a rank's activations have scales of their own
                assert relative_error(theirs, logits) < bound, (size, rank)
        if whole_experts:
            held = [{n for n in loader.parts if ".experts." in n} for loader, _ in found]
            assert sum(map(len, held)) == len(set().union(*held)), "each expert is on one rank"


def saved(make: Any, path: Path) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = randomize(make())
    model.bfloat16().save_pretrained(path)
    return path


def in_tiles(path: Path) -> Path:
    """The checkpoint in DeepSeek's format: matrices of layers in FP8 with a scale a tile."""
    tensors = load_file(path / "model.safetensors")
    for name in [
        n for n in tensors if ".layers." in n and tensors[n].dim() == 2 and not n.endswith(("gate.weight", "kv_b_proj.weight"))
    ]:
        q = quantize(tensors[name], FP8_BLOCK)
        tensors[name], tensors[f"{name}_scale_inv"] = q.data, q.scale  # type: ignore[assignment]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", MAKE)
def test_parts_are_the_whole(name: str, tmp_path: Path) -> None:
    path = saved(MAKE[name], tmp_path)
    for scheme in SCHEMES.values() if name in ("qwen3_moe", "deepseek_v3") else (BF16, FP8_BLOCK):
        check(path, (2, 4), scheme)
    if name in MIXTURES:
        check(path, (2, 4), SCHEMES["fp8"], whole_experts=True)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_tiles_stay_whole(name: str, tmp_path: Path) -> None:
    """Stored codes, of tiles that ranks share unevenly, and of which the last rank of four gets none."""
    path = in_tiles(saved(MAKE[name], tmp_path))
    check(path, (2, 4))
    if name in MIXTURES:
        check(path, (2, 4), whole_experts=True)


def test_groups_of_int4_stay_whole(tmp_path: Path) -> None:
    """Three groups of 32 over two and four ranks."""
    write(tmp_path, kimi(moe_intermediate_size=96), int4=True)
    for whole_experts in (False, True):
        check(tmp_path, (2, 4), whole_experts=whole_experts, vision=True)


def test_towers_and_odd_widths_are_split(tmp_path: Path) -> None:
    check(saved(lambda: qwen3_vl(intermediate_size=137), tmp_path), (2, 4), vision=True)


def test_vocabularies_that_do_not_divide_are_split(tmp_path: Path) -> None:
    """In whole tiles, which the head has; of a head of its own, and of one that is the embedding."""
    for tied in (False, True):
        path = saved(lambda: llama(**WIDE, vocab_size=1000, tie_word_embeddings=tied), tmp_path / str(tied))  # noqa: B023
        for scheme in SCHEMES.values():
            check(path, (2, 4), scheme, head=True)


def test_experts_whole_as_checkpoints_store_them(tmp_path: Path) -> None:
    """Stacked either way round; left out by a pattern that names one of another rank; and those that no rank has are not taken
    for another's."""
    path = saved(lambda: qwen3_moe(), tmp_path / "one")
    for turned in (False, True):
        other = rewritten(path, tmp_path / f"turned {turned}", lambda found: stack(found, "qwen3_moe", turned))  # noqa: B023
        for whole_experts in (False, True):
            check(other, (2, 4), whole_experts=whole_experts)
    check(path, (2,), SCHEMES["ptpc_fp8"], whole_experts=True, ignore=("experts.6.down_proj",))
    extra = rewritten(path, tmp_path / "extra", lambda found: found | {EXTRA: torch.ones(40, 64).bfloat16()})
    for rank in range(2):
        with pytest.raises(OctavoError, match=rf"does not have, the first is {re.escape(EXTRA)}"):
            loaded(extra, TensorParallel(rank, 2, None, True), QuantRules())


def test_each_rank_reads_its_slices_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the reader: a part of each matrix, and all of what every rank has. As accelerators read, and mapped on a CPU;
    of dense layers, and of experts stacked with inputs first."""
    even = WIDE | dict(num_key_value_heads=4, vocab_size=1024)
    dense = saved(lambda: llama(**even | dict(intermediate_size=768)), tmp_path / "dense")
    experts = saved(lambda: qwen3_moe(**even | dict(moe_intermediate_size=256)), tmp_path / "experts")
    turned = rewritten(experts, tmp_path / "turned", lambda found: stack(found, "qwen3_moe", True))

    def transferred(checkpoint: Checkpoint, tensor: StoredTensor, dim: int, part: slice) -> Tensor:
        transfer = Transfer(checkpoint, torch.device("cpu"))
        try:
            return transfer.read(tensor, dim, part)
        finally:
            transfer.close()

    def bytes_read(path: Path, tp: TensorParallel) -> int:
        loader, _ = loaded(path, tp, QuantRules())
        assert isinstance(loader.source, SafetensorsSource)
        return loader.source.bytes_read

    for path in (dense, experts, turned):
        ops.bind(CPU)
        tensors = Checkpoint(path).tensors.values()
        whole = sum(t.nbytes for t in tensors if len(t.shape) == 1 or t.name.endswith("mlp.gate.weight"))
        for size in (1, 2, 4):
            expected = whole + (sum(t.nbytes for t in tensors) - whole) // size
            for on_accelerators in (True,) if path is turned else (True, False):
                with monkeypatch.context() as patch:
                    if on_accelerators:
                        patch.setattr(Checkpoint, "mapped", transferred)
                    found = run_ranks(size, lambda tp: bytes_read(path, tp))  # noqa: B023
                assert found == [expected] * size, (path.name, size, on_accelerators)


EXTRA = "model.layers.0.mlp.experts.7.gate_proj.weight"
