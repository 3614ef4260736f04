"""Names of tensors as transformers gives them, where a checkpoint has others: those of wrappers, or names without a prefix.

A name is changed only where config.json leaves no doubt. `why_missing` says of a tensor that is not there what stands in its
place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from octavo.weights.stored_tensor import StoredTensor

__all__ = ["TEXT_MODELS", "as_published", "why_missing"]

EMBEDDING = "model.embed_tokens"
# The architectures of text whose names in transformers are known here; `octavo quantize` takes others, too, as they are.
TEXT_MODELS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "glm4_moe", "minimax_m2", "deepseek_v3", "deepseek_v32",
    "kimi_k2", "glm_moe_dsa",
)  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")  # DistributedDataParallel, torch.compile, peft after merging
_QKV = ("queries, keys and values", "q_proj, k_proj and v_proj")
_GATED = ("gate and up", "gate_proj and up_proj")
STACKED = {  # the last part of a module's name -> what a checkpoint may have in its place, what that stacks, under which names
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), (("qkv_proj", "W_pack", "query_key_value", "c_attn", "wqkv"), *_QKV)),
    **dict.fromkeys(("gate_proj", "up_proj"), (("gate_up_proj", "w12"), *_GATED)),
}
PACKED = {  # what a checkpoint may hold in a matrix's place, what that is, and what to do
    "qweight": ("is in the packed form of AWQ or GPTQ", "take one in BF16 or FP8"),
    "weight_qdata": ("is in torchao's form", "take one in BF16 or FP8"),
    "_weight_qdata": ("is in torchao's form", "take one in BF16 or FP8"),
    "compressed": ("is sparse, values with a bitmask", "take one in BF16 or FP8"),
    "base_layer.weight": ("is the base of an adapter of peft's", "merge the adapter (merge_and_unload) and save that"),
}
ORIGINAL = ("tok_embeddings.weight", "model.tok_embeddings.weight", "transformer.wte.weight")  # of other layouts of names


def as_published(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> tuple[dict[str, StoredTensor], list[str]]:
    """`tensors` under the names that transformers gives them, and what was changed."""
    found, changes = dict(tensors), []
    while wrapper := next((w for w in WRAPPERS if found and all(name.startswith(w) for name in found)), None):
        found = _renamed(found, {wrapper: ""})
        changes.append(f"without '{wrapper}'")
    if config.get("model_type") not in TEXT_MODELS:
        return found, changes
    for prefix in ("language_model.model.", "model.language_model."):
        if f"{prefix}embed_tokens.weight" in found and f"{EMBEDDING}.weight" not in found:
            found = _renamed(found, {"language_model.lm_head.": "lm_head.", prefix: "model."})
            changes.append(f"with 'model.' for '{prefix}'")
    if "embed_tokens.weight" in found and "layers.0.input_layernorm.weight" in found:
        found = _renamed(found, {"lm_head.": "lm_head.", "": "model."})
        changes.append("with 'model.' before them")
    if config.get("tie_word_embeddings") is True and f"{EMBEDDING}.weight" not in found and "lm_head.weight" in found:
        found = _renamed(found, {"lm_head.": f"{EMBEDDING}."})
        changes.append("with the head's matrix as the embedding's, to which it is tied")
    return found, changes


def _renamed(tensors: Mapping[str, StoredTensor], prefixes: Mapping[str, str]) -> dict[str, StoredTensor]:
    """With the first of `prefixes` that a name has replaced; as they were, if two would then have one name."""
    renamed = {}
    for name in tensors:
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        renamed[name] = name if old is None else prefixes[old] + name.removeprefix(old)
    if len(set(renamed.values())) < len(renamed):
        return dict(tensors)
    return {
        new: tensors[name] if new == name else replace(tensors[name], name=new, key=tensors[name].key or name)
        for name, new in renamed.items()
    }


def why_missing(full: str, names: Collection[str]) -> str:
    """The sentence for a tensor `full` that the model needs and that is not among `names`."""
    module = full.rpartition(".")[0]
    parent, dot, last = module.rpartition(".")
    others, what, parts = STACKED.get(last, ((), "", ""))
    for other in others:
        if f"{parent}{dot}{other}.weight" in names:
            return (
                f"the checkpoint stacks {what} in {parent}{dot}{other}.weight, in an order or of a size that config.json does "
                f"not tell; store {parts} apart, as transformers does for this model_type."
            )
    form = next((form for end, form in PACKED.items() if f"{module}.{end}" in names), None)
    if form:
        return f"the checkpoint's {module} {form[0]}, which Octavo does not read; {form[1]}."
    if original := next((name for name in ORIGINAL if name in names), None):
        return (
            f"the checkpoint names its tensors in another layout than Hugging Face's (it has {original} and no {full}); "
            "take the Hugging Face form of the model."
        )
    if like := sorted((name for name in names if name.endswith(f".{full}") or full.endswith(f".{name}")), key=len)[:1]:
        return (
            f"the checkpoint has no tensor {full}, which the model needs, but has {like[0]}: its names have another prefix "
            f"than those of this model_type; save it with transformers' save_pretrained."
        )
    return f"the checkpoint has no tensor {full}, which the model needs; is it complete?"
