"""What a plan says in words: what happens to each group of layers, what would be refused, the command to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from octavo.config import EngineConfig
from octavo.demo import MODEL_DIR
from octavo.errors import OctavoError
from octavo.models import MODEL_TYPES
from octavo.tools.plan.fit import CONTEXT_BYTES, working_bytes
from octavo.tools.plan.sizes import BLOCK, COMPONENTS, Format, Weight
from octavo.tools.plan.stored_formats import expert_names, matches
from octavo.tools.plan.towers import KEPT as VISION
from octavo.tools.plan.variants import Plan, Question, Variant, treatment
from octavo.version import __version__

__all__ = ["Group", "asked_variant", "check_ignore", "command", "gb", "groups", "notes", "refusals"]


@dataclass
class Group:
    """The weights of a component that share a format and a reason. nbytes: as stored. remarks: on their shapes."""

    component: str
    format: str
    why: str
    tensors: int = 0
    nbytes: int = 0
    remarks: list[str] = field(default_factory=list)


def gb(count: float) -> str:
    """Bytes for a person, in powers of ten: 811.7 GB, 11.5 MB, 68.6 kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def groups(plan: Plan) -> list[Group]:
    """What happens to the weights of the asked variant, and why."""
    q, found = plan.question, dict[tuple[str, str, str], Group]()
    for i, weight in enumerate(q.model.weights):
        form, why = treatment(q, plan.asked.variant, i)
        if weight.tied:
            why = "tied: the embedding's matrix"
        elif weight.component == "vision" and not form.quantized:
            why = VISION
        group = found.setdefault((weight.component, form.name, why), Group(weight.component, form.name, why))
        group.tensors += weight.experts * len(weight.names)
        group.nbytes += weight.nbytes(form)
        group.remarks += [remark for remark in _remarks(weight, form, q.tp) if remark not in group.remarks]
    return [*sorted(found.values(), key=lambda group: COMPONENTS.index(group.component)), *_caches(plan)]


def _remarks(weight: Weight, form: Format, tp: int) -> list[str]:
    """How a matrix is split over `tp` ranks and what FP8 units need of its shape."""
    if weight.is_vector or (weight.component == "vision" and not weight.active):
        return []
    try:
        sides = weight.padding(tp)
    except OctavoError:  # said where refusals are
        return []
    out = []
    if form.quantized or weight.component == "vision":
        condition = "" if form.quantized else "if it were FP8, "
        out += [condition + (f"{whole} / {tp} = " if tp > 1 else "") + f"{part} is padded to {to}" for whole, part, to in sides]
    if weight.split == "whole" and tp > 1:
        out.append("whole on every rank" if weight.component != "attention" else "the latent projections whole on every rank")
    if weight.experts > 1 and tp > 1:
        out.append("every rank holds a part of each")
    if weight.heads and min(weight.heads) < tp:
        out.append(f"{tp // min(weight.heads)} ranks share a KV head")
    return out


def _caches(plan: Plan) -> list[Group]:
    attention, cache = plan.question.model.attention, plan.asked.cache_format
    why = {
        "auto": "the model's own dtype",
        "bfloat16": "as it is computed",
        "fp8_ds_mla": f"MLA's: {attention.token_bytes(cache)} B a token and layer: FP8 latent, its scales, BF16 rope",
        "fp8_per_token_head": "a scale for each token and head, measured as it is written",
    }.get(cache, "one scale a layer: the checkpoint's, else 1.0, or measured (--calculate-kv-scales)")
    out = [Group("KV cache", "bf16" if cache in ("auto", "bfloat16") else cache, why)]
    if attention.is_mla and plan.question.tp > 1:
        out[0].remarks.append("whole on every rank")
    if attention.index_dim:
        out.append(Group("index cache", "fp8", f"{attention.index_bytes()} B a token and layer, whatever the KV dtype"))
    return out


def check_ignore(q: Question) -> None:
    """Raises OctavoError for a --quantization-ignore pattern that means nothing here, as the loader would."""
    modules = [name for weight in q.model.weights if not weight.is_vector for name in expert_names(weight)]
    for pattern in q.config.quantization_ignore:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise OctavoError(f"--quantization-ignore '{pattern}' is not a regular expression: {error}.") from None
        if not any(matches(pattern, name) for name in modules):
            raise OctavoError(
                f"--quantization-ignore '{pattern}' matches no layer of this model; "
                "use a module name such as 'model.layers.0.mlp.down_proj', a glob or re:REGEX."
            )


def refusals(plan: Plan) -> list[str]:
    """Why the command would not run, a sentence each; what only this version cannot do comes first."""
    q, asked = plan.question, plan.asked
    out = []
    if q.model.model_type not in MODEL_TYPES:
        served = ", ".join(MODEL_TYPES)
        out.append(f"octavo {__version__} does not serve model_type '{q.model.model_type}' yet; it serves {served}.")
    if q.tp > 1:
        out.append(f"octavo {__version__} runs on 1 device: --tensor-parallel-size {q.tp} is not served yet.")
    if asked.variant.native and any(form.bits == 4 for form in q.source.stored.formats):
        grown = " and ".join(
            f"{gb(v.weights)} in {v.variant.label}" for v in plan.variants if v.variant.label in ("BF16", "PTPC")
        )
        out.append(f"octavo {__version__} reads packed INT4 but does not keep it yet; decoded, the weights take {grown}.")
    out += q.source.stored.problems
    if not q.on.has_fp8:
        out.append(f"{q.on.name} ({q.on.arch}) has no FP8 units; Octavo needs gfx942, sm_89 or newer, or a CPU.")
    if q.config.quantize_lm_head and asked.variant.scheme == "bf16" and not (asked.variant.native and q.source.stored.scheme):
        out.append(
            "--quantize-lm-head needs a scheme, and the checkpoint has none, or several; add --quantization or leave it out."
        )
    if q.tp > q.number:
        out.append(f"--tensor-parallel-size {q.tp} needs {q.tp} accelerators, and there are {q.number}.")
    limit, wanted = q.model.max_model_len, q.config.max_model_len
    if wanted is not None and wanted > limit:
        out.append(f"--max-model-len {wanted} is over the {limit} positions that the model was made for; use at most {limit}.")
    return out + _unsplittable(plan) + _too_large(plan)


def _unsplittable(plan: Plan) -> list[str]:
    q, native = plan.question, plan.asked.variant.native
    for weight, stored in zip(q.model.weights, q.source.stored.formats, strict=True):
        try:
            shapes = weight.rank_shapes(q.tp)
        except OctavoError as error:
            return [str(error)]
        if not native or stored.scale != "tile" or q.tp == 1 or weight.split == "whole":
            continue
        part = shapes[0][0] if weight.split == "rows" else shapes[0][1]
        if part % BLOCK:
            return [
                f"{weight.names[0].format(0)}: its stored {BLOCK}x{BLOCK} tiles do not split into parts of {part}; "
                "use a smaller --tensor-parallel-size."
            ]
    return []


def _too_large(plan: Plan) -> list[str]:
    q, asked = plan.question, plan.asked
    if asked.fit is None or asked.fit.max_model_len:
        return []
    f = asked.fit
    token = q.model.attention.cache_bytes(asked.cache_format, q.tp, asked.variant.itemsize)
    usable = q.on.free if q.on.is_cpu else q.on.memory * q.config.gpu_memory_utilization
    if f.room:
        needed = gb(token * plan.max_model_len)
        what = f"one request of {plan.max_model_len} tokens needs {needed} of KV cache and {gb(f.room)} is left"
        ways = [f"lower --max-model-len to {f.tokens}"]
    else:
        working = "" if q.on.is_cpu else f" and {gb(working_bytes(q.config, q.model, q.on) + CONTEXT_BYTES)} to work in"
        what, ways = f"a rank needs {gb(f.weights)} for weights{working}, and may use {gb(usable)}", []
    if not asked.variant.kv.startswith("fp8"):
        ways.append("use --kv-cache-dtype fp8")
    if asked.smallest and asked.smallest > q.tp:
        ways.append(f"split over {asked.smallest} accelerators")
    return [f"It does not fit: {what}; " + (", or ".join(ways) or "use a smaller model or a larger accelerator") + "."]


def notes(plan: Plan) -> list[str]:
    """What is worth knowing and stops nothing."""
    q, asked = plan.question, plan.asked
    out = []
    if q.source.stored.quantized:
        out.append(
            f"native is what the checkpoint stores ({q.source.stored.label}); the other columns need a BF16 checkpoint, "
            "and BF16 is what they are compared with."
        )
    else:
        ends = ["embeddings", "lm_head"]
        kept = [name for name in ends if any(g.component == name and g.format in ("bf16", "float32") for g in groups(plan))]
        rest = f"; {' and '.join(kept)} stay BF16 and add to it." if kept else "."
        out.append(f"FP8 halves what it stores, so nothing here is under 50%{rest}")
    if not q.source.on_disk:
        out.append("Octavo downloads nothing: the command takes the directory that the checkpoint is downloaded into.")
    if q.on.arch == "gfx942" and asked.variant.label != "BF16":
        out.append(
            "gfx942 computes in e4m3fnuz: weights are quantized to it, clamped at 224; stored e4m3fn codes are converted."
        )
    if q.on.is_cpu and any(g.format in ("fp8", "ptpc_fp8", "fp8_block") for g in groups(plan)):
        out.append("Sizes are as stored; where a CPU has no FP8 kernel the codes are held widened, and `octavo serve` says so.")
    if (f := asked.fit) and f.max_model_len and q.config.max_model_len is None and f.max_model_len < q.model.max_model_len:
        out.append(f"max_model_len would be lowered from {q.model.max_model_len} to {f.max_model_len}: that is what fits.")
    if f and f.cache < f.room - f.room // 10 and f.requests > q.config.max_num_seqs:
        out.append(f"The cache would take {gb(f.cache)} of its room: what --max-num-seqs {q.config.max_num_seqs} can use.")
    if (spare := q.number // q.tp) > 1:
        out.append(f"{spare} such servers fit on {q.number} accelerators side by side; numbers are of one.")
    return out


def command(plan: Plan, given: Mapping[str, object]) -> str:
    """The `octavo serve` line of the asked variant; `given` are the other options that were typed."""
    q, variant = plan.question, plan.asked.variant
    words = ["octavo", "serve", *([] if q.source.name == str(MODEL_DIR) else [q.source.name])]
    words += ["--quantization", variant.scheme] if variant.scheme != "bf16" else []
    kv = {"fp8_e4m3": "fp8", "auto": ""}.get(variant.kv, variant.kv)
    words += ["--kv-cache-dtype", kv] if kv else []
    words += ["--tensor-parallel-size", str(q.tp)] if q.tp > 1 else []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def asked_variant(config: EngineConfig, given: Container[str], native: bool) -> Variant:
    """What the options mean. Without --quantization, what is recommended: PTPC, or the checkpoint's codes, and an FP8 cache."""
    scheme = config.quantization or ("bf16" if native else "ptpc_fp8")
    recommended = config.quantization is None and "kv_cache_dtype" not in given
    itemsize = 4 if config.dtype == "float32" else 2
    return Variant(scheme, native, "fp8_e4m3" if recommended else config.kv_cache_dtype, itemsize)
