"""Decode steps of a few requests in two launches a layer: attention with rotary and cache write, and everything between two
layers' attention.

The second launch is csrc/layer_megakernel.cu, for one request in a variant of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_int32, c_ubyte, c_void_p
from functools import partial

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.ops.contract import DenseParts, LayerParts, PackedWeight
from octavo.ops.gpu import PackedBlocks, PackedScaledMM, PackedWeightOnly
from octavo.ops.hopper.compile import no_warpgroups, tensor_map
from octavo.ops.hopper.layer_by_layer import LayerByLayer
from octavo.ops.hopper.megakernel_layers import has_blocks, has_two_codes, packed_weights, unfit
from octavo.platform import Platform
from octavo.quant.scheme import BLOCK

__all__ = ["LayerMegakernels", "refusal", "units"]

COLUMNS = (8, 16, 32)  # tokens that a kernel is compiled for
PAIRED = (4, *COLUMNS)  # the same where a token has two columns of codes
MAX_TOKENS = COLUMNS[-1]
MAX_INPUTS = 40  # K steps of one token's inputs that a CTA keeps in shared memory
MAX_CTA_UNITS = 4  # units of gate_up whose results a CTA keeps in shared memory
GRID_BARRIERS = 8 * 32  # as in tma_pipeline.cuh
STEP = 128  # K step
CONSUMERS = 256  # threads of a CTA that multiply; each holds 8 adjacent values of a row, or several times 8


class _Between(ctypes.Structure):
    _fields_ = [
        ("maps", c_ubyte * 128 * 4), ("scales", c_void_p * 4),
        *((name, c_void_p) for name in ("attended", "residual", "qkv", "post_norm", "next_norm", "qkv_bias", "attended_codes",
                                        "normed_codes", "act_codes", "attended_scales", "normed_scales", "act_scales", "parts",
                                        "grid_barriers")),
        ("tokens", c_int32), ("eps", c_float), ("padding", c_ubyte * 40),  # pads to a multiple of 64 bytes
    ]  # fmt: skip


def refusal(parts: DenseParts, platform: Platform) -> str | None:
    """None, or the reason why this decoder's steps are not made of such launches."""
    if (reason := no_warpgroups(platform) or unfit(parts, (PackedScaledMM, PackedWeightOnly, PackedBlocks))) is not None:
        return reason
    if any(size % 16 for size in (parts.hidden, parts.inter, parts.heads * parts.head_dim)):
        return "a dimension is not a multiple of 16"
    if has_blocks(parts) and parts.head_dim % 16:
        return "scales a tile and heads that are not a multiple of 16"
    if platform.multiprocessors < MAX_TOKENS:
        return "fewer multiprocessors than tokens"
    rows, _ = units(parts.inter, parts.hidden, platform.multiprocessors, most_shares=1)
    if parts.inter > MAX_CTA_UNITS * platform.multiprocessors * rows:
        return "an MLP too wide for the multiprocessors"
    return None


def units(n: int, k: int, ctas: int, *, most_shares: int, columns: int = MAX_TOKENS) -> tuple[int, int]:
    """(rows of a unit, split-K) of a product [n, k] by so many columns of codes that the busiest CTA reads the fewest bytes."""

    def busiest(rows: int, shares: int) -> float:
        steps = -(-k // STEP)
        share = -(-steps // shares)
        if share * (shares - 1) >= steps:
            return float("inf")
        rounds = -(-(-(-n // rows) * shares) // ctas)
        return rounds * share * (rows + columns / 2)  # inputs come from L2

    fits = [(busiest(rows, shares), rows, shares) for rows in range(16, 129, 16) for shares in range(1, most_shares + 1)]
    return min(fits)[1:]


def fits_alone(options: Mapping[str, int | float]) -> bool:
    """Whether steps of one token have a variant of their own: a CTA has at most one unit of each product, and room for its
    inputs."""
    hidden, inter, wide, qkv, ctas = (int(options[name]) for name in ("HIDDEN", "INTER", "WIDE", "QKV", "CTAS"))
    found = []
    for name, n, k in (("O", hidden, wide), ("GATE_UP", inter, hidden), ("DOWN", hidden, inter), ("QKV", qkv, hidden)):
        steps, splits = -(-k // STEP), int(options.get(f"{name}_SPLITS", 1))
        found.append((-(-n // int(options[f"{name}_ROWS"])) * splits, -(-steps // splits)))
    units, shares = ([pair[i] for pair in found] for i in (0, 1))
    row = -(-max(hidden, wide) // (8 * CONSUMERS)) * 8 * CONSUMERS  # values that the threads hold
    return max(units) <= ctas <= CONSUMERS and max(shares) <= MAX_INPUTS and shares[2] * STEP <= row


def weight_map(weight: Tensor, rows: int) -> bytes:
    """Tensor map of contiguous codes [N, K] in boxes of `rows` rows by a K step."""
    n, k = weight.shape
    return tensor_map(weight, (k, n), (k,), (STEP, rows))


class LayerMegakernels(LayerByLayer[LayerParts[PackedWeight]]):
    """A decoder's layers for steps of up to MAX_TOKENS one-token requests.

    `parts` must be accepted by `refusal`, with caches bound. Raises NoKernel.
    """

    name = "a launch between attentions, csrc/layer_megakernel.cu"
    columns: Sequence[int] = COLUMNS

    def __init__(self, parts: DenseParts, platform: Platform):
        super().__init__(parts, platform)
        options, layers, pairs = self.options(), len(parts.layers), has_two_codes(parts)
        self.columns = PAIRED if pairs else COLUMNS
        variants = {n: {"TOKENS": n, "ALONE": 0} for n in self.columns}
        if alone := fits_alone(options):
            variants[1] = {"TOKENS": self.columns[0], "ALONE": 1}
        self.kernels = self.compiled("layer_megakernel.cu", "between_attentions", options, variants)
        zeros = partial(torch.zeros, device=platform.device)
        widths = parts.heads * parts.head_dim, parts.hidden, parts.inter
        self.codes = {
            n: [zeros(-(-width // STEP), n << pairs, STEP, dtype=torch.uint8) for width in widths] for n in self.columns
        }
        groups = [-(-width // STEP) if options["BLOCKS"] else 1 for width in widths]
        self.scales = {n: [zeros(count, n, dtype=torch.float32) for count in groups] for n in self.columns}
        shares = int(max(options["O_SPLITS"], options["DOWN_SPLITS"]))
        self.shares = zeros(shares, MAX_TOKENS, parts.hidden, dtype=torch.float32)
        if alone:  # nothing, and two rows of values in place of codes
            self.codes[1] = [zeros(0), *(zeros(width, dtype=torch.bfloat16) for width in widths[1:])]
            self.scales[1] = [zeros(0)] * 3
        amaxes = 2 * -(-parts.inter // int(options["GATE_UP_ROWS"])) if options["BLOCKS"] else self.ctas
        self.grid_barriers = zeros(layers, GRID_BARRIERS + amaxes * MAX_TOKENS, dtype=torch.int32)
        self.weights = [packed_weights(layer) for layer in parts.layers]
        rows = [int(options[f"{name}_ROWS"]) for name in ("QKV", "O", "GATE_UP", "DOWN")]
        self.maps = [[weight_map(w.weight, n) for w, n in zip(ws, rows, strict=True)] for ws in self.weights]

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return self.run(x, batch, self.between)

    def between(self, at: int, attended: Tensor, residual: Tensor) -> Tensor:
        """Everything between the attention of layer `at` and the next: attended [tokens, heads * dim] -> the next qkv [tokens,
        ...].

        After the last layer the result is undefined. `residual` [tokens, hidden] is updated in place.
        """
        tokens, layer = len(residual), self.parts.layers[at]
        after = (at + 1) % len(self.weights)  # the last layer's launch ignores the arguments of the first layer
        next_qkv, (_, *weights) = self.weights[after][0], self.weights[at]
        qkv = torch.empty(tokens, next_qkv.n, dtype=torch.bfloat16, device=residual.device)
        columns = next(n for n in self.kernels if tokens <= n)
        maps = b"".join([*self.maps[at][1:], self.maps[after][0]])
        last, bias = after == 0, self.parts.layers[after].qkv_bias
        arguments = _Between(
            (c_ubyte * 128 * 4).from_buffer_copy(maps), (c_void_p * 4)(*(w.scale.data_ptr() for w in (*weights, next_qkv))),
            attended.data_ptr(), residual.data_ptr(), qkv.data_ptr(), layer.post_norm.data_ptr(),
            None if last else self.parts.layers[after].input_norm.data_ptr(), None if bias is None else bias.data_ptr(),
            *(codes.data_ptr() for codes in self.codes[columns]), *(scales.data_ptr() for scales in self.scales[columns]),
            self.shares.data_ptr(), self.grid_barriers[at].data_ptr(), tokens, self.parts.eps,
        )  # fmt: skip
        self.kernels[columns].launch(self.ctas, arguments, early=True)
        return qkv

    def options(self) -> dict[str, int | float]:
        """The compile-time constants of layer_megakernel.cu, without the number of tokens."""
        p, ctas = self.parts, self.ctas
        wide, qkv, bias = p.heads * p.head_dim, packed_weights(p.layers[0])[0].n, p.layers[0].qkv_bias is not None
        columns = MAX_TOKENS << has_two_codes(p)
        o, down = (units(p.hidden, k, ctas, most_shares=8, columns=columns) for k in (wide, p.inter))
        gate_up, rows = (units(n, p.hidden, ctas, most_shares=1, columns=columns)[0] for n in (p.inter, qkv))
        names = "QKV_TILE", "O_TILE", "GATE_UP_TILE", "DOWN_TILE"
        return {
            "HIDDEN": p.hidden, "INTER": p.inter, "WIDE": wide, "QKV": qkv, "QKV_BIAS": int(bias), "CTAS": ctas,
            "SHARED": self.platform.shared_memory, "O_ROWS": o[0], "O_SPLITS": o[1], "GATE_UP_ROWS": gate_up,
            "DOWN_ROWS": down[0], "DOWN_SPLITS": down[1], "QKV_ROWS": rows, "BLOCKS": int(has_blocks(p)),
            "TWO_CODES": int(has_two_codes(p)),
            **{name: 1 if len(w.scale) == w.n else BLOCK for name, w in zip(names, packed_weights(p.layers[0]), strict=True)},
        }  # fmt: skip
