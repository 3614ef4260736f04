"""Owns the model, the KV cache and the graphs of one rank: a step's requests in, tokens out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from octavo import batch as batches
from octavo import ops
from octavo.config import EngineConfig
from octavo.distributed import TensorParallel
from octavo.engine.graphs.cpu_replay import RecordedSteps
from octavo.engine.graphs.decode import DecodeGraphs
from octavo.engine.graphs.prefill import PromptGraphs
from octavo.engine.kv_setup import calibration_tokens
from octavo.engine.loading import load_model
from octavo.engine.memory import gib, plan_blocks
from octavo.engine.sampler import SamplingRow, logprobs_of, rehearse, sample
from octavo.engine.sequence import ScheduledRequest
from octavo.engine.step_tokens import StepTokens
from octavo.engine.token_history import Histories
from octavo.errors import OctavoError
from octavo.host import keep
from octavo.kvcache import KVCache, KVCacheSpec, Layout, spec_for
from octavo.messages import Logprobs
from octavo.models import architecture, read_config
from octavo.models.common import CausalLM
from octavo.models.config import ConfigBase
from octavo.platform import Platform, detect
from octavo.quant import WeightDType, checks

__all__ = ["ModelRunner", "StepTokens"]

LOGIT_ROWS = 256  # prompt positions whose logits exist at a time

log = logging.getLogger(__name__)


def _span(item: ScheduledRequest) -> batches.Span:
    """An item for the batch; a pending token is 0 until the device puts in its value."""
    token_ids = [0] if item.pending else item.request.token_ids[item.start : item.start + item.num_tokens]
    return batches.Span(token_ids, item.start, item.request.block_ids)


def _sources(items: Sequence[ScheduledRequest], previous: StepTokens | None) -> list[int]:
    """For each item the row of its token in the step before, -1 where the host knows it."""
    return [previous.rows[item.request.request_id] if previous and item.pending else -1 for item in items]


def _wants_prompt_logprobs(item: ScheduledRequest, row: SamplingRow) -> bool:
    return row.params.prompt_logprobs is not None and not row.num_output_tokens and item.start + 1 < row.num_prompt_tokens


class ModelRunner:
    """Loads a model and runs steps. Raises OctavoError for whatever the user can mend."""

    def __init__(self, config: EngineConfig, progress: Callable[[str, float], None] | None = None):
        if config.tensor_parallel_size > 1:
            raise OctavoError(
                f"--tensor-parallel-size {config.tensor_parallel_size} is not served yet: this version runs on 1 device."
            )
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        self.config = config
        self.platform: Platform = detect(config.device)
        self.block_size = config.block_size_on(self.platform.is_cpu)
        ops.bind(self.platform)
        self.directory = Path(config.model)
        json_config = read_config(self.directory)
        checks.check_format(json_config, self.directory)
        arch = architecture(json_config)
        self.model_type: str = json_config["model_type"]
        self.model_config: ConfigBase = arch.Config.from_json(json_config)
        self.dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        model_len = self._model_len()
        self.model: CausalLM = arch.Model(self.model_config, TensorParallel(), model_len)
        self.report = load_model(self.model, config, self.platform, self.dtype, progress)
        specs = self._cache_specs()
        self.bytes_per_token = sum(spec.bytes_per_token for spec in specs)
        c, cpu = self.model_config, self.platform.is_cpu
        self.max_num_batched_tokens = config.step_tokens_on(cpu)
        working = config.working_bytes_on(cpu, c.hidden_size, c.intermediate_size, c.vocab_size)
        if cpu:
            keep(working)
        budget = plan_blocks(config, self.platform, self.bytes_per_token, model_len, self.report.total("held"), working)
        self.max_model_len, self.num_blocks = budget.max_model_len, budget.num_blocks
        self.report.notes.extend(budget.notes)
        graphs = ops.captures(c.head_dim, self.model.packed_weights()) and not config.enforce_eager
        scratch = graphs and not cpu  # a block that nobody owns, which unused rows of graphs write to
        self.cache = KVCache(specs, self.num_blocks + scratch, self.block_size, self.platform.device)
        for layer, views in zip(self.model.attention_layers(), self.cache.views, strict=True):
            layer.bind_cache(views)
        self._settle_kv_scales()
        if (parts := self.model.parts()) is not None:
            self.model.model.fused = ops.fuse(parts, self.platform)
        self.graphs = self._decode_graphs() if graphs else None
        self.prompts = self._prompt_graphs() if scratch else None
        self.histories = Histories(self.platform.device)
        log.info("ops: %s", ops.table())

    @torch.inference_mode()
    def _decode_graphs(self) -> DecodeGraphs | RecordedSteps:
        sizes = self.block_size, self.config.max_num_seqs, self.max_model_len
        if self.platform.is_cpu:
            return RecordedSteps(self._decode, *sizes)
        return DecodeGraphs(self._decode, self.platform, *sizes, self.num_blocks, self._decode_variant, self._rehearse)

    @torch.inference_mode()
    def _prompt_graphs(self) -> PromptGraphs:
        room = min(self.max_model_len, self.max_num_batched_tokens)
        return PromptGraphs(self._prompt, self.platform, self.block_size, room, self.num_blocks)

    def _prompt(self, batch: batches.ForwardBatch, last: Tensor) -> tuple[Tensor, Tensor]:
        """As `_decode`, of a prompt's last token."""
        return self._chosen(self.model(batch)[last])

    def _decode(self, batch: batches.ForwardBatch) -> tuple[Tensor, Tensor]:
        """A graph's: logits of single tokens, and the likeliest tokens, which few steps do not want."""
        return self._chosen(self.model(batch))

    def _chosen(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model.lm_head(hidden)
        return logits, ops.likeliest(logits)

    def _rehearse(self) -> None:
        """Calls what prefills launch, of few tokens, of more, and of enough for other tiles; and what sampling does."""
        for length in (16, 40, 600):
            hidden = self.model(self._prompt_batch([0] * length))
        rehearse(self.model.lm_head(hidden[-1:]).float())

    def _decode_variant(self, requests: int, longest: int) -> tuple[int, ...]:
        if (fused := self.model.model.fused_for(requests, longest)) and fused.attends:
            return ()
        kinds = {a.kv_heads for a in self.model.attention_layers()}
        return tuple(ops.decode_variant(requests, kv_heads, longest) for kv_heads in sorted(kinds))

    def _model_len(self) -> int:
        c, asked = self.model_config, self.config.max_model_len
        limit = c.max_position_embeddings
        if c.rope["rope_type"] == "yarn" and c.rope.get("factor"):
            limit = max(limit, int((c.rope["original_max_position_embeddings"] or limit) * c.rope["factor"]))
        if asked is not None and asked > limit:
            raise OctavoError(
                f"--max-model-len {asked} is over the {limit} positions that the model was made for; use at most {limit}."
            )
        return asked or limit

    def _cache_specs(self) -> list[KVCacheSpec]:
        kind, layout = (self.dtype, self.platform.fp8_dtype), Layout.on(self.platform.is_cpu)
        name = self.config.kv_cache_dtype
        return [spec_for(name, a.kv_heads, a.head_dim, *kind, layout) for a in self.model.attention_layers()]

    def _settle_kv_scales(self) -> None:
        layers = self.model.attention_layers()
        if self.config.kv_cache_dtype not in ("fp8_e4m3", "fp8_e5m2"):
            return
        if self.config.calculate_kv_scales:
            self._calculate_kv_scales()
            scales = torch.cat([s for layer in layers for s in (layer.k_scale, layer.v_scale)])
            self.report.note(f"KV scales measured: {float(scales.min()):.3g} to {float(scales.max()):.3g}")
        elif all(layer.scales_from_checkpoint for layer in layers):
            self.report.note("KV scales taken from the checkpoint")
        else:
            self.report.note("KV scales are 1.0: the checkpoint has none (--calculate-kv-scales measures them)")

    def _calculate_kv_scales(self) -> None:
        """Runs a fixed text through the model once; every layer keeps the scales of the largest key and value it saw."""
        for layer in self.model.attention_layers():
            layer.observe = True
        self.forward(self._prompt_batch(calibration_tokens(self.directory, self.model_config.vocab_size)))
        for layer in self.model.attention_layers():
            layer.observe = False

    def _batch(self, spans: Sequence[batches.Span]) -> batches.ForwardBatch:
        return batches.build(spans, self.block_size, self.platform.device)

    def _prompt_batch(self, token_ids: list[int]) -> batches.ForwardBatch:
        """Of one request, which has the first blocks; as many of its tokens as a step may have."""
        token_ids = token_ids[: min(self.max_model_len, self.num_blocks * self.block_size, self.max_num_batched_tokens)]
        return self._batch([batches.Span(token_ids, 0, range(-(-len(token_ids) // self.block_size)))])

    @torch.inference_mode()
    def forward(self, batch: batches.ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] of a batch, its keys and values written to the cache."""
        hidden: Tensor = self.model(batch)
        return hidden

    @torch.inference_mode()
    def run(
        self, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow], previous: StepTokens | None = None
    ) -> StepTokens:
        """Launch the computation of `items`; `rows[i]` says how the next token of items[i] is chosen, if this step reaches it.

        `previous` is what the step before computes: pending tokens are taken from it on the device.
        """
        out = StepTokens()
        if not items:
            return out
        if (decoded := self._replay(items, rows, previous)) is not None:
            logits, tokens = decoded
            if len(sampling := [n for n, item in enumerate(items) if item.samples]) < len(items):
                at = self._indices(sampling)
                logits, tokens = logits[at], tokens[at]
            self._choose(logits, tokens, [items[n] for n in sampling], [rows[n] for n in sampling], out)
            return out
        hidden, ends = self._hidden(items, previous), list(accumulate(item.num_tokens for item in items))
        for item, row, end in zip(items, rows, ends, strict=True):
            if _wants_prompt_logprobs(item, row):
                found = self._prompt_logprobs(hidden[end - item.num_tokens :], item, row)
                out.prompt_logprobs[item.request.request_id] = found
        if sampling := [n for n, item in enumerate(items) if item.samples]:
            every = len(sampling) == hidden.shape[0]
            last = hidden if every else hidden[self._indices([ends[n] - 1 for n in sampling])]
            self._choose(self.model.lm_head(last), None, [items[n] for n in sampling], [rows[n] for n in sampling], out)
        return out

    def _replay(
        self, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow], previous: StepTokens | None
    ) -> tuple[Tensor, Tensor] | None:
        """Logits and likeliest tokens of a step of single tokens, or of one prompt, where a graph has them."""
        if self.graphs is None or any(map(_wants_prompt_logprobs, items, rows)):
            return None
        if self.prompts is not None and len(items) == 1 and items[0].num_tokens > 1 and items[0].samples:
            return self.prompts.run(_span(items[0]))
        if any(item.num_tokens > 1 for item in items):
            return None
        known = None if previous is None else previous.tokens
        return self.graphs.run([_span(item) for item in items], known, _sources(items, previous))

    def _hidden(self, items: Sequence[ScheduledRequest], previous: StepTokens | None) -> Tensor:
        """Hidden states of all the items' tokens."""
        batch = self._batch([_span(item) for item in items])
        last = [end - 1 for end in accumulate(item.num_tokens for item in items)]
        if pending := [pair for pair in zip(last, _sources(items, previous), strict=True) if pair[1] >= 0]:
            assert previous is not None
            assert previous.tokens is not None
            at, source = (self._indices(part) for part in zip(*pending, strict=True))
            batch.input_ids[at] = previous.tokens[source]
        return self.forward(batch)

    def _indices(self, values: Sequence[int]) -> Tensor:
        return batches.to_device(values, torch.int64, self.platform.device)

    def _choose(
        self, logits: Tensor, greedy: Tensor | None, items: Sequence[ScheduledRequest], rows: Sequence[SamplingRow],
        out: StepTokens,
    ) -> None:  # fmt: skip
        """Puts the next tokens of `items` into `out`; `greedy`: the likeliest of `logits`, where they are known."""
        ids = [item.request.request_id for item in items]
        if all(row.plain and row.params.greedy and row.params.logprobs is None for row in rows):
            out.put(ops.likeliest(logits) if greedy is None else greedy, ids)
            return
        logits = logits.float()
        asked = [n for n, row in enumerate(rows) if row.params.logprobs is not None]
        raw = logits[asked].clone() if asked else None
        tokens = sample(logits, rows, self.histories, ids)
        out.put(tokens, ids)
        if raw is not None:
            found = logprobs_of(raw, tokens[asked], [rows[n].params.logprobs or 0 for n in asked])
            out.logprobs = {items[n].request.request_id: entry for n, entry in zip(asked, found, strict=True)}

    def _prompt_logprobs(self, hidden: Tensor, item: ScheduledRequest, row: SamplingRow) -> list[Logprobs]:
        """Of the prompt tokens that follow this step's positions."""
        stop = min(item.start + item.num_tokens, row.num_prompt_tokens - 1)
        targets = torch.tensor(row.token_ids[item.start + 1 : stop + 1], device=hidden.device)
        found: list[Logprobs] = []
        for at in range(0, len(targets), LOGIT_ROWS):
            part = targets[at : at + LOGIT_ROWS]
            logits = self.model.logits(hidden[at : at + len(part)])
            found += logprobs_of(logits, part, [row.params.prompt_logprobs or 0] * len(part))
        return found

    def describe(self) -> list[str]:
        """What was loaded, for a person: one line a role and scheme, then memory, then what is worth knowing."""
        r, p = self.report, self.platform
        lines = [f"model: {self.model_type}, {r.total('values') / 1e6:,.1f} M parameters, on {p.name}"]
        for (role, scheme), g in sorted(r.groups.items()):
            if g.stored:  # a tied head stores nothing
                lines.append(f"  {role:<10} {scheme:<9} {g.dense / 2e6:>10,.2f} M  {gib(g.stored):>11}")
        stored, dense = r.total("stored"), 2 * r.total("values")
        lines.append(f"weights: {gib(stored)} stored, {100 * stored / dense:.1f}% of BF16's {gib(dense)}")
        if fp8 := r.total("dense", WeightDType.FP8):
            part = r.total("stored", WeightDType.FP8)
            lines.append(f"FP8 linears: {gib(part)}, {100 * part / fp8:.1f}% of BF16's {gib(fp8)}")
        if p.widened_dtype is not None and r.total("held") > stored:
            kind = str(p.widened_dtype).removeprefix("torch.")
            why = f"FP8 codes are kept as exact {kind} values here" if fp8 else f"this CPU multiplies in {kind}"
            lines.append(f"held in memory: {gib(r.total('held'))}, because {why}")
        kv_dense = sum(2 * 2 * a.kv_heads * a.head_dim for a in self.model.attention_layers())
        lines.append(
            f"KV cache: {self.config.kv_cache_dtype}, {self.bytes_per_token} bytes a token "
            f"({100 * self.bytes_per_token / kv_dense:.1f}% of BF16's), "
            f"{self.num_blocks * self.block_size:,} tokens in {gib(self.cache.nbytes)}"
        )
        return lines + [f"note: {note}" for note in r.notes]
