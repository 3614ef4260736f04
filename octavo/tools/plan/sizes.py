"""The bytes of a weight under a scheme, whole or one rank's part, and the bytes of a token of KV cache. All sizes in bytes.

The same arithmetic as octavo.quant.qtensor and octavo.kvcache, without their tensors; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

from octavo.errors import OctavoError

__all__ = ["ALIGNMENT", "COMPONENTS", "Attention", "Format", "Weight", "dense", "distinct"]

ALIGNMENT = 16  # FP8 matrix units take dimensions that are multiples of this (octavo.platform.Platform.fp8_alignment)
BLOCK = 128  # side of an fp8_block tile and length of the groups that fp8_ds_mla scales
COMPONENTS = (
    "attention", "indexer", "mlp", "experts", "shared experts", "router", "norms", "embeddings", "lm_head", "vision",
)  # fmt: skip
VECTOR = "vectors: no matrix product to speed up"


@dataclass(frozen=True, slots=True)
class Format:
    """How the values of a matrix are stored: `bits` each, and their scales.

    scale: "none", "row" (4 bytes a row; `fp8` keeps its one scale so, too), "tile" (4 bytes a 128x128 tile) or "group"
    (2 bytes for `group` values of a row, as packed INT4 has it).
    """

    name: str
    bits: int = 16
    scale: str = "none"
    group: int = 0

    @property
    def quantized(self) -> bool:
        """Whether it is stored as codes, of 8 bits or of 4."""
        return self.scale != "none"

    @property
    def is_fp8(self) -> bool:
        """Whether it is multiplied by FP8 units. Packed INT4 is not."""
        return self.quantized and self.bits == 8

    def nbytes(self, rows: Iterable[int], columns: int, align: int = 1) -> int:
        """Bytes of matrices with `rows` rows each, stacked over `columns` columns, the stack's sides rounded up to `align`."""
        heights = list(rows)
        total = sum(heights)
        if not self.quantized:
            return total * columns * self.bits // 8
        scales = {"row": 4 * total, "tile": 4 * _tile_rows(heights) * ceil(columns / BLOCK)}
        extra = scales[self.scale] if self.scale in scales else 2 * total * ceil(columns / self.group)
        return padded(total, align) * padded(columns, align) * self.bits // 8 + extra


def dense(itemsize: int = 2) -> Format:
    """Values as they are: BF16, or FP32 with --dtype float32."""
    return Format("bf16" if itemsize == 2 else "float32", 8 * itemsize)


def _tile_rows(heights: list[int]) -> int:
    """Rows of the scale grid of a stack; one for each channel where tiles would straddle two matrices."""
    if any(n % BLOCK for n in heights[:-1]):
        return sum(heights)
    return sum(ceil(n / BLOCK) for n in heights)


def padded(n: int, multiple: int = ALIGNMENT) -> int:
    return n + -n % multiple


@dataclass(frozen=True, slots=True)
class Weight:
    """One operand of a layer: a matrix, a stack of matrices that share their input (q, k, v), or a vector.

    names: the checkpoint's modules, or for a vector its tensor; "{}" stands for an expert's number.
    shapes: of each name, [N, K] for a matrix.
    split: which dimension ranks share out: "whole" (none), "rows" or "columns".
    heads: of each matrix whose rows are heads: with more ranks than heads, ranks share one.
    experts: how many such operands the layer has; `active` of them multiply one token (0: it is looked up).
    kept: why it is never FP8, or nothing. tied: it is another weight's matrix, stored and counted there.
    """

    component: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: str = "whole"
    heads: tuple[int, ...] = ()
    experts: int = 1
    active: int = 1
    kept: str = ""
    tied: bool = False

    @property
    def is_vector(self) -> bool:
        return self.kept == VECTOR

    @property
    def values(self) -> int:
        """Parameters: transformers' count."""
        return 0 if self.tied else self.experts * sum(prod(shape) for shape in self.shapes)

    def rank_shapes(self, tp: int) -> list[tuple[int, int]]:
        """[rows, columns] of each matrix on one of `tp` ranks. Raises OctavoError where a dimension does not split."""
        out = []
        for i, shape in enumerate(self.shapes):
            n, k = shape[0], prod(shape[1:])
            parts = min(tp, self.heads[i]) if self.heads else tp
            side = {"rows": n, "columns": k}.get(self.split, 0)
            if side % parts or (self.heads and max(tp, self.heads[i]) % parts):
                what = f"{self.heads[i]} heads do" if self.heads else f"a dimension of {side} does"
                raise OctavoError(f"{self.names[i]}: {what} not split over {tp} ranks; use a --tensor-parallel-size that does.")
            out.append((n // parts if self.split == "rows" else n, k // parts if self.split == "columns" else k))
        return out

    def nbytes(self, form: Format) -> int:
        """Bytes as stored, without padding: what the engine's report calls stored."""
        return 0 if self.tied else self.experts * self._bytes(form, 1, 1)

    def rank_bytes(self, form: Format, tp: int) -> int:
        """Bytes that one of `tp` ranks holds, padded to what FP8 units take."""
        return 0 if self.tied else self.experts * self._bytes(form, tp, ALIGNMENT)

    def operand_bytes(self, form: Format, tp: int) -> int:
        """Bytes that a product with one copy reads on one of `tp` ranks."""
        return self._bytes(form, tp, ALIGNMENT)

    def _bytes(self, form: Format, tp: int, align: int) -> int:
        shapes = self.rank_shapes(tp)
        return form.nbytes([n for n, _ in shapes], shapes[0][1], align)

    def padding(self, tp: int) -> list[tuple[int, int, int]]:
        """(whole, part, padded part) of every dimension of the stack that ALIGNMENT rounds up on one of `tp` ranks."""
        if self.is_vector:
            return []
        whole, part = self.rank_shapes(1), self.rank_shapes(tp)
        sides = [(sum(n for n, _ in whole), sum(n for n, _ in part)), (whole[0][1], part[0][1])]
        return [(full, mine, padded(mine)) for full, mine in sides if mine % ALIGNMENT]


def distinct(weights: Iterable[Weight], formats: Iterable[Format]) -> list[tuple[Weight, Format, int]]:
    """(weight, format, how many are like it): layers repeat, and their arithmetic need not."""
    found: dict[object, tuple[Weight, Format, int]] = {}
    for w, form in zip(weights, formats, strict=True):
        key = (w.component, w.shapes, w.split, w.heads, w.experts, w.active, w.kept, w.tied, form)
        count = found[key][2] if key in found else 0
        found[key] = (w, form, count + 1)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Attention:
    """What attention caches and computes, in all `layers` of a model.

    qk_dim, v_dim: of one head in the prefill. latent, rope: MLA's cache instead of keys and values, 0 for none.
    index_heads, index_dim, index_topk: DeepSeek's sparse-attention indexer, 0 for none.
    """

    layers: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    latent: int = 0
    rope: int = 0
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0

    @property
    def is_mla(self) -> bool:
        return self.latent > 0

    def stored_as(self, kv_cache_dtype: str) -> str:
        """The cache's format for a canonical --kv-cache-dtype. Raises OctavoError for one that MLA's cache has not."""
        if kv_cache_dtype in ("auto", "bfloat16") or not self.is_mla:
            return kv_cache_dtype
        if kv_cache_dtype == "fp8_e4m3":
            return "fp8_ds_mla"
        raise OctavoError(f"--kv-cache-dtype {kv_cache_dtype} is not for MLA models, whose FP8 cache is fp8_ds_mla; use fp8.")

    def token_bytes(self, stored_as: str, tp: int = 1, itemsize: int = 2) -> int:
        """Bytes of one token in one layer on one of `tp` ranks, without the indexer's. `itemsize`: of the model's dtype."""
        size = itemsize if stored_as == "auto" else 2
        if stored_as == "fp8_ds_mla":  # e4m3 latent, one FP32 scale a group of 128, BF16 rope
            return self.latent + 4 * ceil(self.latent / BLOCK) + 2 * self.rope
        if self.is_mla:  # one latent for all heads: every rank holds all of it
            return size * (self.latent + self.rope)
        heads = max(1, self.kv_heads // tp)
        if stored_as == "fp8_per_token_head":
            return heads * (self.qk_dim + self.v_dim + 2 * 4)
        return heads * (self.qk_dim + self.v_dim) * (size if stored_as in ("auto", "bfloat16") else 1)

    def index_bytes(self) -> int:
        """Bytes of one token of the indexer's keys in one layer: FP8 with an FP32 scale for 128 values. Whole on every rank."""
        return self.index_dim + 4 * ceil(self.index_dim / BLOCK)

    def cache_bytes(self, stored_as: str, tp: int = 1, itemsize: int = 2) -> int:
        """Bytes of one token in all layers on one of `tp` ranks."""
        return self.layers * (self.token_bytes(stored_as, tp, itemsize) + self.index_bytes())
