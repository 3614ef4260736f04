"""Calls every C kernel of a library that the sanitizers instrument, which stop the process where something is wrong:

    LD_PRELOAD=libasan.so PYTHONPATH=.:tests python -P tests/ops/sanitized.py LIBRARY

The cases are the tests' own, with every instruction set, of few shapes: those with a tail of rows, of columns and of K, with
one token, with few, and with more than a panel; contexts that end within a block; heads that no vector divides.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import octavo.engine  # noqa: F401 (says how torch's threads wait, before torch is loaded)

import pytest  # isort: skip
import torch  # isort: skip

from octavo import platform

MIXED = [(7, 1), (0, 9), (37, 1), (12, 5)]


def cases() -> list[Callable[[], None]]:
    from ops import test_descend as descent
    from ops import test_gram as gram
    from ops import test_latent as contract
    from ops import test_native as native
    from ops import test_native_experts as experts
    from ops import test_native_int4 as int4
    from ops import test_native_latent as latent
    from ops import test_scale_errors as errors

    from octavo import ops
    from octavo.kvcache import Layout

    bf16, fp32 = torch.bfloat16, torch.float32
    on_latents = {"op": ops, "platform": native.CPU}
    long = {"shape": latent.LONG[-1][0], "rows": latent.LONG[-1][1]}
    return [
        *(partial(native.test_linear, shape=shape) for shape in ((1, 17, 33), (3, 25, 31), (20, 26, 257), (5, 3, 1100))),
        *(partial(native.test_dense, shape=shape) for shape in ((2, 17, 33), (20, 26, 257))),
        partial(native.test_subnormal_codes_count, m=3),
        *(partial(native.test_blocks_of_many_tokens, shape=shape) for shape in ((35, 290, 1100), (20, 33, 70))),
        native.test_a_weight_packed_for_tiles_is_not_multiplied_without_them,
        partial(native.test_rows_are_the_stored_weights, shape=(130, 130)),
        partial(native.test_activations_have_the_reference_codes, m=3),
        partial(native.test_zero_rows_strides_and_e5m2, m=5),
        native.test_codes_that_are_not_numbers_are_found,
        *(partial(native.test_attention, rows=MIXED, window=window) for window in (None, 5)),
        partial(native.test_prompts_of_bf16, window=33),
        *(partial(native.test_heads, heads=heads, kv=kv) for heads in ((3, 1, 10), (20, 1, 6)) for kv in ("auto", "fp8_e4m3")),
        partial(native.test_scales_of_a_layer_and_of_heads, rows=MIXED, heads=(10, 2, 20), scales="heads"),
        partial(native.test_rows_without_a_context_are_zeros, window=5),
        partial(native.test_the_cache_holds_what_the_reference_writes, layout=Layout.BY_HEAD),
        *(partial(native.test_from_the_product_to_attention, dim=d, rotated=r) for d, r in ((2, 2), (80, 80), (256, 64))),
        *(partial(native.test_norms_and_activations, width=width) for width in (1, 6, 300)),
        *(partial(native.test_the_likeliest_token, vocab=vocab) for vocab in (15, 300)),
        *(partial(native.test_a_token_that_is_drawn, vocab=vocab, spread=2.0) for vocab in (15, 1023)),
        native.test_tokens_that_lie_close_together_are_kept_one_by_one,
        *(partial(experts.test_each_expert_has_what_it_alone_gives, shape=(33, 70), dtype=dtype) for dtype in (fp32, bf16)),
        partial(experts.test_a_stack_that_is_given_away_is_packed_in_its_memory, shape=(64, 100)),
        experts.test_a_stack_packed_for_tiles_is_not_read_without_them,
        partial(experts.test_more_rows_than_are_computed_together, sizes=(520, 0, 20)),
        partial(experts.test_routes, name="sigmoid, groups"),
        experts.test_dispatches_as_the_reference_does,
        *(partial(experts.test_sums, width=width) for width in (1, 300)),
        *(partial(int4.products_of, shape, group) for shape in ((3, 17, 33), (20, 18, 70)) for group in int4.GROUPS),
        *(partial(gram.test_it_is_the_definition, name="C", shape=shape) for shape in ((5, 3), (513, 40), (70, 156))),
        descent.test_it_is_the_definition,
        errors.test_it_is_the_definition,
        partial(contract.check_stored, shape=(5, 144, 24, 16, 20), **on_latents),
        partial(contract.check_attention, rows="mixed", shape=(5, 144, 24, 16, 20), **on_latents),
        partial(contract.check_choices, shape=(3, 32, 4), **on_latents),
        *(partial(latent.test_long_contexts, kv=kv, **long) for kv in ("auto", "fp8_ds_mla")),
        *(partial(latent.products_of, tokens, 20, 12) for tokens in (1, 5, 37)),
    ]


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    platform.cpu_kernels = lambda: library
    from octavo import ops
    from octavo.ops.cpu import library as kernels

    assert kernels.missing() is None
    ops.bind(platform.detect("cpu"))
    torch.use_deterministic_algorithms(True)  # `torch.empty` gives NaN
    count = 0
    for run in cases():
        try:
            run()
        except pytest.skip.Exception:
            continue
        count += 1
    print(f"{count} of the tests' cases, none of which the sanitizers stopped")


if __name__ == "__main__":
    main()
