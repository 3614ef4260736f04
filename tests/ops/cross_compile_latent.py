"""What cross_compile.py compiles of attention over latents: as the wrappers launch it for DeepSeek-V3, with 16 heads a rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from octavo.kvcache import latent_spec
from octavo.ops.triton import expanded_attention, latent_attention, launch

__all__ = ["latent_kernels"]

Kernel = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]
BLOCK_SIZE, RANK, ROPE = 64, 512, 64


def _strides(fp8: torch.dtype | None) -> dict[str, Any]:
    """Of a cache with blocks of 64 tokens."""
    kv, dtype = ("fp8_ds_mla", fp8) if fp8 else ("bfloat16", torch.float8_e4m3fn)
    spec = latent_spec(kv, RANK, ROPE, torch.bfloat16, dtype)
    views = spec.views(torch.zeros(1, BLOCK_SIZE * spec.bytes_per_token, dtype=torch.uint8), BLOCK_SIZE)
    found = {f"{name.upper()}_STRIDES": view.stride()[:2] for name, view in views.items()}
    return {"SCALE_STRIDES": (0, 0)} | found | {"BLOCK_SIZE": BLOCK_SIZE}


def latent_kernels(fp8: str, pdl: bool) -> Iterator[Kernel]:
    """As `kernels` of cross_compile.py."""
    fp32, bf16, i32 = "*fp32", "*bf16", "*i32"
    fnuz = fp8 == "*fp8e4b8"
    for name, kind, rows, chosen, tiled in (
        ("fp8", fp8, 16, False, False), ("fp8_chosen", fp8, 16, True, False), ("fp8_many", fp8, 128, False, True),
        ("bf16", bf16, 16, False, False), ("bf16_chosen", bf16, 16, True, False), ("bf16_many", bf16, 128, False, True),
    ):  # fmt: skip
        c = latent_attention._shape(rows, 1 if kind == fp8 else 2)
        codes = kind == fp8
        given = {"scales": codes, "chosen": chosen, "tiles": tiled, "token_requests": False}
        types = dict(q=bf16, latent=kind, rope=bf16, scales=fp32, tables=i32, seq_lens=i32, starts=i32, tiles=i32, chosen=i32,
                     token_requests=i32, positions="*i64", out=bf16, parts=fp32, sums=fp32, qk_scale="fp32", table_width="i32",
                     top_k="i32", rows_in_all="i32")  # fmt: skip
        chunk = c["chunk"]
        yield (
            f"latent_attention_{name}", latent_attention._latent_attention,
            {p: one for p, one in types.items() if given.get(p, True)},
            dict(HEADS=16, ROWS=c["ROWS"], RANK=RANK, CHUNK=chunk, CHUNKS=RANK // chunk, D=ROPE, DP=ROPE, TILE=c["TILE"],
                 TILED=tiled, CHOSEN=chosen, MULTI_TOKEN=False, SPLIT=True, ROWS_FIRST=bool(c["first"]),
                 CODE=(tl.float8e4b8 if fnuz else tl.float8e4nv) if codes else tl.bfloat16,
                 LIMIT=(224.0 if fnuz else 448.0) if codes else 1.0, ROPE_CODE=tl.bfloat16, ASM=pdl,
                 STAGES=launch.pipeline(c["stages"]), PDL=pdl,
                 **_strides((torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn) if codes else None),
                 **dict.fromkeys(p for p, there in given.items() if not there)),
            {"num_warps": c["warps"]},
        )  # fmt: skip
    yield (
        "latent_merge", latent_attention._merge, dict(parts=fp32, sums=fp32, out=bf16, rows_in_all="i32", splits="i32"),
        dict(RANK=RANK, RP=RANK, SPLITS=64, GROUP=8, PDL=pdl), {"num_warps": 4},
    )  # fmt: skip
    yield (
        "lay_out_latents", expanded_attention._lay_out,
        dict(latent=fp8, rope=bf16, scales=fp32, out=bf16, rope_out=bf16, tables=i32, chunks=i32, table_width="i32"),
        dict(RANK=RANK, RP=RANK, D=ROPE, DP=ROPE, GROUP=128, TOKENS=32, CODES=True, PDL=pdl,
             **_strides(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn)), {"num_warps": 8},
    )  # fmt: skip
    c = expanded_attention._tiles(128 + 64 + 128, 2)
    yield (
        "expanded_attention", expanded_attention._expanded_attention,
        dict(q=bf16, k=bf16, rope=bf16, v=bf16, out=bf16, sums=fp32, cos_sin=fp32, rotary_rows="*i64", tiles=i32,
             qk_scale="fp32", length="i32", first_head="i32"),
        dict(HEADS=16, N=128, NP=128, D=64, DP=64, V=128, VP=128, INTERLEAVED=True, BM=c["BM"], BN=c["BN"],
             STAGES=launch.pipeline(c["stages"]), PDL=pdl), {"num_warps": c["warps"]},
    )  # fmt: skip
