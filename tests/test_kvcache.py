"""A cache's layout is data: views of one byte buffer that cover it without overlap."""

from __future__ import annotations

import torch
from cases import cases

from octavo.kvcache import Field, KVCache, KVCacheSpec, Layout, spec_for

CPU = torch.device("cpu")
SPECS = {
    kv: spec_for(kv, 3, 8, torch.float32, torch.float8_e4m3fn)
    for kv in ("auto", "bfloat16", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head")
} | {
    "by head": spec_for("fp8_per_token_head", 3, 8, torch.float32, torch.float8_e4m3fn, Layout.BY_HEAD),
    "matrix unit": spec_for("fp8_e4m3", 3, 8, torch.float32, torch.float8_e4m3fn, Layout.TENSOR_CORE),
    # Layouts of later models: MLA's 656 bytes a token, interleaved; the indexer's 132, values of a block before its scales.
    "fp8_ds_mla": KVCacheSpec(
        (
            Field("latent", (512,), torch.float8_e4m3fn),
            Field("scale", (4,), torch.float32),
            Field("rope", (64,), torch.bfloat16),
        ),
        interleaved=True,
    ),
    "indexer": KVCacheSpec((Field("k", (128,), torch.float8_e4m3fn), Field("scale", (1,), torch.float32))),
}
BYTES = {
    "auto": 192, "bfloat16": 96, "fp8_e4m3": 48, "fp8_e5m2": 48, "fp8_per_token_head": 72, "by head": 72, "matrix unit": 48,
    "fp8_ds_mla": 656, "indexer": 132,
}  # fmt: skip


@cases("name", SPECS)
def test_views_cover_the_buffer_without_overlap(name: str) -> None:
    spec = SPECS[name]
    assert spec.bytes_per_token == BYTES[name]
    cache = KVCache([spec], num_blocks=5, block_size=4, device=CPU)
    assert cache.nbytes == 5 * 4 * BYTES[name]
    (views,) = cache.views
    for number, (field, view) in enumerate(views.items(), 1):
        assert view.shape[:2] == (5, 4)
        fill(view, number)
        assert field in {f.name for f in spec.fields}
    counts = torch.bincount(cache.buffers[0].flatten().int(), minlength=len(views) + 1).tolist()
    assert counts == [0, *(view.nbytes for view in views.values())]


def fill(view: torch.Tensor, byte: int) -> None:
    """Every byte of the view becomes `byte`."""
    value = torch.full((view.dtype.itemsize,), byte, dtype=torch.uint8).view(view.dtype)
    if view.dtype.itemsize == 1:
        view.view(torch.uint8).fill_(byte)
    else:
        view.copy_(value.expand(view.shape))


@cases("name", SPECS)
def test_a_block_is_adjacent_in_memory(name: str) -> None:
    """A block is one piece, so that it can be moved or sent by its id alone."""
    cache = KVCache([SPECS[name]], 5, 4, CPU)
    for view in cache.views[0].values():
        fill(view[3], 0xAB)
    assert (cache.buffers[0][3] == 0xAB).all()
    assert not cache.buffers[0][[0, 1, 2, 4]].any()


def test_interleaved_fields_of_a_token_are_adjacent() -> None:
    cache = KVCache([SPECS["fp8_ds_mla"]], 2, 4, CPU)
    for view in cache.views[0].values():
        fill(view[1, 2], 0xCD)
    row = cache.buffers[0][1]
    assert (row[2 * 656 : 3 * 656] == 0xCD).all()
    assert int((row == 0xCD).sum()) == 656


def test_a_cache_starts_as_zeros_and_layers_are_apart() -> None:
    cache = KVCache([SPECS["auto"]] * 2, 3, 4, CPU)
    assert not any(buffer.any() for buffer in cache.buffers)
    cache.views[0]["k"].fill_(1.0)
    assert not cache.buffers[1].any()


def test_the_device_decides_which_fp8() -> None:
    for kv, expected in {"fp8_e4m3": torch.float8_e4m3fnuz, "fp8_e5m2": torch.float8_e5m2}.items():
        spec = spec_for(kv, 2, 8, torch.bfloat16, torch.float8_e4m3fnuz)
        assert {field.dtype for field in spec.fields} == {expected}


def test_the_order_of_a_block() -> None:
    """Strides of [block, token, head, dim], in values, of blocks of 4 tokens with 3 heads of 8."""

    def strides(layout: Layout, kv: str) -> list[tuple[int, ...]]:
        spec = spec_for(kv, 3, 8, torch.bfloat16, torch.float8_e4m3fn, layout)
        return [view.stride()[1:] for view in KVCache([spec], 2, 4, CPU).views[0].values()]

    assert strides(Layout.PLAIN, "fp8_e4m3") == [(24, 8, 1)] * 2
    assert strides(Layout.BY_HEAD, "fp8_e4m3") == strides(Layout.BY_HEAD, "auto") == [(8, 32, 1)] * 2
    assert strides(Layout.TENSOR_CORE, "fp8_e4m3") == [(24, 8, 1), (1, 32, 4)]
    assert strides(Layout.TENSOR_CORE, "auto") == [(24, 8, 1)] * 2
    assert strides(Layout.BY_HEAD, "fp8_per_token_head")[2:] == [(3, 1)] * 2
    assert strides(Layout.TENSOR_CORE, "fp8_per_token_head")[2:] == [(1, 4)] * 2
