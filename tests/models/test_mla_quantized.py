"""Models with MLA in FP8, weights, activations and caches, over 1, 2 and 4 ranks: logits against transformers' with the same
values put through codes in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from cases import cases
from conftest import VOCAB, Loaded, LoadModel, relative_error, tokens
from models.test_logits import deepseek_v3, deepseek_v32, glm_moe_dsa
from models.test_mla_checkpoints import wide
from models.test_moe_quantized import FakeExperts
from models.test_quantized import BOUND, CPU, SCHEMES, FakeQuantized, fake_quantize, logits, octavo_logits
from quant.float64 import E4M3FN, array, group_of
from ranks import run_ranks
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo import batch
from octavo.distributed import TensorParallel
from octavo.engine.vocabulary import Vocabulary
from octavo.quant import BF16, Scheme

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "deepseek_v3": (deepseek_v3, {}),
    "deepseek_v32": (deepseek_v32, dict(index_topk=3)),  # of contexts up to 6
    "glm_moe_dsa": (glm_moe_dsa, dict(index_topk=3, indexer_types=["full", "shared"])),
}
KEPT = ("lm_head", "kv_b_proj", "weights_proj")  # linear layers that no scheme quantizes
ROW_PARALLEL = ("o_proj", "down_proj")  # whose inputs are split over ranks, each of which scales its part


def through_codes(x: Tensor, *, rounded: bool = True) -> Tensor:
    """x [..., K] as the cache's codes have it: of 128 values each one scale, a power of two; not `rounded`: no such."""
    k = x.shape[-1]
    groups = array(nn.functional.pad(x, (0, -k % 128)).reshape(-1, 128))
    scale = np.maximum(np.abs(groups).max(1, keepdims=True), 1e-4) / 448
    if rounded:
        scale = 2.0 ** np.ceil(np.log2(scale))
    values = torch.from_numpy(E4M3FN.values[E4M3FN.nearest(groups / scale)] * scale)
    return values.reshape(*x.shape[:-1], -1)[..., :k].to(x.dtype)


def transformed(x: Tensor) -> Tensor:
    """float64 x [..., D] times the orthogonal matrix whose entry's sign is the parity of the bits that row and column share."""
    numbers = np.arange(x.shape[-1])
    signs = [[(-1.0) ** int(i & j).bit_count() for j in numbers] for i in numbers]
    return x.double() @ torch.tensor(signs, dtype=torch.float64) * x.shape[-1] ** -0.5


def fake_choice(
    self: Any, x: Tensor, q: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, *_: Any, last: int = 0, **__: Any
) -> Tensor:
    """transformers' indexer, with its queries and keys transformed and put through codes; of the `last` tokens, or of all."""
    module, width = sys.modules[type(self).__module__], self.qk_rope_head_dim
    split = hasattr(module, "apply_rotary_pos_emb")
    turn = module.apply_rotary_pos_emb if split else module.turned
    query, key = self.wq_b(q).unflatten(-1, (self.n_heads, -1)), self.k_norm(self.wk(x)).unsqueeze(2)
    turned = turn(query[..., :width], key[..., :width], *angles, unsqueeze_dim=2)
    if not split:  # it sorts pairs' first and second values, which a rotation in place leaves where they are
        turned = [torch.stack(part.chunk(2, -1), -1).flatten(-2) for part in turned]
    query, key = (torch.cat([a, b[..., width:]], -1) for a, b in zip(turned, (query, key), strict=True))
    query, key = through_codes(transformed(query[:, -last:])), through_codes(transformed(key.squeeze(2)))
    scores = torch.einsum("bshd,btd->bsht", query, key).relu()
    scores = torch.einsum("bsht,bsh->bst", scores, self.weights_proj(x[:, -last:]).double())
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.topk(min(self.index_topk, scores.shape[-1]), -1).indices.int()


def fake_cache(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, *, rounded: bool = True) -> None:
    """Latents and index keys as `fp8_ds_mla` stores them, the rotated part of keys in BF16."""
    module = sys.modules[type(model).__module__]
    if not hasattr(module, "turned"):
        turn = module.apply_rotary_pos_emb_interleave
        monkeypatch.setattr(module, "turned", turn, raising=False)

        def in_bf16(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
            q, k = turn(q, k, *rest, **options)
            return q, k.bfloat16().float()

        monkeypatch.setattr(module, "apply_rotary_pos_emb_interleave", in_bf16)
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.register_forward_hook(lambda _, __, out: through_codes(out, rounded=rounded))
        if getattr(layer.self_attn, "indexer", None) is not None:
            layer.self_attn.indexer.forward = MethodType(fake_choice, layer.self_attn.indexer)


def fake_linears(model: PreTrainedModel, scheme: str) -> None:
    fake_quantize(model, scheme, but=KEPT)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = FakeExperts(layer.mlp.experts, scheme)


def split_scales(model: PreTrainedModel, scheme: str, ranks: int) -> None:
    """Inputs of what is split by columns have scales of a rank's part."""
    found = [
        module for name, module in model.named_modules() if isinstance(module, FakeQuantized) and name.endswith(ROW_PARALLEL)
    ]
    found += [one[2] for module in model.modules() if isinstance(module, FakeExperts) for one in module.experts]
    for module in found:
        module.group = group_of(scheme, module.weight.shape[1] // ranks)


def error(out: Tensor, expected: Tensor) -> float:
    """The median over the last three positions of each row, where attention may be sparse: at some, a value lies between two
    codes and goes the other way, as test_quantized says."""
    pairs = zip(out[:, -3:].flatten(0, 1), expected[:, -3:].flatten(0, 1), strict=True)
    return median(relative_error(a, b) for a, b in pairs)


@cases("scheme", [BF16, *SCHEMES], ids=lambda s: s.name)
@cases("family", FAMILIES)
def test_logits_equal_a_fake_quantized_model(
    family: str, scheme: Scheme, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, changes = FAMILIES[family]
    model = wide(tmp_path, make, **changes)
    dense = logits(model)
    if scheme is not BF16:
        fake_linears(model, scheme.name)
    few, many = (2,), (1, 4)
    for kv, splits in zip(("auto", "fp8_e4m3"), (few, many) if scheme.activation is None else (many, few), strict=True):
        if kv != "auto":
            fake_cache(model, monkeypatch)
        for ranks in splits:
            split_scales(model, scheme.name, ranks)
            expected = logits(model)

            def run(tp: TensorParallel, kv: str = kv) -> Tensor:
                loaded = load_model(tmp_path, scheme, kv, on=CPU, tp=tp)
                return Vocabulary(VOCAB, tp).whole(octavo_logits(loaded).flatten(0, 1)).unflatten(0, (-1, 6))

            for out in run_ranks(ranks, run):
                assert error(out, expected) < BOUND, (kv, ranks)
            if scheme is not BF16 or kv != "auto":
                assert error(expected, dense) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_over_an_fp8_cache(
    family: str, tmp_path: Path, load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token and in parts, as all at once: what float64 makes of the same codes. Scales that are no powers of two, and
    scales that are twice what they should be, would be seen."""
    make, changes = FAMILIES[family]
    model = wide(tmp_path, make, **(changes | ({} if family == "deepseek_v3" else dict(index_topk=20))))
    ids = tokens(60)

    def reference() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([ids])).logits
        return found

    dense = reference()
    fake_cache(model, monkeypatch)
    expected = reference()
    loaded: Loaded = load_model(tmp_path, kv="fp8_e4m3", on=CPU)
    for parts in ((60,), (1,) * 60, (1, 30, 1, 28)):
        assert error(loaded.logits(ids, parts).unflatten(0, (-1, 3)), expected.view(20, 3, -1)) < BOUND
    assert error(expected, dense) > 0.01
    last = batch.Span(ids[-1:], 59, list(range(1, 16)))
    for factor, seen in ((1.0, False), (2.0, True)):
        for views in loaded.cache.views:
            if "scale" in views:
                views["scale"].mul_(factor)
        with torch.inference_mode():
            found = loaded.model.logits(loaded.hidden([last]))
        assert (error(found[None], expected[:, -1:]) > 0.05) == seen
    model = wide(tmp_path, make, **(changes | ({} if family == "deepseek_v3" else dict(index_topk=20))))
    fake_cache(model, monkeypatch, rounded=False)
    assert error(reference(), expected) > 0.01
