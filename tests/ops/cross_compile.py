"""Compiles Triton kernels for chips that are not here. Run as a program: the tests' own process interprets them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from cross_compile_latent import latent_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo.ops.triton import (
    argmax,
    block_linear,
    decode,
    elementwise,
    experts,
    index_keys,
    int4,
    latent_write,
    launch,
    linear,
    prefill,
    rope,
    rotate,
    round_columns,
    round_keys,
    routing,
    sample,
    segment_attention,
    select_keys,
    weight_only,
)
from octavo.platform import Platform

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
FP8 = {"sm_90": "*fp8e4nv", "gfx942": "*fp8e4b8", "gfx950": "*fp8e4nv"}


@dataclass
class Compiled:
    """What the compiler made of a kernel."""

    kernel: str
    target: str
    shared: int  # bytes
    spills: int
    registers: int
    matrix: list[str]  # kinds of matrix instruction in its assembly


def kernels(fp8: str, pdl: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Name, kernel, types of the arguments, constants, launch options: as the wrappers launch them for Llama-3.1-8B."""
    names = {"*bf16": "bfloat16", fp8: fp8.replace("*fp8", "float8")}
    fp32, bf16, i32, i64 = "*fp32", "*bf16", "*i32", "*i64"
    limit = {"LIMIT": 224.0 if fp8 == "*fp8e4b8" else 448.0, "FLOOR": 1e-6, "PDL": pdl}
    for scaled, both, group in ((False, False, 0), (True, False, 0), (True, True, 0), (False, False, 128)):
        kind = "_scaled" * scaled + "_both" * both + "_groups" * (group > 0)
        dense, unread = ({"dense": bf16}, {}) if both else ({}, {"dense": None})
        unpaired = dict.fromkeys(("experts", "weights", "place"))
        product = dict(x=bf16, x_row=fp32, x_column=fp32, out=fp8, scale=fp32, size="i32", width="i32", **dense)
        yield (
            f"norm_quant{kind}", elementwise._norm_quant,
            dict(residual=bf16, weight=bf16, carried=bf16, eps="fp32", inner="i32", outer_stride="i32", inner_stride="i32",
                 **product),
            dict(TOP_K=0, SCALED=scaled, ADD=True, CENTER=False, QUANT=True, BOTH=both, GROUP=group, BLOCK=4096, shift=None,
                 **unpaired, **unread, **limit),
            {"num_warps": 8},
        )  # fmt: skip
        yield (
            f"silu_mul_quant{kind}", elementwise._silu_mul_quant, product,
            dict(SCALED=scaled, QUANT=True, BOTH=both, GROUP=group, BLOCK=16384, **unread, **limit), {"num_warps": 16},
        )  # fmt: skip
    yield from of_towers(fp8, limit)
    for kind, group in (("", 0), ("_groups", 128)):
        yield (
            f"quantize{kind}", elementwise._quantize,
            dict(x=bf16, out=fp8, scale=fp32, size="i32", stride="i32", width="i32"),
            dict(GROUP=group, BLOCK=4096, **limit), {"num_warps": 8},
        )  # fmt: skip
    yield (
        "argmax", argmax._argmax,
        dict(logits=bf16, best=i64, counters=i32, out=i64, size="i32", stride="i32"),
        dict(BLOCK=argmax.BLOCK, LOWEST=argmax.LOWEST, PDL=pdl), {"num_warps": 8},
    )  # fmt: skip
    row = dict(logits=fp32, best=i64, temperature=fp32, top_k=i32, top_p=fp32, min_p=fp32, u="*fp64", counts=i32, sums=fp32,
               weights=fp32, places=i32, numbers=i32, lefts=fp32, out=i64, size="i32", stride="i32")  # fmt: skip
    tiles = dict(CHUNK=sample.CHUNK, PARTS=64, EDGES=sample.EDGES, PDL=pdl)
    for name, kernel, cut in (
        ("look", sample._sample_count, {"FILTERED": False}), ("look_cut", sample._sample_count, {"FILTERED": True}),
        ("pick", sample._sample_unfiltered, {}), ("list", sample._sample_compact, {}), ("last", sample._sample, {}),
    ):  # fmt: skip
        fp64 = {"sums": "*fp64"} if name in ("look", "pick") else {}
        yield (
            f"draw_{name}", kernel, {p: row[p] for p in kernel.arg_names if p in row} | fp64,
            {p: value for p, value in (tiles | cut).items() if p in kernel.arg_names},
            {"num_warps": sample.LIST_WARPS if kernel is sample._sample else sample.ROW_WARPS},
        )  # fmt: skip
    cache = dict.fromkeys(
        ("block_stride", "k_token_stride", "v_token_stride", "v_head_stride", "v_dim_stride", "scale_block_stride",
         "scale_token_stride", "scale_head_stride", "table_width"), "i32"
    )  # fmt: skip
    by_layer, by_head = {"K_STRIDE": 0, "V_STRIDE": 0}, {"K_STRIDE": 1, "V_STRIDE": 1}
    _, tokens, heads, warps = rope.TILES[-1]
    for kind, per_head, strides in (("", False, by_layer), ("_by_head", False, by_head), ("_per_head", True, by_layer)):
        yield (
            f"rope_write_kv{kind}", rope._rope_write_kv,
            dict(q=bf16, k=bf16, v=bf16, q_out=bf16, k_cache=fp8, v_cache=fp8, k_scales=fp32, v_scales=fp32, q_norm=bf16,
                 k_norm=bf16, cos_sin=fp32, rotary_rows=i64, slots=i64, tokens="i32", eps="fp32", k_scale=fp32, v_scale=fp32,
                 q_stride="i32", k_stride="i32", v_stride="i32", **cache),
            dict(Q_HEADS=32, KV_HEADS=8, D=128, DP=128, R=128, HALF=64, BLOCK_SIZE=64, TOKENS=tokens, HEADS=heads,
                 NORM=per_head, PER_HEAD=per_head, BY_DIM=True, **strides, **limit),
            {"num_warps": warps},
        )  # fmt: skip
    for bm in (16, 32, 64):  # 64: of pairs
        yield (
            f"small_linear_{bm}", linear._small_linear,
            dict(x=fp8, x_scale=fp32, w=fp8, w_scale=fp32, out=bf16, parts=fp32, counters=i32, tokens="i32", n="i32",
                 width="i32", per_split="i32"),
            dict(BN=64, BM=bm, BK=256, SPLIT=4, PROMOTE=linear.PROMOTE, PREFETCH=2 * pdl, PDL=pdl, PAIRS=bm > 32,
                 STAGES=4 if pdl else 2),
            {"num_warps": 4},
        )  # fmt: skip
    yield (
        "codes_in_pairs", weight_only._codes_in_pairs,
        dict(x=bf16, out=fp8, scale=fp32, **dict.fromkeys(("size", "stride", "width", "of_token", "of_rest"), "i32")),
        limit | dict(FLOOR=1e-30, REST=16, BLOCK=4096), {"num_warps": 16},
    )  # fmt: skip
    yield (
        "round_columns", round_columns._round_columns,
        dict(values=fp32, offset=fp32, influence=fp32, scale=fp32, moved=fp32,
             **dict.fromkeys(("columns", "rows", "influence_stride", "scale_stride"), "i32")),
        dict(LIMIT=limit["LIMIT"], CODE=getattr(triton.language, names[fp8]), BK=128, BN=round_columns.ROWS,
             PDL=pdl),
        {"num_warps": 4},
    )  # fmt: skip
    yield (
        "round_keys", round_keys._round_keys,
        dict(k=bf16, out=bf16, influence=fp32, order=i32, scale=fp32,
             **dict.fromkeys(("tokens", "k_stride", "k_head_stride"), "i32")),
        dict(HEADS=8, D=128, DP=128, BT=round_keys.TOKENS, SCALE_STRIDE=0, LIMIT=limit["LIMIT"],
             CODE=getattr(triton.language, names[fp8]), PDL=pdl),
        {"num_warps": 1},
    )  # fmt: skip
    yield (
        "rewrite_keys", round_keys._rewrite_keys,
        dict(k=bf16, cache=fp8, norm=bf16, influence=fp32, order=i32, scale=fp32, cos_sin=fp32, rotary_rows=i64, slots=i64,
             eps="fp32", **dict.fromkeys(("k_stride", "block_stride", "token_stride"), "i32")),
        dict(D=128, DP=128, R=128, BLOCK_SIZE=64, NORM=True, K_STRIDE=1, LIMIT=limit["LIMIT"], PDL=pdl),
        {"num_warps": 1},
    )  # fmt: skip
    for bm in (16, 128):
        yield (
            f"block_linear_{bm}", block_linear._block_linear,
            dict(x=fp8, x_scale=fp32, w=fp8, w_scale=fp32, out=bf16, tokens="i32", n="i32", width="i32", groups="i32"),
            dict(BN=64 if bm == 16 else 128, BM=bm, GROUP=128, SCALE_ROWS=128, STAGES=3 if pdl else 2, PDL=pdl),
            {"num_warps": 4 if bm == 16 else 8},
        )  # fmt: skip
    yield from latent_kernels(fp8, pdl)
    yield from of_experts(fp8, names[fp8].replace("float8", "fp8"), pdl)
    yield from of_int4(fp8, pdl)
    yield from of_indexes(fp8, limit | {"FLOOR": 1e-4})
    new = dict(new_k=bf16, new_v=bf16, q_norm=bf16, k_norm=bf16, cos_sin=fp32, rotary_rows=i64, slots=i64)
    for kind, kv, per_head, given in (
        ("fp8", fp8, False, {}), ("per_head", fp8, True, {}), ("bf16", bf16, False, {}),
        ("fp8_new", fp8, False, new), ("per_head_new", fp8, True, new), ("bf16_new", bf16, False, new),
        ("fp8_new_by_head", fp8, False, new),
    ):  # fmt: skip
        yield (
            f"decode_attention_{kind}", decode._decode_attention,
            dict(q=bf16, k=kv, v=kv, k_scales=fp32, v_scales=fp32, tables=i32, seq_lens=i32, out=bf16, parts=fp32, sums=fp32,
                 counters=i32, qk_scale="fp32", k_scale=fp32, v_scale=fp32, eps="fp32",
                 q_stride="i32", kv_stride="i32", **given, **cache),
            dict(**({} if given else dict.fromkeys(new)), NEW=bool(given), R=128 if given else 0, NORM=bool(given),
                 KV_LIMIT=limit["LIMIT"], **(by_head if "by_head" in kind else by_layer), FLOOR=1e-6, Q_HEADS=32, GROUP=4,
                 ROWS=8 if kv == fp8 else 16, D=128, DP=128, BLOCK_SIZE=64, TILE=64, SPLIT=True, WINDOW=0, PER_HEAD=per_head,
                 CODE=getattr(triton.language, names[kv]), LIMIT=limit["LIMIT"], STAGES=2, PDL=pdl),
            {"num_warps": 4},
        )  # fmt: skip
    for kind, out in (("fp8", fp8), ("bf16", bf16)):
        yield (
            f"stage_kv_{kind}", prefill._stage_kv,
            dict(k=fp8, v=fp8, k_scales=fp32, v_scales=fp32, k_out=out, v_out=out, tables=i32, chunks=i32, **cache,
                 length="i32"),
            dict(D=128, DP=128, BLOCK_SIZE=64, TILE=128, PER_HEAD=kind == "bf16", BY_DIM=True, PDL=pdl), {"num_warps": 8},
        )  # fmt: skip
    for kind, kv, dim in (
        ("fp8", fp8, 128), ("bf16", bf16, 128), ("fp8_256", fp8, 256), ("bf16_256", bf16, 256), ("fp8_by_head", fp8, 128),
    ):  # fmt: skip
        c = prefill._tiles(dim, torch.bfloat16 if kv == bf16 else torch.float8_e4m3fn)
        bn = c["BN"]
        name = names[kv].replace("bfloat", "bf").replace("float8", "fp8")
        yield (
            f"prefill_attention_{kind}", prefill._prefill_attention,
            dict(q=bf16, k=f"tensordesc<{name}[{bn}, {dim}]>", out=bf16, tiles=i32, qk_scale="fp32", k_scale=fp32, v_scale=fp32,
                 v=f"tensordesc<{name}[{bn}, {dim}]>" if kv == bf16 else f"tensordesc<{name}[{dim}, {bn}]>", length="i32"),
            dict(Q_HEADS=32, GROUP=4, D=dim, DP=dim, BM=c["BM"], BN=c["BN"], WINDOW=0,
                 CODE=getattr(triton.language, names[kv]), LIMIT=limit["LIMIT"],
                 **(by_head if "by_head" in kind else by_layer), STAGES=c["stages"], PDL=pdl),
            {"num_warps": c["warps"]} | ({"maxnreg": c["registers"]} if pdl else {}),
        )  # fmt: skip


def of_towers(fp8: str, limit: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """As `kernels`, for the vision towers of Qwen3-VL and Kimi-K2.5."""
    fp32, bf16, i32, pdl = "*fp32", "*bf16", "*i32", limit["PDL"]
    written = dict(x=bf16, out=fp8, scale=fp32, size="i32", width="i32")
    yield (
        "layer_norm_quant", elementwise._norm_quant,
        dict(residual=bf16, weight=bf16, shift=bf16, carried=bf16, eps="fp32", inner="i32", outer_stride="i32",
             inner_stride="i32", **written),
        dict(x_row=None, x_column=None, experts=None, weights=None, place=None, dense=None, TOP_K=0, SCALED=False, ADD=True,
             CENTER=True, QUANT=True, BOTH=False, GROUP=0, BLOCK=2048, **limit), {"num_warps": 4},
    )  # fmt: skip
    yield (
        "combine_norm_quant", elementwise._norm_quant,
        dict(residual=bf16, weight=bf16, carried=bf16, eps="fp32", inner="i32", outer_stride="i32", inner_stride="i32",
             experts="*i32", weights=fp32, place="*i32", **written),
        dict(x_row=None, x_column=None, shift=None, dense=None, TOP_K=8, SCALED=False, ADD=True, CENTER=False, QUANT=True,
             BOTH=False, GROUP=0, BLOCK=2048, **limit), {"num_warps": 4},
    )  # fmt: skip
    for kind, tanh in (("tanh", True), ("erf", False)):
        yield (
            f"gelu_quant_{kind}", elementwise._gelu_quant, dict(stride="i32", **written),
            dict(dense=None, TANH=tanh, QUANT=True, BOTH=False, BLOCK=4096, REST=256, **limit), {"num_warps": 8},
        )  # fmt: skip
    for kind, interleaved in (("", False), ("_interleaved", True)):
        yield (
            f"rotate{kind}", rotate._rotate,
            dict(x=bf16, out=bf16, cos_sin=fp32, rows="*i64", tokens="i32", token_stride="i32", head_stride="i32"),
            dict(H=32, D=72, R=72, PAIRS=64, REST=1, INTERLEAVED=interleaved, TOKENS=rotate.TOKENS, HEADS=rotate.HEADS,
                 PDL=pdl), {"num_warps": 4},
        )  # fmt: skip
    tiles = dict(segment_attention.TILES)
    warps, rows = tiles.pop("num_warps"), tiles["BN"]
    columns = {"": segment_attention.widths(72)[0], "_rest": segment_attention.widths(72)[1]}
    given = {f"{x}{kind}": f"tensordesc<bf16[{rows}, {width}]>" for x in "kv" for kind, width in columns.items()}
    yield (
        "segment_attention", segment_attention._segment_attention,
        dict(q=bf16, out=bf16, starts=i32, segments="i32", qk_scale="fp32", q_stride="i32", **given),
        dict(GROUP=segment_attention.GROUP, H=16, D=72, D0=columns[""], D1=columns["_rest"],
             STAGES=launch.pipeline(segment_attention.STAGES) if pdl else 2, PDL=pdl, **tiles), {"num_warps": warps},
    )  # fmt: skip


def of_experts(fp8: str, fp8_name: str, pdl: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """As `kernels`, for Qwen3-30B-A3B and, with groups, DeepSeek-V3."""
    fp32, bf16, i32 = "*fp32", "*bf16", "*i32"
    numbers = dict.fromkeys(("tokens", "count", "width", "stride", "per_split"), "i32")
    for name, tokens, count, router in (
        ("few", 8, 128, dict(TOP_K=8, SIGMOID=False, GROUPS=1, TOP_GROUPS=1, PADDING=routing.LENGTHS)),
        ("many", 8192, 128, dict(TOP_K=8, SIGMOID=False, GROUPS=1, TOP_GROUPS=1, PADDING=routing.NO_PADDING)),
        ("groups", 8, 256, dict(TOP_K=8, SIGMOID=True, GROUPS=8, TOP_GROUPS=4, PADDING=routing.LIVE)),
    ):  # fmt: skip
        c, sigmoid = routing._route_shape(tokens, count, 2048, 2), router["SIGMOID"]
        yield (
            f"route_{name}", routing._route,
            dict(x=bf16, w=bf16, experts=i32, weights=fp32, parts=fp32, counters=i32, scale="fp32", **numbers)
            | ({"bias": fp32} if sigmoid else {}) | ({"padding": i32} if router["PADDING"] else {}),
            dict(NORMALIZE=True, PARTS=router["GROUPS"], MEMBERS=count // router["GROUPS"], KP=8, BE=c["BE"], BM=c["BM"],
                 BK=c["BK"], SPLIT=c["split"], ROWS=min(c["BM"], 2048 // count), LOWEST=routing.LOWEST,
                 STAGES=launch.pipeline(c["stages"]), PDL=pdl, **router)
            | ({} if sigmoid else {"bias": None}) | ({} if router["PADDING"] else {"padding": None}),
            {"num_warps": c["warps"]},
        )  # fmt: skip
    pairs = dict(experts=i32, counts=i32, pairs="i32", count="i32")
    yield "count_pairs", routing._count_pairs, pairs, dict(CHUNK=2048, BINS=256, PDL=pdl), {"num_warps": 8}
    for one in (True, False):
        yield (
            f"place_pairs_{'one' if one else 'many'}", routing._place_pairs,
            dict(cursors=i32, order=i32, place=i32, starts=i32, chunks="i32", **pairs),
            dict(CHUNK=2048, BINS=256, ROWS=32, ONE=one, PDL=pdl), {"num_warps": 8},
        )  # fmt: skip
    yield (
        "combine", routing._combine,
        dict(y=bf16, experts=i32, weights=fp32, place=i32, out=bf16, size="i32", stride="i32"),
        dict(TOP_K=8, BLOCK=1024, PDL=pdl), {"num_warps": 4},
    )  # fmt: skip
    yield (
        "find_tiles", experts._find_tiles, dict(starts=i32, table=i32, slots="i32", experts="i32"),
        dict(SLOTS=experts.TABLE_SLOTS, BM=128, EXPERTS=128, PDL=pdl), {"num_warps": 4},
    )  # fmt: skip
    for kind, dtype, name, size, scales, scale_rows in (
        ("fp8", fp8, fp8_name, 1, experts.ROWS, 128), ("bf16", bf16, "bf16", 2, experts.NO_SCALES, 128),
        ("tiles", fp8, fp8_name, 1, experts.TILES, 128), ("channels", fp8, fp8_name, 1, experts.TILES, 1),
        ("weights", fp8, fp8_name, 2, experts.CHANNELS, 128),
    ):  # fmt: skip
        for rows in (1, 16, 40, 512)[: 3 if scales == experts.TILES else 4]:
            c = experts._shape(rows, size, scales == experts.TILES)
            by_token = scales in (experts.ROWS, experts.TILES)
            given = {"x_scale": by_token, "w_scale": scales, "table": c["table"], "w_tiles": c["tma"]}
            unread = dict.fromkeys(p for p, there in given.items() if not there)
            types = dict(x=bf16 if scales == experts.CHANNELS else dtype, x_scale=fp32, w=dtype,
                         w_tiles=f"tensordesc<{name}[{c['BN']}, {c['BK']}]>", w_scale=fp32, out=bf16,
                         order=i32, starts=i32, table=i32, slots="i32", experts="i32", n="i32", height="i32",
                         width="i32", groups="i32")  # fmt: skip
            yield (
                f"grouped_linear_{kind}_{c['BM']}", experts._grouped_linear,
                {p: one for p, one in types.items() if p not in unread},
                dict(OF_TOKENS=True, TOP_K=8, EXPERTS=128, BN=c["BN"], BM=c["BM"], BK=c["BK"], SCALES=scales,
                     SCALE_ROWS=scale_rows, PROMOTE=experts.PROMOTE if c["promote"] else None, EVEN=True,
                     ASM=pdl, STAGES=launch.pipeline(c["stages"]), PDL=pdl, **unread),
                {"num_warps": c["warps"]},
            )  # fmt: skip


def of_int4(fp8: str, pdl: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """As `kernels`, for Kimi-K2's experts, and for a dense weight, whose K is split over programs."""
    dense = dict(scales="*i32", out="*bf16") | dict.fromkeys(("experts", "tokens", "n", "pairs"), "i32")
    w16 = dict(x="*bf16", w="*i16", parts="*fp32", counters="*i32", words="i32", size="i32", per_split="i32")
    w8, stacked = dict(x=fp8, x_scale="*fp32", w="*u8", width="i32"), dense | dict(order="*i32", starts="*i32")
    for group in int4.GROUPS:
        for rows, quantized in ((1, False), (20, False), (40, False), (1, True), (20, True), (40, True), (512, True)):
            c = int4._shape(rows, 4096, group, False, quantized)
            options = dict(OF_TOKENS=True, TOP_K=8, EXPERTS=512, BN=c["BN"], BM=c["BM"], GROUP=group, ASM=pdl, PDL=pdl,
                           STAGES=launch.pipeline(c["stages"]))  # fmt: skip
            own = dict(SUBNORMAL=512.0) if quantized else dict(TILE=int4.STEP // 4, PLANAR=bool(c["planar"]), SPLIT=1)
            yield (
                f"w4a{8 if quantized else 16}_{group}_{c['BM']}", int4._w4a8 if quantized else int4._w4a16,
                (w8 if quantized else w16) | stacked, options | own, {"num_warps": c["warps"]},
            )  # fmt: skip
        split = dict(order=None, starts=None, OF_TOKENS=False, TOP_K=1, EXPERTS=1, BN=64, BM=16, PLANAR=False, SPLIT=32)
        yield f"w4a16_{group}_split", int4._w4a16, w16 | dense, options | split | dict(TILE=32), {"num_warps": 4}
        yield (
            f"quantize_in_groups_{group}", int4._quantize_in_groups,
            dict(x="*bf16", out=fp8, scale="*fp32", size="i32", stride="i32", width="i32"),
            dict(GROUP=group, BLOCK=8192, LIMIT=224.0 if fp8 == "*fp8e4b8" else 448.0, FLOOR=1e-6, PDL=pdl), {"num_warps": 16},
        )  # fmt: skip
    yield (
        "planes", int4._planes, dict(x="*bf16", out="*bf16", size="i32", stride="i32", width="i32"),
        dict(TILE=int4.STEP // 4, BLOCK=1024, PDL=pdl), {"num_warps": 4},
    )  # fmt: skip


def of_indexes(fp8: str, limit: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """As `kernels`, for DeepSeek-V3.2."""
    fp32, bf16, i32, i64, pdl = "*fp32", "*bf16", "*i32", "*i64", {"PDL": limit["PDL"]}
    turn = dict(cos_sin=fp32, rotary_rows=i64)
    strides = dict.fromkeys(("latent_block", "latent_token", "rope_block", "rope_token", "scale_block", "scale_token"), "i32")
    for kind, latent, scales in (("codes", fp8, {"scales": fp32}), ("bf16", bf16, {})):
        yield (
            f"write_latent_{kind}", latent_write._write_latent,
            dict(kv=bf16, weight=bf16, slots=i64, latent=latent, rope=bf16, eps="fp32", kv_stride="i32", **turn, **scales,
                 **strides),
            dict(RANK=512, GROUPS=4, GROUP=128, R=64, RP=64, INTERLEAVED=True, BLOCK_SIZE=64, **limit)
            | ({} if scales else {"scales": None}),
            {"num_warps": 1},
        )  # fmt: skip
    yield (
        "rotate_queries", latent_write._rotate_queries,
        dict(q=bf16, out=bf16, heads="i32", q_token="i32", q_head="i32", out_token="i32", out_head="i32", **turn),
        dict(HEADS=latent_write.HEADS, R=64, RP=64, INTERLEAVED=True, **pdl), {"num_warps": 2},
    )  # fmt: skip
    strides = dict.fromkeys(
        ("token_stride", "head_stride", "weight_stride", "out_block", "out_token", "scale_block", "scale_token", "rows"), "i32"
    )
    tables = dict(groups=i32, starts=i32, seq_lens=i32, first="i32", width="i32")
    for kind, code in (("codes", fp8), ("fp32", fp32)):
        codes = code == fp8
        for name, keys in (("keys", True), ("queries", False)):
            given = dict(gain=bf16, bias=bf16, slots=i64) if keys else {"head_weights": bf16}
            given |= {"scales": fp32} if codes or not keys else {}
            yield (
                f"index_{name}_{kind}", index_keys._as_scored, dict(x=bf16, out=code, eps="fp32", **turn, **strides, **given),
                dict(HEADS=1 if keys else 64, D=128, R=64, INTERLEAVED=False, KEYS=keys, CODES=codes, BLOCK_SIZE=64, PARTS=1,
                     ROWS=index_keys.ROWS, **limit)
                | {p: None for p in ("gain", "bias", "slots", "head_weights", "scales") if p not in given},
                {"num_warps": 4},
            )  # fmt: skip
        for single in (True, False):
            c = select_keys._tiles(codes, 64, single)
            given = ({"key_scales": fp32} if codes else {}) | ({} if single else {"groups": i32})
            sizes = dict.fromkeys(("table_stride", "key_block", "key_token", "scale_block", "scale_token"), "i32")
            yield (
                f"index_logits_{kind}_{'single' if single else 'groups'}", select_keys._index_logits,
                dict(q=code, weights=fp32, keys=code, tables=i32, out=fp32, **sizes, **given)
                | {p: kept for p, kept in tables.items() if p != "groups"},
                dict(HEADS=64, HP=64, D=128, DP=128, DEPTH=select_keys.DEPTH, BLOCK_SIZE=64, TOKENS=c["TOKENS"], BM=c["BM"],
                     TOP_K=2048, SINGLE=single, STAGES=launch.pipeline(c["stages"]), live=None, **pdl)
                | {p: None for p in ("key_scales", "groups") if p not in given},
                {"num_warps": c["warps"]},
            )  # fmt: skip
    for level, final in ((0, True), (0, False), (1, True)):
        kind = f"{level}{'_final' * final}"
        given = tables | dict(scores=fp32, out=i32, found=i32, out_width="i32", live=i32) | ({"places": i32} if level else {})
        unread = {} if level else {"places": None}
        chunk, segment = select_keys.CHUNK, select_keys.SEGMENT
        shape = dict(TOP_K=2048, CHUNK=chunk, SEGMENTS=chunk // segment, SEGMENT=segment, TOKENS=4, SINGLE=False, LEVEL=level,
                     FINAL=final, **unread, **pdl)  # fmt: skip
        yield (
            f"find_least_{kind}", select_keys._find_least, given, dict(KP=2048, SECANTS=select_keys.SECANTS, **shape),
            {"num_warps": select_keys._select_warps(select_keys.CHUNK)},
        )  # fmt: skip
        lists: dict[str, Any] = {"out_scores": None} if final else {}
        yield (
            f"list_{kind}", select_keys._list, given | {"parts": "i32"} | ({} if final else {"out_scores": fp32}),
            shape | lists, {"num_warps": 4},
        )  # fmt: skip


def compile_for(target: str, only: str = "") -> Iterator[Compiled]:
    shared = {"gfx942": 64, "gfx950": 160}.get(target, 227) << 10
    launch.configure(Platform(torch.device("cpu"), target, multiprocessors=132, shared_memory=shared))
    for name, kernel, types, constants, options in kernels(FP8[target], target.startswith("sm")):
        if only and not re.search(only, name):
            continue
        signature = {p: types.get(p, "constexpr") for p in kernel.arg_names}
        # what the launcher finds out by itself: pointers and sizes are multiples of 16
        aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.arg_names) if signature[p][0] in "*i"}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=TARGETS[target], options=options)
        yield _read(name, target, made)


def _read(name: str, target: str, made: Any) -> Compiled:
    if target.startswith("sm"):
        spills, registers = _resources(made.asm["cubin"])
        matrix = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[\w.:]*", made.asm["ptx"])))
    else:
        text = made.asm["amdgcn"]
        spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)))
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
        matrix = sorted(set(re.findall(r"v_mfma\w+", text)))
    return Compiled(name, target, made.metadata.shared, spills, registers, matrix)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Local memory (which spilled registers go to) and registers of a thread, as the disassembler's tool says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", text))), max(map(int, re.findall(r"REG:(\d+)", text)))


if __name__ == "__main__":
    for one in compile_for(sys.argv[1], *sys.argv[2:3]):
        print(json.dumps(asdict(one)), flush=True)
