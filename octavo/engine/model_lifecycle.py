"""A model on this rank's device from its load to its sleep: weights, the KV cache and graphs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from octavo import batch as batches
from octavo import ops
from octavo.config import EngineConfig
from octavo.engine.compiling import beside, compiling
from octavo.engine.encoder import make_encoder
from octavo.engine.first_logits import check_first_logits
from octavo.engine.graphs.cpu_replay import RecordedSteps
from octavo.engine.graphs.decode import LARGEST, DecodeGraphs
from octavo.engine.graphs.prefill import PrefillGraphs
from octavo.engine.joining import Found, device_and_ranks
from octavo.engine.kv_setup import cache_format, cache_specs, calibration_tokens, set_kv_scales
from octavo.engine.load_summary import cache_line, describe, without_effect
from octavo.engine.loading import load_model, make_model
from octavo.engine.memory import plan_blocks
from octavo.engine.model_step import ModelStep
from octavo.engine.pipeline import Pipeline
from octavo.engine.place import Place
from octavo.engine.reloading import check_reload, drop, reload_model, restore
from octavo.engine.sampler import warm_up
from octavo.engine.token_history import Histories
from octavo.engine.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.host import keep
from octavo.kvcache import KVCache
from octavo.messages import Progress
from octavo.models import read_config
from octavo.models.interface import FusedModel
from octavo.models.overrides import overridden
from octavo.quant.checks import check_format
from octavo.weights import LoadReport

__all__ = ["ModelLifecycle"]

ALONE = Place()
log = logging.getLogger(__name__)


class ModelLifecycle:
    """Loads a model and makes it runnable. Raises OctavoError for every error that the user can fix. `found`: device and ranks.

    After `sleep`, `load_weights` and `make_runnable` bring back what it freed.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None, place: Place = ALONE, found: Found = None):
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // config.devices_here))
        self.config, self.progress = config, progress
        self.platform, self.tp = found or device_and_ranks(config, place)
        tp, cpu = self.tp, self.platform.is_cpu
        self.block_size, self.max_num_batched_tokens = config.block_size_on(cpu), config.step_tokens_on(cpu)
        ops.bind(self.platform, tp)
        self.directory = Path(config.model)
        self.json_config = read_config(self.directory)
        json_config = overridden(self.json_config, cast("dict[str, Any] | None", config.hf_overrides))
        check_format(json_config, self.directory)
        self.dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        self.model, self.limits = make_model(json_config, tp, config, self.platform, self.dtype)
        self.model_type: str = json_config["model_type"]  # which the model was made by
        self.vocabulary = Vocabulary(self.limits.vocab_size, tp)
        self.pipeline = Pipeline(self.model, tp, place.pulse, ahead=not cpu)
        self.pipeline.connect()
        self.step = ModelStep(self.model, self.vocabulary, self.pipeline)
        self.encoder, self.histories = make_encoder(self.model, self.platform, tp), Histories(self.platform.device)
        with compiling(self.platform, tp, place):
            self.load_weights()
            self.make_runnable()

    def load_weights(self) -> None:
        """Loads the weights, which `sleep` frees."""
        self.platform.release()  # memory of an earlier engine in this process must count as free
        self._loaded(load_model(self.model, self.config, self.platform, self.dtype, self.progress, self.tp)[0])

    def _loaded(self, report: LoadReport) -> None:
        self.report = report
        report.notes.extend(without_effect(self.config, self.platform, self.tp, self.encoder is not None))

    def make_runnable(self) -> None:
        """Makes the cache and captures graphs, which `sleep` frees; weights must be loaded."""
        self._make_cache()
        self._set_kv_scales()
        with beside(self.platform, getattr(self.model, "fuse", None)) as self._fused:
            self._make_graphs()
        self._check_first_logits()
        log.info("ops: %s", ops.table())

    def _make_cache(self) -> None:
        config, cpu, notes = self.config, self.platform.is_cpu, list[str]()
        kinds = (config.kv_cache_dtype, config.kv_cache_dtype_skip_layers), ("bfloat16", ()), ("fp8_e4m3", ())
        specs, *others = (cache_specs(self.model, kind, self.dtype, self.platform, skipped) for kind, skipped in kinds)
        self.bytes_per_token, self.dense_bytes_per_token, fp8 = (
            sum(one.bytes_per_token for one in each) for each in (specs, *others)
        )
        if config.kv_cache_dtype_skip_layers and len({spec.bytes_per_token for spec in specs}) == 1:
            notes.append("--kv-cache-dtype-skip-layers leaves all layers alike: it names all, or none that is FP8")
        self.cache_format = cache_format(specs, config.kv_cache_dtype)
        images = 0 if self.encoder is None else self.encoder.plan(config, self.limits.positions, self.dtype)
        working = images + self.model.workspace_bytes(self.max_num_batched_tokens) + config.sampling_bytes(self.vocabulary.size)
        if cpu:
            keep(working)
        positions, held, most = self.limits.positions, self.report.total("held"), self.model.limits().positions
        budget = plan_blocks(config, self.platform, self.bytes_per_token, positions, held, working, most, fp8, images)
        self.max_model_len, self.num_blocks = self.tp.engine.least(budget.max_model_len, budget.num_blocks)
        notes.extend(budget.notes)
        if self.max_model_len < budget.max_model_len:
            notes.append(f"max_model_len lowered to {self.max_model_len}: another rank has less memory")
        self._cache_notes = notes
        self.report.notes.extend(notes)
        messages = cpu and self.tp.engine.size > 1  # no recording has gloo's
        self.captures = not (config.enforce_eager or messages) and self.model.limits().eager is None
        scratch = self.captures and not cpu  # one block outside the pool, to which padding rows of graphs write
        self.cache = KVCache(specs, self.num_blocks + scratch, self.block_size, self.platform.device)
        self.model.bind_cache(self.cache.views)

    def _set_kv_scales(self) -> None:
        text = partial(calibration_tokens, Path(self.config.text_directory), self.limits.vocab_size)
        if note := set_kv_scales(self.model, self.config, lambda: self.step.forward(self._prompt_batch(text()))):
            self.report.note(note)

    def _check_first_logits(self) -> None:
        if self.config.load_format != "dummy":  # random weights may give any logits
            check_first_logits(self.model, self.vocabulary, lambda ids: self.step.forward(self._prompt_batch(ids)))

    @torch.inference_mode()
    def _make_graphs(self) -> None:
        self.graphs: DecodeGraphs | RecordedSteps | None = None
        self.prompts: PrefillGraphs | None = None
        if not self.captures:
            return
        if self.platform.is_cpu:
            decode = cast("Callable[[batches.ForwardBatch], tuple[Tensor, Tensor]]", self.step.decode)  # no stage is recorded
            self.graphs = RecordedSteps(decode, self.block_size, self.config.max_num_seqs, self.max_model_len)
            return
        self._capture_graphs()
        if self.encoder is not None:
            self.encoder.capture()

    def _capture_graphs(self) -> None:
        """All ranks capture in one order, since graphs hold the exchanges of a stage's ranks; none holds those of stages."""
        room, step, at = min(self.max_model_len, self.max_num_batched_tokens), self.step, (self.platform, self.block_size)
        step.make_inputs(min(max(room, self.config.max_num_seqs), LARGEST))
        sizes = self.config.max_num_seqs, self.max_model_len, self.num_blocks
        self.prompts = PrefillGraphs(step.prompt, *at, room, self.num_blocks, step.arrived)
        self.graphs = DecodeGraphs(step.decode, *at, *sizes, step.graph_key, self._warm_up, step.arrived)
        self.prompts.capture()

    def check_reload(self, model: str) -> None:
        """Reads another checkpoint directory as `reload` will, and changes nothing.

        Raises OctavoError, the same on every rank, where config.json, shapes or schemes differ or something is damaged.
        """
        known = self.json_config, self.platform, self.dtype, self.progress, self.tp
        check_reload(self.model, replace(self.config, model=model, save_quantized=None, calibrate=None), *known)

    def reload(self, model: str) -> None:
        """Loads the weights of a directory that `check_reload` has passed. Graphs and kernels stay.

        Raises OctavoError where the new model computes no finite logits; the old weights are then loaded again.
        """
        before = self.config
        try:
            self._overwrite(replace(before, model=model, save_quantized=None, calibrate=None))
        except OctavoError as refusal:
            restore(self._overwrite, before, refusal)
            raise

    def _overwrite(self, config: EngineConfig) -> None:
        report, complete = reload_model(self.model, config, self.platform, self.dtype, self.progress, self.tp)
        self.config, self.directory = config, Path(config.model)
        self._loaded(report)
        if hasattr(self, "cache"):
            report.notes.extend(self._cache_notes)
            self._set_kv_scales()
            if not complete and self.graphs is not None:
                self._make_graphs()
            self._check_first_logits()

    def sleep(self) -> None:
        """Frees weights, cache and graphs, and keeps compiled kernels. `load_weights` and `make_runnable` restore them."""
        if hasattr(self, "cache"):
            self.graphs = self.prompts = None
            if self.encoder is not None:
                self.encoder.drop()
            if hasattr(self.model, "unfuse"):
                cast("FusedModel", self.model).unfuse()
            self.model.bind_cache([{} for _ in self.cache.views])
            del self.cache
        drop(self.model)
        self.platform.release()

    def _warm_up(self) -> None:
        """Warm-up: runs every kernel that prefills and sampling launch, and then waits for what decode steps need."""
        hidden = [self.step.rehearse(self._prompt_batch([0] * length)) for length in self.limits.warmup_lengths][-1]
        assert self.prompts is not None
        self.prompts.run_each_kernel()
        for spans in batches.decodes_beside_prompts(self.max_model_len, self.block_size):
            self.step.rehearse(self._batch(spans))
        if self.encoder is not None:
            self.encoder.warm_up()
        if hidden is not None:
            warm_up(self.vocabulary.whole(self.model.logits(hidden[-1:])).float())
        self._fused.result()

    def _batch(self, spans: Sequence[batches.Span]) -> batches.ForwardBatch:
        return batches.build(spans, self.block_size, self.platform.device)

    def _prompt_batch(self, token_ids: list[int]) -> batches.ForwardBatch:
        """A batch of one request in the first blocks, with as many of its tokens as a step may have."""
        token_ids = token_ids[: min(self.max_model_len, self.num_blocks * self.block_size, self.max_num_batched_tokens)]
        return self._batch([batches.Span(token_ids, 0, range(-(-len(token_ids) // self.block_size)))])

    def describe(self) -> list[str]:
        """The load report for the user: one line per role and scheme, then memory, then notes."""
        sizes = self.bytes_per_token, self.dense_bytes_per_token, self.num_blocks * self.block_size, self.cache.nbytes
        cache = cache_line(self.cache_format, *sizes, ranks := self.tp.engine.size)
        return describe(self.model_type, self.report, self.platform, ranks, cache, self.tp.stages)
