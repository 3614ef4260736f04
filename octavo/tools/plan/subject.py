"""What is planned: a model on one kind of accelerator, built and walked once for each way to serve it and number of ranks."""

from __future__ import annotations

import fnmatch
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch

from octavo.config import EngineConfig
from octavo.distributed import TensorParallel
from octavo.engine.loading import checkpoint_scheme
from octavo.errors import OctavoError
from octavo.kvcache import KVCacheSpec, Layout
from octavo.models import build_model, number_of_layers
from octavo.platform import Described
from octavo.quant import SCHEMES, Granularity, QuantRules, Scheme
from octavo.stages import Stages
from octavo.tools.plan.accelerators import Accelerator
from octavo.tools.plan.model_source import Source
from octavo.tools.plan.operands import Walk
from octavo.tools.plan.roofline import Attention, is_index
from octavo.tools.plan.walk import Known, walk
from octavo.weights import Loader
from octavo.weights.meta import MetaSource

__all__ = ["WHOLE", "Machine", "Stage", "Subject", "Variant"]

Stage = tuple[int, int]  # of a pipeline: its number, and how many there are
WHOLE: Stage = (0, 1)
KV_NAMES = {
    "auto": "",
    "bfloat16": "",
    "fp8_e4m3": " + FP8 KV",
    "fp8_e5m2": " + e5m2 KV",
    "fp8_per_token_head": " + per-head FP8 KV",
}
NAMES = {"bf16": "BF16", "fp8": "FP8", "ptpc_fp8": "PTPC", "fp8_block": "FP8 block", "fp8_w8a16": "W8A16"}


@dataclass(frozen=True)
class Machine(Described):
    """An accelerator, or a CPU, as the engine would find it."""

    cpu: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.cpu


@dataclass(frozen=True)
class Variant:
    """A way to serve: the scheme of what is BF16 on disk, whether codes on disk are kept, the cache's dtype.

    itemsize: bytes of a value that is not quantized.
    """

    scheme: str
    native: bool
    kv: str
    itemsize: int = 2

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.itemsize == 4 else torch.bfloat16

    @property
    def weights_label(self) -> str:
        if not self.native:
            return "FP32" if self.scheme == "bf16" and self.itemsize == 4 else NAMES[self.scheme]
        return "native" if self.scheme == "bf16" else f"native, rest {NAMES[self.scheme]}"

    @property
    def label(self) -> str:
        return self.weights_label + KV_NAMES[self.kv]


class Subject:
    """A model on an accelerator of whose memory a driver's context takes `context` bytes, and `exchange` what several
    exchange by.

    Raises OctavoError, in the engine's words, for a config.json of which no model can be made.
    """

    def __init__(self, source: Source, config: EngineConfig, on: Accelerator, context: int = 0, exchange: int = 0):
        self.source, self.config, self.on, self.exchange = source, config, on, exchange
        free = on.free if on.is_cpu else on.memory - context
        self.machine = Machine(torch.device("meta"), on.arch, cpu=on.is_cpu, free=free, total=on.memory)
        self._built = cache(self._build)
        self._walked, self._cached = cache(self._walk), cache(self._caches)
        self._known: Known = {}
        self.model(1)  # says what cannot be made
        self.stored = MetaSource(source.tensors, source.stored_format, described=source.described, has_any=not source.tensors)
        self.plain = MetaSource({}, has_any=True)

    def model(self, tp: int, stage: Stage = WHOLE) -> Any:
        """As `_build` makes it, once."""
        return self._built(tp, stage)

    def _build(self, tp: int, stage: Stage) -> Any:
        """One rank's model, not loaded. Raises OctavoError where heads do not split over `tp` ranks, or layers over stages."""
        several = tp > 1
        whole = several and self.config.mm_encoder_tp_mode == "data"
        experts, stages = several and self.config.enable_expert_parallel, Stages(*stage, tp)
        ranks = TensorParallel(0, tp, expert_parallel=experts, whole_towers=whole, stages=stages)
        one = 1  # position: a longer rotary table is not needed
        own = stages.layers(number_of_layers(self.source.config)) if stages.count > 1 else None
        return build_model(self.source.config, ranks, one, own, vision=self.config.reads_images and own is None)

    @property
    def model_type(self) -> str:
        return str(self.source.config.get("model_type"))

    @property
    def longest(self) -> int:
        """The longest context that the model was made for."""
        return int(self.model(1).config.longest_context)

    @property
    def attention(self) -> Attention:
        caches = self.caches(Variant("bf16", False, "auto"), 1)
        return Attention.of(self.model(1).config, sum(map(is_index, caches)))

    @property
    def itemsize(self) -> int:
        """Bytes of a value that is not quantized."""
        return 4 if self.config.dtype == "float32" else 2

    @cached_property
    def base(self) -> Walk:
        """What is stored, on one rank, and what is wrong with it: every tensor is looked at."""
        return walk(self.model(1), self.stored, QuantRules(), self.machine, torch.bfloat16, self._known, every=True)

    @cached_property
    def quantized(self) -> bool:
        """Whether the checkpoint is."""
        return any(o.quantized for o in self.base.operands)

    def head_scheme(self) -> Scheme:
        """What --quantize-lm-head means without --quantization. Raises OctavoError where the checkpoint has no one scheme."""
        assert self.base  # what config.json declares is there once it was asked for
        return checkpoint_scheme(Loader(self.stored, self.machine, QuantRules(), torch.bfloat16))

    def walk(self, variant: Variant, tp: int, stage: Stage = WHOLE) -> Walk:
        """One rank's weights. Raises OctavoError where they do not split over `tp` ranks."""
        found = self._walked(replace(variant, kv="auto"), tp, stage)
        if tp > 1 and (new := [text for text in found.problems if text not in self.base.problems]):
            raise OctavoError(new[0])
        return found

    def check_patterns(self, variant: Variant) -> None:
        """Raises OctavoError, as loading does, for a pattern of --quantization-ignore that names no layer of the checkpoint,
        and for --decode-activations where no layer has activations in FP8."""
        rules = self.walk(variant, 1).rules
        for pattern in self.model(1).ignored if rules.ignore else ():
            for name in fnmatch.filter(self.stored.names, pattern):
                rules.ignored(name.rpartition(".")[0])
        rules.check_used()
        replace(rules, exact_few=self.config.decode_activations == "bf16").check_activations()

    def _walk(self, variant: Variant, tp: int, stage: Stage) -> Walk:
        config, scheme, head = self.config, SCHEMES[variant.scheme], None
        if config.quantize_lm_head and variant.native and not scheme.quantized:
            with suppress(OctavoError):  # said where refusals are
                head = self.head_scheme()
        rules = QuantRules(scheme, config.quantization_ignore, config.quantize_lm_head, head)
        rules.exact_few = config.decode_activations == "bf16" and (variant.native or scheme.activation is Granularity.ROW)
        source = self.stored if variant.native else self.plain
        return walk(self.model(tp, stage), source, rules, self.machine, variant.dtype, self._known)

    def caches(self, variant: Variant, tp: int, stage: Stage = WHOLE) -> list[KVCacheSpec]:
        """All caches of one rank. Raises OctavoError for a format that the model has not."""
        return self._cached(variant.kv, variant.dtype, tp, stage)

    def _caches(self, kv: str, dtype: torch.dtype, tp: int, stage: Stage) -> list[KVCacheSpec]:
        layout = Layout.on(self.machine.is_cpu)
        found: list[KVCacheSpec] = self.model(tp, stage).kv_specs(kv, dtype, self.machine.fp8_dtype, layout)
        return found

    def token_bytes(self, variant: Variant, tp: int, stage: Stage = WHOLE) -> tuple[int, int]:
        """Bytes of a token in all caches of one rank: of what attention reads, and of the indexer's keys."""
        specs = self.caches(variant, tp, stage)
        index = sum(spec.bytes_per_token for spec in specs if is_index(spec))
        return sum(spec.bytes_per_token for spec in specs) - index, index

    def cache_format(self, variant: Variant) -> str:
        """How keys and values, or latents, are stored, as `--kv-cache-dtype` has it."""
        return next(spec.name for spec in self.caches(variant, 1) if not is_index(spec))

    def kv_word(self, kv_cache_dtype: str, itemsize: int) -> str:
        """The canonical `--kv-cache-dtype` that stands for what a model of such values makes of the given one: `auto` for its
        own dtype, fp8_e4m3 for MLA's FP8, which is also what `auto` means where attention is sparse and the model BF16."""
        is_mla_fp8 = self.cache_format(Variant("bf16", False, kv_cache_dtype, itemsize)) == "fp8_ds_mla"
        return "fp8_e4m3" if is_mla_fp8 else kv_cache_dtype

    def own_kv(self, itemsize: int) -> str:
        """The `--kv-cache-dtype` of a cache in the dtype of such values."""
        return "auto" if self.kv_word("auto", itemsize) == "auto" else "bfloat16"
