"""What a plan says in words: what happens to each group of layers, what would be refused, the command to run."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from octavo.demo import MODEL_DIR
from octavo.engine.kv_setup import check_kv_scales
from octavo.errors import OctavoError, refusal
from octavo.models import architecture, check_length
from octavo.tools.plan.operands import COMPONENTS, Operand, Walk
from octavo.tools.plan.roofline import is_index
from octavo.tools.plan.subject import Subject, Variant
from octavo.tools.plan.variants import Plan
from octavo.tools.rich_tables import gb

__all__ = ["Group", "asked_variant", "command", "groups", "notes", "refusals", "verdict"]

ALIGNMENT = 16  # octavo.platform.Platform.fp8_alignment


@dataclass
class Group:
    """The weights of a component that share a format and a reason. nbytes: as stored. remarks: on their shapes."""

    component: str
    format: str
    why: str
    tensors: int = 0
    nbytes: int = 0
    remarks: list[str] = field(default_factory=list)


def groups(plan: Plan) -> list[Group]:
    """What happens to the weights of the asked variant, and why."""
    q, found = plan.question, dict[tuple[str, str, str], Group]()
    operands = q.subject.walk(plan.asked.variant, 1).operands
    try:
        parts = q.subject.walk(plan.asked.variant, q.tp).operands
    except OctavoError:  # said where refusals are
        parts = []
    for operand, part in zip_longest(operands, parts):
        key = operand.component, operand.form, operand.why
        group = found.setdefault(key, Group(*key))
        group.tensors += operand.experts * len(operand.names)
        group.nbytes += operand.stored
        group.remarks += [remark for remark in _remarks(part, q.tp, operand.experts) if remark not in group.remarks]
    return [*sorted(found.values(), key=lambda group: COMPONENTS.index(group.component)), *_caches(plan)]


def _remarks(part: Operand | None, tp: int, experts: int) -> list[str]:
    """How a matrix, one of `experts`, is split over `tp` ranks and what FP8 units need of its shape."""
    if part is None or part.is_vector:
        return []
    out = []
    if part.is_fp8 or part.component == "vision":
        condition = "" if part.is_fp8 else "if it were FP8, "
        for whole, own in zip(part.whole, part.shape, strict=True):
            if padding := -own % ALIGNMENT:
                split = f"{whole} / {tp} = " if tp > 1 else ""
                out.append(f"{condition}{split}{own} is padded to {own + padding}")
    if part.experts < experts:
        out.append(f"a rank holds at most {part.experts} of {experts}, whole")
    elif part.whole == part.shape and tp > 1:
        out.append("whole on every rank" if part.component != "attention" else "the latent projections whole on every rank")
    if part.experts == experts > 1 and tp > 1:
        out.append("every rank holds a part of each")
    if part.sharing > 1:
        out.append(f"{part.sharing} ranks share a KV head")
    return out


def _caches(plan: Plan) -> list[Group]:
    subject, variant, cache = plan.question.subject, plan.asked.variant, plan.asked.cache_format
    attention = subject.attention
    specs = {is_index(spec): spec for spec in subject.caches(variant, 1)}
    layer, index = (specs[kind].bytes_per_token if kind in specs else 0 for kind in (False, True))
    own = "the model's own dtype" if variant.kv == "auto" else "as it is computed"
    why = {
        "bfloat16": own,
        "float32": own,
        "fp8_ds_mla": f"MLA's: {layer} B a token and layer: FP8 latent, its scales, BF16 rope",
        "fp8_per_token_head": "a scale for each token and head, measured as it is written",
    }.get(cache, "one scale a layer: the checkpoint's, else 1.0, or measured (--calculate-kv-scales)")
    out = [Group("KV cache", "bf16" if cache == "bfloat16" else cache, why)]
    if attention.latent and plan.question.tp > 1:
        out[0].remarks.append("whole on every rank")
    if attention.index_dim:
        wide = specs[True].fields[0].dtype.itemsize > 1
        why = f"{index} B a token and layer, " + ("as latents are" if wide else "whatever the KV dtype")
        out.append(Group("index cache", "float32" if wide else "fp8", why))
    return out


def refusals(plan: Plan) -> list[str]:
    """Why the command would not run, a sentence each, in the engine's words where the engine would say it."""
    q, asked, subject = plan.question, plan.asked, plan.question.subject
    unserved = refusal(lambda: architecture(subject.source.config))
    config = replace(q.config, kv_cache_dtype=asked.variant.kv)
    of_cache = refusal(lambda: check_kv_scales(subject.model(1), config, subject.source.config)) if not unserved else None
    out = [q.on.refusal, subject.source.refused, unserved or of_cache]
    if q.config.quantize_lm_head and asked.variant.scheme == "bf16":
        out.append(refusal(subject.head_scheme))
    problems = subject.base.problems
    out += problems[:3] + problems[3:][-1:]  # the first few say enough; the last is of tensors that nothing reads
    out += [text for text in subject.walk(asked.variant, 1).problems if text not in problems][:1]
    out.append(refusal(lambda: check_length(q.config.max_model_len, subject.longest)))
    if q.tp * q.pp > q.all:
        there = f"there are {q.all}" if q.all > 1 else "there is one"
        stages = f" times --pipeline-parallel-size {q.pp}" if q.pp > 1 else ""
        out.append(f"--tensor-parallel-size {q.tp}{stages} needs {q.tp * q.pp} accelerators, and {there}.")
    for number in sorted({0, q.pp - 1}):
        if said := refusal(lambda number=number: subject.walk(asked.variant, q.tp, (number, q.pp))):  # type: ignore[misc]
            out.append(said)
            break
    if asked.fit is not None and not asked.fit.max_model_len:
        out += asked.fit.said
    return [sentence for sentence in out if sentence]


def verdict(plan: Plan, refused: Sequence[str]) -> str:
    """Whether the asked variant fits, whether Octavo would start it, and what to do where it does not fit."""
    q, asked = plan.question, plan.asked
    used, split = q.tp * q.pp, f", split {q.tp} x {q.pp}" if q.pp > 1 else ""
    where = f"{used} of {q.all} x {q.on.name}{split}" if used < q.all else f"{used} x {q.on.name}{split}"
    if (fit := asked.fit) is None:
        return f"It does not split over {used} accelerators."
    if fit.max_model_len:
        lowered = "" if fit.max_model_len >= q.model_len else f", with a context lowered from {q.model_len:,} tokens"
        many = f"{fit.tokens / fit.max_model_len:,.1f} requests of {fit.max_model_len:,} tokens at a time{lowered}"
        if used > q.all:
            said = f"There are too few accelerators: {asked.variant.label} on {where} would hold {many}."
        else:
            fits, holds = ("It is refused, though memory would do", "would hold") if refused else ("It fits", "holds")
            said = f"{fits}: {asked.variant.label} on {where} {holds} {many}."
        return said + (" Octavo would not start it:" if refused else "")
    others = [v for v in plan.variants if v.fit is not None and v.fit.max_model_len]
    enough = sorted((v for v in plan.variants if v.smallest), key=lambda v: (v.smallest, v is not asked))
    if others:
        best = max(others, key=lambda v: v.fit.tokens if v.fit else 0)
        advice = f"Use {' '.join(_options(best.variant)) or '--quantization bf16 --kv-cache-dtype auto'}, which fits."
    elif enough and not q.on.is_cpu:
        number, label = enough[0].smallest, enough[0].variant.label
        advice = f"It takes {number} of them{'' if enough[0] is asked else f' with {label}'} (--num-accelerators {number})."
    else:
        advice = "Nothing here holds it: take a smaller model, a lower --max-model-len or more memory."
    return f"It does not fit: {asked.variant.label} on {where}. {advice} Octavo would not start it:"


def notes(plan: Plan) -> list[str]:
    """What is worth knowing and stops nothing."""
    q, asked = plan.question, plan.asked
    out = []
    if q.subject.quantized:
        out.append(
            f"native is what the checkpoint stores ({_label(q.subject.base)}); the other columns need a BF16 checkpoint, "
            "and BF16 is what they are compared with."
        )
    else:
        ends = ["embeddings", "lm_head"]
        kept = [name for name in ends if any(g.component == name and g.format in ("bf16", "float32") for g in groups(plan))]
        rest = f"; {' and '.join(kept)} stay BF16 and add to it." if kept else "."
        out.append(f"FP8 halves what it stores, so nothing here is under 50%{rest}")
    if "vision_config" in q.subject.source.config and not any(o.component == "vision" for o in q.subject.base.operands):
        why = "Stages serve text alone: the" if q.pp > 1 else "The"
        out.append(f"{why} vision tower is left out (--language-model-only), and every number is the text model's.")
    if (fit := asked.fit) and fit.images:
        where = "a rank's memory" if q.tp > 1 else "the memory"
        out.append(
            f"{gb(fit.images)} of {where} are for images: what the vision tower makes of them is kept "
            "(--mm-processor-cache-gb), and it computes; --language-model-only leaves all of it out."
        )
    source = q.subject.source
    if source.download is not None:
        there = f"downloads {gb(source.download)} first" if source.download else "downloads nothing: the cache has it"
        out.append(f"The command {there}. This plan read headers and config.json alone.")
    elif not source.tensors:
        out.append("The command takes a name of the hub or the checkpoint's directory; nothing was downloaded for this plan.")
    if q.on.arch == "gfx942" and asked.variant.label != "BF16":
        out.append(
            "gfx942 computes in e4m3fnuz: weights are quantized to it, clamped at 224; stored e4m3fn codes are converted."
        )
    if q.on.is_cpu and any("fp8" in g.format for g in groups(plan)):
        out.append("Sizes are as stored; where a CPU has no FP8 kernel the codes are held widened, and `octavo serve` says so.")
    if (f := asked.fit) and f.max_model_len:
        out += [f"{note}." for note in f.said]
    if f and f.cache < f.room - f.room // 10 and f.requests > q.config.max_num_seqs:
        out.append(f"The cache would take {gb(f.cache)} of its room: what --max-num-seqs {q.config.max_num_seqs} can use.")
    if f and f.max_model_len and (spare := q.all // (q.tp * q.pp)) > 1:
        out.append(f"{spare} such servers fit on {q.all} accelerators side by side; numbers are of one.")
    if q.pp > 1 and not q.on.is_cpu and (q.tp, q.pp, q.hosts) != (1, 2, 1):
        out.append("Of pipeline stages two were run on accelerators, of one rank each on one host; these could do so much.")
    return out


def _label(stored: Walk) -> str:
    """The format that most weights are stored in."""
    return Counter(o.form for o in stored.operands if o.quantized).most_common(1)[0][0]


def command(plan: Plan, given: Mapping[str, object]) -> str:
    """The `octavo serve` line of the asked variant; `given` are the other options that were typed."""
    q, variant = plan.question, plan.asked.variant
    name = q.subject.source.name
    place = q.subject.source.on_hub or (name if os.path.exists(name) else f"path/to/{name}")  # a known name tells no place
    words = ["octavo", "serve", *([] if name == str(MODEL_DIR) else [place]), *_options(variant)]
    words += ["--tensor-parallel-size", str(q.tp)] if q.tp > 1 else []
    words += ["--pipeline-parallel-size", str(q.pp)] if q.pp > 1 else []
    if (hosts := -(-q.tp * q.pp // q.number)) > 1:
        words += ["--nnodes", str(hosts), "--node-rank", "0", "--master-addr", "HOST_0"]
    text_alone = {"language_model_only": True} if q.config.language_model_only else {}  # stages ask for it unasked
    for name, value in (dict(given) | text_alone).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def _options(variant: Variant) -> list[str]:
    """The options of `octavo serve` that ask for it."""
    kv = {"fp8_e4m3": "fp8", "auto": ""}.get(variant.kv, variant.kv)
    return [
        *(["--quantization", variant.scheme] if variant.scheme != "bf16" else []),
        *(["--kv-cache-dtype", kv] if kv else []),
    ]


def asked_variant(subject: Subject, given: Container[str]) -> Variant:
    """What the options mean. Without --quantization, what is recommended: PTPC, or the checkpoint's codes, and an FP8 cache."""
    config, native = subject.config, subject.quantized
    recommended = config.quantization is None and "kv_cache_dtype" not in given
    kv = "fp8_e4m3" if recommended else subject.kv_word(config.kv_cache_dtype, subject.itemsize)
    return Variant(config.quantization or ("bf16" if native else "ptpc_fp8"), native, kv, subject.itemsize)
