"""What quantizing a checkpoint makes of each tensor, known from the headers and config.json before any weight is read.

The output is compressed-tensors' `float-quantized` layout, which transformers, vLLM and SGLang read: `weight` in e4m3fn and
`weight_scale` in FP32 beside it, [1], [N, 1] or [ceil(N/128), ceil(K/128)]; octavo.convert.output_config has its config.json.
Packed INT4 stays as it is stored, unless it is asked for otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from octavo.convert.cache_scales import SCALES, CacheScales
from octavo.errors import OctavoError
from octavo.quant import QuantRules, Scheme
from octavo.quant.formats import COMPANIONS, int4_group, served_scheme, stored_scheme, stored_shape
from octavo.quant.qtensor import scale_shape
from octavo.quant.scheme import BF16, BLOCK, FP8_BLOCK, Granularity, WeightDType, int4_of
from octavo.weights.checkpoint import Checkpoint, RowReader, Rows, StoredTensor
from octavo.weights.leftovers import check_scaled

__all__ = ["Piece", "Plan", "names_of"]

BESIDE_INT4 = ("weight_scale", "weight_shape")
CHUNK = 1 << 20  # values converted at a time: enough to outweigh the cost of calling torch, little enough for a cache
# A module's name does not say whether it is a linear layer, but these are what architectures call theirs. The last component
# of the name is asked; Kimi's projector has a number behind it. GPT-2's c_proj holds its matrix transposed, and the indexer's
# weights_proj is too small to gain. A tower's patch embedding is a `proj` too, but no matrix: its kernel has 4 or 5 dimensions.
LINEAR = re.compile(
    r"(^|\.)(?!weights_proj$|c_proj$)([^.]*_proj|[^.]*_proj_with_mqa|wq_b|wk|wqkv|wo|w[123]|fc[012]|linear_fc[12]|qkv"
    r"|proj(\.\d+)?|dense|query_key_value|dense_h_to_4h|dense_4h_to_h)$"
)
EMBEDDING = re.compile(r"embed|(^|\.)wte$|(^|\.)wpe$")
# MLA's, which makes keys and values of latents. Engines multiply it head by head into queries and outputs that are in no codes
# ("absorbed"), so codes of it would be decoded when loaded: error for nothing. Octavo's own --quantization leaves it, too.
ABSORBED = "kv_b_proj"
# Engines stack these into one operand, which must be of one scheme.
STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("w1", "w3"))


@dataclass(frozen=True)
class Piece:
    """A stored tensor and what becomes of it: copied as it is, or a matrix [N, K] that gets a scheme."""

    tensor: StoredTensor
    module: str = ""
    shape: tuple[int, int] = (0, 0)
    scheme: Scheme | None = None  # None: copied. BF16: a matrix that was stored quantized and is to be dense
    stored: Scheme | None = None  # the FP8 scheme that it has; None for dense ones and other formats
    is_packed: bool = False
    int4: Scheme | None = None  # of packed codes that are copied
    is_measured: bool = False  # a scale of the KV cache, which the checkpoint does not have: `tensor` is what will be written

    @property
    def is_kept(self) -> bool:
        """Whether the stored codes are what is asked for."""
        return self.scheme is not None and self.stored is not None and self.scheme.weight is self.stored.weight

    @property
    def granularity(self) -> Granularity:
        assert self.scheme is not None
        assert self.scheme.weight is not None
        return self.scheme.weight

    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what is written."""
        if self.scheme is None:
            return [(self.tensor.name, self.tensor.dtype, self.tensor.shape)]
        weight = f"{self.module}.weight"
        if self.scheme.dtype is WeightDType.BF16:
            return [(weight, "BF16", self.shape)]
        return [(weight, "F8_E4M3", self.shape), (f"{weight}_scale", "F32", self.scale_shape())]

    def scale_shape(self) -> tuple[int, ...]:
        return (1,) if self.granularity is Granularity.TENSOR else scale_shape(self.shape, self.granularity)

    def row_parts(self) -> list[Rows]:
        """The matrix in parts of about CHUNK values, tiles whole where there are any."""
        n, k = self.shape
        tiled = any(scheme is not None and scheme.weight is Granularity.BLOCK for scheme in (self.scheme, self.stored))
        unit = BLOCK if tiled else 1
        step = max(unit, CHUNK // k // unit * unit)
        return [Rows(start=start, stop=min(start + step, n)) for start in range(0, n, step)]


class Plan:
    """The pieces of every file. Raises OctavoError for what cannot be done, before anything is written.

    `requantize_int4`: packed INT4 is decoded and gets the rules' scheme, too; else its codes are copied. cache_scales: those
    that calibration will measure, each in the file of its attention's first tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        reader: RowReader,
        config: dict[str, Any],
        rules: QuantRules,
        *,
        requantize_int4: bool = False,
        cache_scales: CacheScales | None = None,
    ):
        self.checkpoint, self.reader, self.config, self.rules = checkpoint, reader, config, rules
        self.cache_scales = cache_scales
        self.modules = {name for tensor in checkpoint.tensors.values() if (name := _module(tensor))}
        self.scaled = {name for name in self.modules if self._is_stored_quantized(name)}
        self.packed = {name: int4_scheme(reader, name) for name in sorted(self.modules) if reader.has(f"{name}.weight_packed")}
        self.int4 = {} if requantize_int4 else self.packed
        self.operands: dict[str, list[str]] = {}
        for name in sorted(self.modules):
            self.operands.setdefault(_operand(name), []).append(name)
        self.scheme_of = cache(self._scheme_of)
        self.files = {file: list(self._pieces(tensors)) for file, tensors in checkpoint.files.items()}
        for piece in self._measured():
            self.files[piece.tensor.file].append(piece)
        self.pieces = [piece for pieces in self.files.values() for piece in pieces]
        self._check()

    def _is_stored_quantized(self, module: str) -> bool:
        return any(self.reader.has(f"{module}.{end}") for end in ("weight_scale", "weight_scale_inv", "weight_packed"))

    def _pieces(self, tensors: list[StoredTensor]) -> Iterator[Piece]:
        for tensor in tensors:
            owner, _, end = tensor.name.rpartition(".")
            if owner in self.scaled and owner not in self.packed:
                check_scaled(tensor.name, lambda name: self.reader.read(name, None))
            if owner in self.scaled and end in COMPANIONS and not (owner in self.int4 and end in BESIDE_INT4):
                continue  # written anew, or not needed: activations are scaled by what they are
            yield self._matrix(tensor, _module(tensor)) if _module(tensor) else self._other(tensor)

    def _measured(self) -> Iterator[Piece]:
        """The scales of the KV cache."""
        if (scales := self.cache_scales) is None:
            return
        for module in scales.heads:
            file = next(tensor.file for tensor in self.checkpoint.tensors.values() if tensor.name.startswith(f"{module}."))
            for name in SCALES:
                shape = scales.shape(module)
                yield Piece(StoredTensor(f"{module}.{name}", "F32", shape, file, 0, 4 * prod(shape)), is_measured=True)

    def _other(self, tensor: StoredTensor) -> Piece:
        if len(tensor.shape) == 3 and "experts" in tensor.name and not self.rules.ignored(tensor.name):
            raise OctavoError(
                f"{tensor.name} stacks the matrices of {tensor.shape[0]} experts in one tensor, which this version does not "
                "quantize; save them one by one, or leave them in BF16 with --quantization-ignore '*.experts.*'."
            )
        return Piece(tensor)

    def _matrix(self, tensor: StoredTensor, module: str) -> Piece:
        quantized, last = module in self.scaled, module.rpartition(".")[2]
        if not quantized and not (LINEAR.search(module) or last == "lm_head"):
            return Piece(tensor)
        shape = stored_shape(self.reader, module)
        if module in self.int4:
            self.rules.ignored(module)  # a pattern that names it is not a typing error
            return Piece(tensor, module, shape, is_packed=True, int4=self.int4[module])
        stored = stored_scheme(self.reader, module, shape)
        if last == ABSORBED:  # stored codes of the asked scheme are kept, others decoded
            self.rules.ignored(module)
            asked = stored if stored is self.rules.scheme else BF16
        else:
            asked = self.scheme_of(_operand(module), is_head=last == "lm_head" and not quantized)
        if not quantized and asked.dtype is WeightDType.BF16:
            return Piece(tensor)
        if not shape[0] * shape[1]:
            return Piece(tensor)
        return Piece(tensor, module, shape, asked, stored, tensor.name.endswith("_packed"))

    def _scheme_of(self, operand: str, is_head: bool) -> Scheme:
        return self.rules.scheme_for(self.operands[operand], is_head=is_head)

    def _check(self) -> None:
        self.rules.check_used()
        if self.rules.scheme.dtype not in (WeightDType.BF16, WeightDType.FP8):
            raise OctavoError(
                f"Octavo writes checkpoints in FP8, not in {self.rules.scheme.name}; use ptpc_fp8, fp8, fp8_block or fp8_w8a16."
            )
        if not self.quantized and self.int4:
            raise OctavoError(
                "every linear layer of this checkpoint that could be quantized is stored in INT4, which stays as it is; serve "
                "it without --save-quantized, or let octavo quantize --requantize-int4 round it to "
                f"{self.rules.scheme.name}, in twice the bytes."
            )
        if not self.quantized:
            raise OctavoError(
                f"no linear layer was recognized among the {len(self.checkpoint.tensors)} tensors of this checkpoint "
                f"(model_type '{self.config.get('model_type')}'), so there is nothing to quantize."
            )
        tied = self.config.get("tie_word_embeddings") is True
        if self.rules.quantize_lm_head and (tied or not any(p.module.rpartition(".")[2] == "lm_head" for p in self.quantized)):
            raise OctavoError(
                "--quantize-lm-head: this checkpoint has no lm_head of its own (its head is the embedding matrix, which a "
                "checkpoint that other engines read has in BF16); leave the flag out here, and give it to octavo serve, which "
                "quantizes the matrix when it loads it."
            )

    def check_rounds(self, flag: str, *, by_text: bool) -> None:
        """Raises OctavoError where `flag` says how matrices are rounded and the stored codes of all are kept.

        by_text: it is of those alone that a text reads, which no head is.
        """
        kept = [piece for piece in self.quantized if piece.is_kept]
        if kept and not any(
            not p.is_kept and not (by_text and p.module.rpartition(".")[2] == "lm_head") for p in self.quantized
        ):
            raise OctavoError(
                f"{flag}: {self.checkpoint.directory} has FP8 codes already ({self._stored_in(kept)}), which are kept as they "
                "are, so there is nothing to round; use it on the BF16 checkpoint that they were made of, or leave it out."
            )

    def _stored_in(self, pieces: Iterable[Piece]) -> str:
        """The schemes that these are served in where none is asked for."""
        found = (served_scheme(self.reader, piece.module, piece.shape) for piece in pieces)
        return ", ".join(sorted({scheme.name if scheme else "INT4" for scheme in found}))

    @property
    def quantized(self) -> list[Piece]:
        """Matrices that the output holds in FP8."""
        return [piece for piece in self.pieces if piece.scheme is not None and piece.scheme.dtype is WeightDType.FP8]

    def ignored(self) -> list[str]:
        """Modules that may be of class Linear and stay as they are: what the config's `ignore` must name."""
        done = {piece.module for piece in self.quantized}
        left = {name for name in self.modules - done - self.int4.keys() if not EMBEDDING.search(name)}
        return sorted(left | ({"lm_head"} if "lm_head" not in done else set()))

    def notes(self) -> list[str]:
        """What a person should know of the choices, one line each."""
        name = self.rules.scheme.name
        kept = [p for p in self.quantized if p.is_kept]
        lossy = [p for p in self.quantized if not p.is_kept and (p.stored or p.is_packed)]
        dense = [p for p in self.pieces if p.scheme is BF16]
        lines = [f"{len(self.quantized)} matrices to {name}: {names_of([p.module for p in self.quantized])}"]
        if self.rules.scheme is FP8_BLOCK and (
            odd := [p.module for p in self.quantized if any(size % BLOCK for size in p.shape)]
        ):
            lines.append(
                f"{len(odd)} matrices do not divide into 128x128 tiles: transformers fails in its first forward pass, "
                f"most vLLMs at load; take ptpc_fp8 for these: {names_of(odd)}"
            )
        if self.int4:
            lines.append(f"{len(self.int4)} matrices are stored in INT4 and stay so, bit for bit: {names_of([*self.int4])}")
        if left := self.ignored():
            lines.append(f"left in the model's dtype, besides embeddings and norms: {names_of(left)}")
        if kept:
            stored = self._stored_in(kept)
            told = f"{len(kept)} matrices are stored in {stored} already; their codes are kept bit for bit"
            anew = f", and what is written of activations (input_activations in config.json) becomes {name}'s"
            lines.append(told + anew * (stored != name))
        if lossy:
            lines.append(
                f"{len(lossy)} matrices are stored in {self._stored_in(lossy)} and are rounded a second time, which loses "
                "some more; the original BF16 checkpoint would give better ones"
            )
        if dense:
            lines.append(f"{len(dense)} matrices stored quantized become BF16: {names_of([p.module for p in dense])}")
        return lines


def _module(tensor: StoredTensor) -> str:
    """The module whose matrix this tensor is, "" for other tensors."""
    name, _, end = tensor.name.rpartition(".")
    return name if end in ("weight", "weight_packed") and len(tensor.shape) == 2 else ""


def int4_scheme(reader: RowReader, module: str) -> Scheme:
    """Of a packed matrix. Raises OctavoError for INT4 of a kind that is not read."""
    return int4_of(int4_group(reader, module, stored_shape(reader, module)))


def _operand(module: str) -> str:
    """A name for the operand that engines make of this module and others: of its stack, and of all experts of a layer."""
    parent, dot, last = module.rpartition(".")
    stack = next((stack for stack in STACKS if last in stack), (last,))
    return re.sub(r"\.experts\.\d+$", ".experts.*", parent) + dot + "/".join(stack)


def names_of(modules: list[str]) -> str:
    """Names with their layers' numbers left out."""
    short = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules))
    return ", ".join(short[:12]) + (f" and {len(short) - 12} more" if len(short) > 12 else "")
