"""The types that ops and their implementations share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.distributed import TensorParallel
from octavo.kvcache import LayerCache
from octavo.platform import Platform
from octavo.quant import QTensor
from octavo.quant.scheme import BLOCK, FEW_TOKENS, Granularity, Scheme, WeightDType

__all__ = [
    "ANY_KIND", "FEW_TOKENS", "FP8_BLOCKS", "FP8_EXACT_FEW", "FP8_ROWS", "FP8_WEIGHTS", "INT4_GROUPS", "LATENT_SCRATCH",
    "PLAIN", "Activation", "CodeFormat", "DecoderParts", "DenseParts", "Dispatch", "ExpertLayerParts", "Filters",
    "FusedDecoder", "HeadNorms", "Layer", "LayerParts", "LinearImplementation", "MixtureParts", "Norm", "Operand",
    "PackedStack", "PackedWeight", "Product", "Quantized", "Reader", "Rope", "Rotation", "Routed", "Router", "Segments",
    "StackImplementation", "TakesStack", "Uncombined", "Unscaled", "Unsummed", "codes_of", "not_taken", "tokens_of",
    "values_of", "wanted",
]  # fmt: skip

# Scratch memory, in bytes, that an op on latents or index keys may allocate besides its operands and its result: for keys and
# values expanded from latents, and for index scores. The op works in chunks where it would need more; the references do not.
LATENT_SCRATCH = 768 << 20


class CodeFormat(NamedTuple):
    """The format of quantized activations [M, K] that a product reads.

    granularity: ROW has one scale a token, BLOCK one for each 128 values of a token. width: the columns K', K padded.
    """

    dtype: torch.dtype
    granularity: Granularity
    width: int

    @property
    def groups(self) -> int:
        """Number of scales of one token."""
        return 1 if self.granularity is Granularity.ROW else -(-self.width // BLOCK)


class Quantized(NamedTuple):
    """Quantized activations: codes [M, K'] (columns past K are zero) and FP32 scales [M, groups] (ROW: one group)."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Activation:
    """An op's result in the forms that its readers asked for: dense values [M, K], codes of them, or both."""

    dense: Tensor | None
    quantized: Quantized | None = None

    def values(self) -> Tensor:
        """The dense values. They exist only if a reader asked for them."""
        assert self.dense is not None, "nobody was said to read the dense values"
        return self.dense

    @property
    def tokens(self) -> int:
        return len(self.values() if self.quantized is None else self.quantized.codes)


class Unscaled(NamedTuple):
    """A product without its scales: the result is values [M, N] * row [M, 1] * column [N], which the reader computes.

    Scales are FP32. Rounding the product to BF16 commutes with scaling, and the library's GEMM is faster without scales.
    """

    values: Tensor
    row: Tensor
    column: Tensor


class Unsummed(NamedTuple):
    """This rank's part of a row-parallel product, [M, N]: the result is the sum over ranks, which the reader takes."""

    values: Tensor
    tp: TensorParallel


class Uncombined(NamedTuple):
    """Experts' results [P, N] in sorted order, whose weighted sums by token, [T, N], the reader takes (as `ops.combine`)."""

    values: Tensor
    routed: Routed
    at: Dispatch


Operand = Tensor | Activation  # the input of a product; a tensor holds dense values
Product = Tensor | Unscaled | Unsummed | Uncombined


class Filters(NamedTuple):
    """The top-k, min-p and top-p filters of a batch of rows, [rows] each, applied to probabilities in this order.

    top_k (INT32) keeps that many of the most probable tokens; the vocabulary's size keeps all. min_p (FP32) drops tokens less
    probable than min_p times the most probable one. top_p (FP32) keeps the fewest of the remaining tokens, most probable
    first, whose probabilities reach top_p times their sum. Ties go to the smaller id. max_top_k is the largest top_k.
    """

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
    """Processing of query and key heads between the QKV projection and attention: norms (or None), then rotary embedding.

    The first R dimensions of a head are rotated. cos_sin: FP32 [rows, R], cosines first, then sines. rows: int64 [T], each
    token's row of cos_sin.
    """

    norms: HeadNorms | None
    cos_sin: Tensor
    rows: Tensor


class Rotation(NamedTuple):
    """Rotary embedding of R dimensions of the queries and keys of MLA or of an indexer; cos_sin and rows as in Rope.

    interleaved: pair i is dimensions 2i and 2i + 1 (GPT-J style); otherwise it is i and i + R/2 (NeoX style).
    """

    cos_sin: Tensor
    rows: Tensor
    interleaved: bool


class Segments(NamedTuple):
    """Parts of T tokens that lie one behind the other and do not attend to one another.

    lengths: on the host, T together; None in a graph, where they change from replay to replay. starts: INT32 [parts + 1], on
    the device, where each begins, and T.
    """

    lengths: Sequence[int] | None
    starts: Tensor


class Norm(NamedTuple):
    """RMSNorm with a weight; LayerNorm if a bias is given."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None


class PackedWeight:
    """A weight [N, K] in the layout of the implementation that multiplies by it."""

    held_bytes: int  # memory held; on a device without FP8 arithmetic this exceeds the stored bytes
    reads: CodeFormat | None = None  # if set, the product also takes codes in this format
    stored: QTensor | None = None  # the argument of `keep`

    def __call__(self, x: Operand) -> Tensor:
        """x [M, K] times the transposed weight: [M, N] in x's dtype, BF16 for codes."""
        raise NotImplementedError

    def unscaled(self, x: Operand) -> Tensor | Unscaled:
        """The same product, with scales left to a reader that can apply them."""
        return self(x)

    def biased(self, x: Operand, bias: Tensor) -> Tensor:
        """The product plus bias [N], which may be added before the product is rounded."""
        return self(x).add_(bias)

    def at(self, tokens: int) -> PackedWeight:
        """What multiplies so many tokens by this weight. It reads codes, or values, as they are made for it."""
        return self

    def keep(self, q: QTensor) -> None:
        """Keep the stored weight `q` for `rows`. Memory that `q` shares with this packed weight is counted once."""
        self.held_bytes += q.nbytes - self.shared_bytes(q)
        self.stored = q

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding lookup: rows `ids` [T] of the dequantized weight, [T, K] in `dtype`. `keep` must have been called."""
        assert self.stored is not None
        return self.stored.rows(ids, dtype)

    def shared_bytes(self, q: QTensor) -> int:
        """Bytes of the stored weight `q` that this packed weight references without a copy."""
        own = {t.untyped_storage().data_ptr() for t in vars(self).values() if isinstance(t, Tensor) and has_storage(t)}
        return sum(t.nbytes for t in (q.data, q.scale) if t is not None and t.untyped_storage().data_ptr() in own)


class Router(NamedTuple):
    """How a model family chooses each token's experts. Scores are softmax, or if `sigmoid` sigmoid, of the router's logits.

    The `top_k` experts with the highest score plus bias (if there is a bias) are chosen. Only experts of the best `top_groups`
    of `groups` equal groups compete; a group's rank is the sum of its two best scores plus bias. Expert weights are the scores
    without bias, normalized to sum 1 if `normalize`, times `scale`. Ties go to the smaller id. DeepSeek-V3 (section 2.1.2)
    has the general form.
    """

    top_k: int
    sigmoid: bool = False
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


class Routed(NamedTuple):
    """Each token's experts, INT32 [T, top_k], -1 for none (padding), their weights, FP32 [T, top_k], and the pairs sorted by
    expert if the router has sorted them already.
    """

    experts: Tensor
    weights: Tensor
    at: Dispatch | None = None


class Dispatch(NamedTuple):
    """(token, expert) pairs, P = T * top_k, sorted by expert for a grouped GEMM. All INT32.

    Pair p belongs to token p // top_k. order [P]: the pair at each sorted position; place [P]: the sorted position of each
    pair; starts [E + 1]: the first sorted position of each expert. Pairs with expert -1 are sorted to the end. Products of
    pairs are [P, N] in sorted order; rows from starts[E] on are undefined.
    """

    order: Tensor
    place: Tensor
    starts: Tensor
    top_k: int

    @property
    def tokens(self) -> int:
        return len(self.order) // self.top_k


class PackedStack:
    """Experts' weights [E, N, K] in the layout of the implementation that multiplies by them (a grouped GEMM)."""

    experts: int
    n: int
    k: int
    held_bytes: int
    reads: CodeFormat | None = None  # if set, the product also takes codes in this format
    looks_at_host: bool = False  # the product synchronizes with the host, so it cannot be captured in a graph

    def at(self, tokens: int) -> PackedStack:
        """As PackedWeight.at, of a step's tokens, each of which may be several rows of the product."""
        return self

    def __call__(self, x: Operand, dispatch: Dispatch, *, of_tokens: bool) -> Tensor:
        """Grouped GEMM: each pair's row times its expert's transposed weight, [P, N] in x's dtype (BF16 for codes), sorted.

        of_tokens: x is [T, K], one row a token, gathered by pair; otherwise x is [P, K] in sorted order.
        """
        raise NotImplementedError


Reader = PackedWeight | PackedStack | None  # a consumer of an op's result; None reads dense values


def wanted(readers: Sequence[Reader], tokens: int) -> tuple[bool, CodeFormat | None]:
    """(whether these readers of so many tokens need dense values, the code format to make). With several formats, all readers
    read dense."""
    readers = [None if reader is None else reader.at(tokens) for reader in readers]
    formats = {reader.reads for reader in readers if reader is not None and reader.reads is not None}
    if len(formats) != 1:
        return True, None
    return any(reader is None or reader.reads is None for reader in readers), formats.pop()


def values_of(x: Operand) -> Tensor:
    """The dense values [M, K]."""
    return x if isinstance(x, Tensor) else x.values()


def tokens_of(x: Operand) -> int:
    """M."""
    return len(x) if isinstance(x, Tensor) else x.tokens


def codes_of(x: Operand, form: CodeFormat) -> Quantized | None:
    """The codes of x in this format, or None if x does not hold them."""
    if isinstance(x, Tensor) or (found := x.quantized) is None:
        return None
    given = found.codes.dtype, found.codes.shape[1], found.scale.shape[1]
    return found if given == (form.dtype, form.width, form.groups) else None


def has_storage(t: Tensor) -> bool:
    return t.layout is torch.strided  # oneDNN's layouts have none


Mlp = TypeVar("Mlp", PackedWeight, PackedStack)  # a weight of an MLP, or of each expert's


@dataclass(frozen=True)
class LayerParts(Generic[Mlp]):
    """A layer of a decoder: norm, attention, residual add, norm, gated SiLU MLP, residual add. Only qkv has a bias."""

    qkv: PackedWeight
    o: PackedWeight
    gate_up: Mlp
    down: Mlp
    input_norm: Tensor
    post_norm: Tensor
    norms: HeadNorms | None
    qkv_bias: Tensor | None
    cache: LayerCache
    window: int | None

    @property
    def weights(self) -> tuple[PackedWeight | Mlp, ...]:
        """In execution order."""
        return self.qkv, self.o, self.gate_up, self.down

    def at(self, tokens: int) -> Self:
        """The layer as it multiplies so many tokens."""
        gate_up, down = self.gate_up.at(tokens), self.down.at(tokens)
        return replace(self, qkv=self.qkv.at(tokens), o=self.o.at(tokens), gate_up=gate_up, down=down)


@dataclass(frozen=True)
class ExpertLayerParts(LayerParts[PackedStack]):
    """With a mixture of experts as its MLP. gate, correction: the router's weight [E, hidden] and its bias."""

    gate: Tensor
    correction: Tensor | None
    router: Router


Layer = TypeVar("Layer", bound=LayerParts[Any])


class DecoderParts(NamedTuple, Generic[Layer]):
    """The layers of a decoder and their common sizes; `inter` is the intermediate size of an MLP, or of an expert."""

    layers: Sequence[Layer]
    cos_sin: Tensor
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    ranks: int = 1  # of whose layers these are parts

    def at(self, tokens: int) -> Self:
        """The layers as they multiply so many tokens."""
        return self._replace(layers=[layer.at(tokens) for layer in self.layers])


DenseParts = DecoderParts[LayerParts[PackedWeight]]
MixtureParts = DecoderParts[ExpertLayerParts]


class FusedDecoder(Protocol):
    """A megakernel decoder: all layers of a decode step in fewer launches than op by op, for the steps that it takes, all of at
    most FEW_TOKENS tokens."""

    name: str

    def takes(self, requests: int, longest: int) -> bool:
        """Whether it computes a decode step of this many requests, one token each, with contexts up to `longest`."""

    def variant(self, requests: int, longest: int) -> Hashable:
        """A key of what its launches differ in by contexts, beside `decode_variant`: equal keys of both, equal launches."""

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """The last layer's output [requests, hidden] for embeddings x; writes the step's keys and values to the cache."""


# A kind of weight that an implementation of `linear` may support: (dtype, granularity of its scales, of the activations',
# whether those of few tokens stay as they are).
Kind = tuple[WeightDType, Granularity | None, Granularity | None, bool]
PLAIN: set[Kind] = {(WeightDType.BF16, None, None, False)}
_SCALES = Granularity.TENSOR, Granularity.ROW
FP8_ROWS: set[Kind] = {(WeightDType.FP8, scales, Granularity.ROW, False) for scales in _SCALES}
FP8_EXACT_FEW: set[Kind] = {(WeightDType.FP8, scales, Granularity.ROW, True) for scales in _SCALES}
FP8_WEIGHTS: set[Kind] = {(WeightDType.FP8, Granularity.ROW, None, False)}
INT4_GROUPS: set[Kind] = {(WeightDType.INT4, Granularity.GROUP, None, False)}
FP8_BLOCKS: set[Kind] = {(WeightDType.FP8, Granularity.BLOCK, Granularity.BLOCK, False)}
ANY_KIND = PLAIN | FP8_ROWS | FP8_EXACT_FEW | FP8_WEIGHTS | INT4_GROUPS | FP8_BLOCKS


def not_taken(scheme: Scheme, kinds: set[Kind]) -> str | None:
    """None if the scheme is one of these kinds; otherwise a description of the weight."""
    supported = (scheme.dtype, scheme.weight, scheme.activation, scheme.exact_few) in kinds
    return None if supported else f"the weight is {scheme.kind}"


class StackImplementation(Protocol):
    """One implementation of a grouped GEMM over a stack of experts."""

    name: str

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        """As LinearImplementation.supports."""

    def pack(self, q: QTensor, platform: Platform) -> PackedStack: ...


@runtime_checkable
class TakesStack(Protocol):
    """A StackImplementation whose packed stack may be in the memory of the stored one."""

    def take(self, q: QTensor, platform: Platform) -> PackedStack:
        """As `pack`, of a stack that nobody else reads, before or after."""


class LinearImplementation(Protocol):
    """One implementation of a product by a QTensor."""

    name: str

    def supports(self, q: QTensor, platform: Platform) -> str | None:
        """None, or the reason why not. Supports exactly the dtypes and granularities that it lists."""

    def pack(self, q: QTensor, platform: Platform) -> PackedWeight: ...
