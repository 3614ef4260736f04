"""Prints docs/compatibility.md: which models are served with FP8 weights and an FP8 KV cache, and what that means for each.

    python scripts/compatibility.py > docs/compatibility.md

The numbers are of the models' own caches, built from their published configs. `tests/models/test_compatibility.py` serves a
tiny model of every architecture of which the page says yes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from octavo.distributed import TensorParallel
from octavo.kvcache import KVCacheSpec, Layout
from octavo.models import MODEL_TYPES, build_model
from octavo.models.published import KNOWN
from octavo.quant.stored_format import stored_format_of

HEAD = """\
# Which models, in FP8

What `octavo serve MODEL --quantization fp8 --kv-cache-dtype fp8` does with the models that it knows by name; others of the same
`model_type` are served alike. "FP8" means every scheme (`fp8`, `ptpc_fp8`, `fp8_block`), experts included, but those that are
stored in INT4; "FP8 KV" is the format of the cache and what a token takes in it, in all layers, beside what it takes in BF16.
Printed by `python scripts/compatibility.py`; a test serves a tiny random model of each architecture that says yes, with both
flags, and those that read images with a picture: with both flags, with either and with none.

Where a model needs several devices (`octavo plan` says), yes is of its architecture and formats: ranks ran on CPUs.

| model | `model_type` | FP8 | FP8 KV | note |
|---|---|---|---|---|
"""
TAIL = """
## Qwen3-VL in FP8

Yes, with its vision tower, and so is Kimi-K2.5. The MLP of both towers has 4,304 inner dimensions, which over 8 ranks are 538
for each. Libraries' FP8 products take multiples of 16 alone, and an engine that hands them such a part fails with `mat2 shape
(1152x538) must be divisible by 16`. Octavo splits the rows in units of 16, five ranks have 544 and three 528; what is
no such multiple even so is padded inside the stored weight, and no layer above knows.
`tests/models/test_vision.py::test_what_is_not_divisible_by_16` has the library's refusal for 2, 4 and 8 ranks beside Octavo's
result. An FP8 KV cache is the text model's: image tokens have keys and values as others have.

- `--quantization-ignore 'model.visual.*'` leaves Qwen3-VL's tower in BF16, `'vision_tower.*' 'mm_projector.*'` Kimi's: 0.6 GB
  more on one device.
- `--language-model-only` serves text alone and loads no tower.
- With `fp8_block`, tiles of a rank's part are its own; a tower that a checkpoint *stores* in tiles does not split over ranks
  where a part would begin within a tile (4,304 is no multiple of 128), and a sentence says so.

## MLA models with `--kv-cache-dtype fp8`

They are served. All heads' keys and values in an MLA model (DeepSeek-V3, R1, V3.2, Kimi-K2, K2.5) are made of one latent a
token, and the FP8 format of such a cache is `fp8_ds_mla`: 512 codes, 4 FP32 scales, powers of two, each for 128 of the codes,
and the rotated part of the key in BF16. That is 656 bytes a token a layer at DeepSeek's sizes, where BF16 takes 1,152. So
`fp8`, `fp8_e4m3` and `fp8_ds_mla` mean the same on them, and the start says it:

```
KV cache: fp8_ds_mla (what --kv-cache-dtype fp8 means here) and FP8 index keys, 656 + 132 bytes a token a layer, …
```

- `auto` is the model's dtype on V3, R1 and Kimi's. On V3.2 in BF16 it is `fp8_ds_mla`, too. The keys of V3.2's indexer are
  FP8, 128 codes and a scale, whatever the latents are; with `--dtype float32` and `auto` all of it is FP32.
- `fp8_e5m2`, `fp8_per_token_head` and `--kv-cache-rounding calibrated` have no meaning for latents, and `--calculate-kv-scales`
  has nothing to measure: each is refused in a sentence before weights are read. KV scales in a checkpoint are not used, and a
  note says so.
- `fp8_ds_mla` on a model without MLA is refused; `fp8` is what it has.
"""
NOTES = {
    "deepseek_v32": "`auto` is `fp8_ds_mla`, too; MLA, sparse; routers and kv_b_proj stay in BF16; MTP layers are not loaded",
    "mixtral": "routers stay in BF16",
    "qwen3_moe": "routers stay in BF16",
    "qwen3_vl": "images, the tower in FP8 too",
    "qwen3_vl_moe": "images, the tower in FP8 too; routers stay in BF16",
    "glm4_moe": "routers stay in BF16; MTP layers are not loaded",
    "minimax_m2": "routers stay in BF16; MTP layers are not loaded",
    "deepseek_v3": "MLA; routers and kv_b_proj stay in BF16; MTP layers are not loaded",
    "glm_moe_dsa": "`auto` is `fp8_ds_mla`, too; MLA, sparse; routers and kv_b_proj stay in BF16; MTP layers are not loaded",
    "kimi_k2": "MLA; routers and kv_b_proj stay in BF16",
    "kimi_k25": "images, the tower in FP8 with `--quantization`; MLA; routers and kv_b_proj stay in BF16",
}
BLOCKS = "published in FP8 blocks, whose codes are kept"
INT4 = "experts published in INT4, whose codes are kept, with `--quantization` and without"


class Row(NamedTuple):
    model: str
    model_type: str
    fp8: str
    kv: str
    note: str


def rows() -> Iterator[Row]:
    """A row for each model that is known by name."""
    for name, config in KNOWN.items():
        kind = config["model_type"]
        if kind not in MODEL_TYPES:
            yield Row(name, f"`{kind}`", "not yet", "not yet", "not served yet; `octavo plan` describes it")
            continue
        with torch.device("meta"):
            model = build_model(config, TensorParallel(), 4096)
        fp8, bf16 = (
            model.kv_specs(asked, torch.bfloat16, torch.float8_e4m3fn, Layout.PLAIN) for asked in ("fp8_e4m3", "bfloat16")
        )
        stored_format = stored_format_of(config)
        notes = [NOTES.get(kind), stored_format and (BLOCKS if stored_format.scheme else INT4)]
        size = f"{_kib(fp8)} of {_kib(bf16)} KiB a token"
        yield Row(name, f"`{kind}`", "yes", f"yes: `{next(_names(fp8))}`, {size}", "; ".join(filter(None, notes)))


def _names(specs: list[KVCacheSpec]) -> Iterator[str]:
    """What the formats are called, that of a row of latents first."""
    return iter(dict.fromkeys(spec.name for spec in sorted(specs, key=lambda spec: not spec.interleaved)))


def _kib(specs: list[KVCacheSpec]) -> str:
    return f"{sum(spec.bytes_per_token for spec in specs) / 1024:.1f}"


def page() -> str:
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows()) + TAIL


if __name__ == "__main__":
    print(page(), end="")
