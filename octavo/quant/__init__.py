"""Quantization schemes, stored weights (QTensor), and the checkpoint formats."""

from octavo.quant.qtensor import QTensor, concat, dequantize, quantize
from octavo.quant.rules import QuantRules
from octavo.quant.scheme import (
    BF16,
    FP8_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    FP8_W8A16,
    INT4,
    SCHEMES,
    Granularity,
    Scheme,
    WeightDType,
)

__all__ = [
    "BF16",
    "FP8_BLOCK",
    "FP8_PER_CHANNEL",
    "FP8_PER_TENSOR",
    "FP8_W8A16",
    "INT4",
    "SCHEMES",
    "Granularity",
    "QTensor",
    "QuantRules",
    "Scheme",
    "WeightDType",
    "concat",
    "dequantize",
    "quantize",
]
