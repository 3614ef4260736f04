"""FP8 codes to FP32 by integer operations, for all 256 codes."""

from __future__ import annotations

import numpy as np
import torch
from ops.cases import over
from quant.float64 import FORMATS, array

from octavo.ops.cpu.widen import WIDEN_FACTOR, round_to_fp8, widen


@over("name", FORMATS)
def test_every_finite_code_is_exact(name: str) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(256, dtype=torch.uint8)
    values = array(widen(codes, fmt.dtype)) * WIDEN_FACTOR[fmt.dtype]
    finite = np.isfinite(fmt.values)
    np.testing.assert_array_equal(values[finite], fmt.values[finite])
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))


@over("name", FORMATS)
def test_widened_codes_are_exact_in_bf16(name: str) -> None:
    fmt = FORMATS[name]
    values = widen(torch.arange(256, dtype=torch.uint8)[np.isfinite(fmt.values)], fmt.dtype)
    assert torch.equal(values.bfloat16().float(), values)


@over("name", FORMATS)
def test_rounding_is_to_the_nearest_code(name: str) -> None:
    fmt = FORMATS[name]
    x = (torch.randn(4000) * torch.logspace(-12, 2, 4000)).clamp(-fmt.limit, fmt.limit)
    x = torch.cat([x, torch.tensor([0.0, -0.0, -1e-12, fmt.limit, -fmt.limit])])
    expected = fmt.values[fmt.nearest(array(x))]
    np.testing.assert_array_equal(array(round_to_fp8(x, fmt.dtype)) * WIDEN_FACTOR[fmt.dtype], expected)
