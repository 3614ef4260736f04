"""The types that ops and their implementations share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import LayerCache
from octavo.platform import Platform
from octavo.quant import QTensor
from octavo.quant.scheme import BLOCK, Granularity, Scheme, WeightDType

__all__ = [
    "FP8_BLOCKS", "FP8_ROWS", "INT4_GROUPS", "LATENT_SCRATCH", "PLAIN", "Activation", "CodeFormat", "DecoderParts", "Dispatch",
    "Filters", "FusedDecoder", "HeadNorms", "LayerParts", "LinearImplementation", "Norm", "Operand", "PackedStack",
    "PackedWeight", "Product", "Quantized", "Reader", "Rope", "Rotation", "Routed", "Router", "StackImplementation",
    "Unscaled", "codes_of", "not_taken", "values_of", "wanted",
]  # fmt: skip

# Bytes that an op on latents or index keys may take for itself, beside its operands and its result: keys and values that are
# made of latents, scores of index keys. It computes in parts what would take more; the references do not.
LATENT_SCRATCH = 768 << 20


class CodeFormat(NamedTuple):
    """Which codes of activations [M, K] a product reads: their dtype, which of a token's values share a scale (ROW: all;
    BLOCK: each 128), and their columns K'."""

    dtype: torch.dtype
    granularity: Granularity
    width: int

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return 1 if self.granularity is Granularity.ROW else -(-self.width // BLOCK)


class Quantized(NamedTuple):
    """Activations as codes [M, K'] (columns past K are zero) with FP32 scales [M, groups]; one group where a token has one."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Activation:
    """What an op makes for those who read its result: dense values [M, K], codes of them, or both."""

    dense: Tensor | None
    quantized: Quantized | None = None

    def values(self) -> Tensor:
        """The dense values, which there are where some reader asked for them."""
        assert self.dense is not None, "nobody was said to read the dense values"
        return self.dense

    @property
    def tokens(self) -> int:
        return len(self.values() if self.quantized is None else self.quantized.codes)


class Unscaled(NamedTuple):
    """A product whose scales its reader is to apply: values [M, N] * row [M, 1] * column [N]. FP32 scales.

    Rounding to BF16 does not depend on a scale, and a library multiplies faster without.
    """

    values: Tensor
    row: Tensor
    column: Tensor


Operand = Tensor | Activation  # of a product; a tensor is dense values
Product = Tensor | Unscaled


class Filters(NamedTuple):
    """Which of a row's tokens are drawn from, [rows] each: the `top_k` argmax (INT32; the vocabulary's size: all), of those
    that are at least `min_p` times as likely as the argmax, and of these the fewest, the argmax first, that have `top_p`
    of their sum (FP32). Of equal ones those with smaller ids come first. `most` is the largest of top_k."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    max_top_k: int


class HeadNorms(NamedTuple):
    """RMSNorm of each query and key head: weights [head_dim] and epsilon."""

    q: Tensor
    k: Tensor
    eps: float


class Rope(NamedTuple):
    """What happens to query and key heads before attention: norms (None: none), then rotation of their first R dimensions by
    the angles whose cosines, then sines, are in a token's row of cos_sin: FP32 [rows, R]. rows: int64 [T]."""

    norms: HeadNorms | None
    cos_sin: Tensor
    rows: Tensor


class Rotation(NamedTuple):
    """Rotation of R dimensions of MLA's or an indexer's queries and keys; cos_sin and rows as Rope has them.

    interleaved: dimension 2i is rotated with 2i + 1, by angle i; else i with i + R/2.
    """

    cos_sin: Tensor
    rows: Tensor
    interleaved: bool


class Norm(NamedTuple):
    """RMSNorm by a weight, or, where there is a bias, LayerNorm."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None


class PackedWeight:
    """A weight laid out for the implementation that multiplies by it."""

    held_bytes: int  # memory that it takes, which on a device without FP8 arithmetic is more than what is stored
    reads: CodeFormat | None = None  # set, it also takes such codes
    stored: QTensor | None = None  # what `keep` was given

    def __call__(self, x: Operand) -> Tensor:
        """x [M, K] times the transposed weight: [M, N] in x's dtype, BF16 for codes."""
        raise NotImplementedError

    def unscaled(self, x: Operand) -> Product:
        """The same product, for a reader that applies scales itself."""
        return self(x)

    def keep(self, q: QTensor) -> None:
        """Hold `q`, which this weight was made of, for `rows`. What it shares with this weight takes no memory again."""
        self.held_bytes += q.nbytes - self.shared_bytes(q)
        self.stored = q

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [T] of the weight in `dtype`, [T, K], of codes times their scales. Of a weight that keeps its codes."""
        assert self.stored is not None
        return self.stored.rows(ids, dtype)

    def shared_bytes(self, q: QTensor) -> int:
        """Bytes of `q`, which this weight was made of, that are this weight's own memory and no copy."""
        own = {t.untyped_storage().data_ptr() for t in vars(self).values() if isinstance(t, Tensor) and has_storage(t)}
        return sum(t.nbytes for t in (q.data, q.scale) if t is not None and t.untyped_storage().data_ptr() in own)


class Router(NamedTuple):
    """How a family chooses each token's experts from their scores, which are logits through softmax or, if `sigmoid`, sigmoid.

    `top_k` of them, by score plus bias where there is one, are chosen; only from the `top_groups` of `groups` equal groups
    whose two best add up to most. Their weights are the scores without the bias, made to add up to 1 if `normalize`, times
    `scale`. Of equal ones those with smaller ids come first (DeepSeek-V3, section 2.1.2, has the general form).
    """

    top_k: int
    sigmoid: bool = False
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


class Routed(NamedTuple):
    """Each token's experts, INT32 [T, top_k], -1 where none is woken, and the weights of what they give, FP32 [T, top_k]."""

    experts: Tensor
    weights: Tensor


class Dispatch(NamedTuple):
    """Pairs of a token and an expert, P = T * top_k in the order of tokens, sorted by expert. All INT32.

    order [P]: the pair at each place; place [P]: the place of each pair; starts [E + 1]: where an expert's begin. Pairs that
    wake no expert are behind the last. Products of pairs are [P, N], in sorted order; behind starts[E] they are anything.
    """

    order: Tensor
    place: Tensor
    starts: Tensor
    top_k: int


class PackedStack:
    """Experts' weights [E, N, K] laid out for the implementation that multiplies by them."""

    experts: int
    n: int
    k: int
    held_bytes: int
    reads: CodeFormat | None = None  # set, it also takes such codes
    looks_at_host: bool = False  # whether a product waits for the device, and so cannot be captured

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        """Each pair's row times its expert's transposed weight: [P, N] in x's dtype, BF16 for codes, in sorted order.

        `of_tokens`: x is [T, K], and a pair's row is its token's; else x is [P, K], in sorted order.
        """
        raise NotImplementedError


Reader = PackedWeight | PackedStack | None  # of an op's result: a weight, or whatever reads dense values


def wanted(readers: Sequence[Reader]) -> tuple[bool, CodeFormat | None]:
    """Whether dense values are to be made for these, and which codes. Readers of different codes all read dense values."""
    formats = {reader.reads for reader in readers if reader is not None and reader.reads is not None}
    if len(formats) != 1:
        return True, None
    return any(reader is None or reader.reads is None for reader in readers), formats.pop()


def values_of(x: Operand) -> Tensor:
    """The dense values [M, K]."""
    return x if isinstance(x, Tensor) else x.values()


def codes_of(x: Operand, form: CodeFormat) -> Quantized | None:
    """The codes in this format, where x has them."""
    if isinstance(x, Tensor) or (found := x.quantized) is None:
        return None
    given = found.codes.dtype, found.codes.shape[1], found.scale.shape[1]
    return found if given == (form.dtype, form.width, form.groups) else None


def has_storage(t: Tensor) -> bool:
    return t.layout is torch.strided  # oneDNN's layouts have none


class LayerParts(NamedTuple):
    """A layer of a dense decoder: norm, attention, add, norm, gated SiLU MLP, add. No biases but that of qkv."""

    qkv: PackedWeight
    o: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    input_norm: Tensor
    post_norm: Tensor
    norms: HeadNorms | None
    qkv_bias: Tensor | None
    cache: LayerCache
    window: int | None

    @property
    def weights(self) -> tuple[PackedWeight, ...]:
        """In the order in which they are multiplied by."""
        return self.qkv, self.o, self.gate_up, self.down


class DecoderParts(NamedTuple):
    """The layers of a decoder and the numbers that they share; `inter` is the width between the MLP's products."""

    layers: Sequence[LayerParts]
    cos_sin: Tensor
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float


class FusedDecoder(Protocol):
    """All layers of a decoder in fewer launches than op by op, for some steps."""

    name: str
    attends: bool  # its launches hold attention, so that they are the same for contexts of all lengths

    def takes(self, requests: int, longest: int) -> bool:
        """Whether it computes a step of so many requests, one token each, with contexts up to `longest`."""

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """What the last layer leaves, [requests, hidden], of the embeddings x; keys and values are written to the cache."""


# What an implementation of `linear` may take: a weight's dtype, the granularity of its scales, and of its activations'.
Kind = tuple[WeightDType, Granularity | None, Granularity | None]
PLAIN: set[Kind] = {(WeightDType.BF16, None, None)}
FP8_ROWS: set[Kind] = {(WeightDType.FP8, scales, Granularity.ROW) for scales in (Granularity.TENSOR, Granularity.ROW)}
INT4_GROUPS: set[Kind] = {(WeightDType.INT4, Granularity.GROUP, None)}
FP8_BLOCKS: set[Kind] = {(WeightDType.FP8, Granularity.BLOCK, Granularity.BLOCK)}


def not_taken(scheme: Scheme, kinds: set[Kind]) -> str | None:
    """None for a scheme of one of these kinds; for others, what the weight is."""
    taken = (scheme.dtype, scheme.weight, scheme.activation) in kinds
    return None if taken else f"the weight is {scheme.kind}"


class StackImplementation(Protocol):
    """One way to multiply by a stack of experts."""

    name: str

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        """As LinearImplementation has it."""

    def pack(self, q: QTensor, platform: Platform) -> PackedStack: ...


class LinearImplementation(Protocol):
    """One way to multiply by a QTensor."""

    name: str

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        """None, or why not. It takes what it names, by dtype and granularity, and nothing else."""

    def pack(self, q: QTensor, platform: Platform) -> PackedWeight: ...
