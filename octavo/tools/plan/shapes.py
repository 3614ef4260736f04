"""Every weight of a model, from the numbers in its config.json: one function an architecture, named by `model_type`.

Names and shapes are the checkpoint's. Not counted: buffers that are no parameters (a router's correction bias), and the
multi-token prediction layers after the last, which are not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import OctavoError
from octavo.models import model_type_of
from octavo.tools.plan.sizes import VECTOR, Attention, Weight
from octavo.tools.plan.towers import kimi_vision, qwen_vision

__all__ = ["ARCHITECTURES", "Model", "Numbers", "model_of"]

EMBEDDINGS = "a look-up gains nothing from FP8"
HEAD = "lm_head is BF16 by default; --quantize-lm-head stores it in FP8"
TIED = "lm_head's matrix, too: BF16 by default; --quantize-lm-head stores it in FP8"
ROUTER = "small, and it decides which experts run"
INDEX_WEIGHTS = "64 weights a token that decide what attention sees"


@dataclass(frozen=True)
class Numbers:
    """A config.json's numbers. Raises OctavoError, naming the field, for one that is missing or wrong."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> int:
        return self.get(name)

    def get(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise OctavoError(f"config.json has no {name}, which this architecture needs.")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OctavoError(f"config.json: {name} must be an integer of at least {least}, not {value!r}.")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.values.get(name, default))

    def part(self, name: str) -> Numbers:
        value = self.values.get(name)
        if not isinstance(value, Mapping):
            raise OctavoError(f"config.json has no {name}, which this architecture needs.")
        return Numbers(value)


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model. `extra`: globs of checkpoint tensors that are not counted and not loaded."""

    model_type: str
    weights: tuple[Weight, ...]
    attention: Attention
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    extra: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(w.values for w in self.weights)

    @property
    def components(self) -> set[str]:
        return {w.component for w in self.weights}

    @property
    def active_parameters(self) -> int:
        """Parameters that multiply one token of text: no embeddings, no vision, of the experts those it is sent to."""
        return sum(
            w.active * sum(n * k for n, k in w.rank_shapes(1))
            for w in self.weights
            if not w.is_vector and w.component != "vision"
        )


def model_of(config: Mapping[str, Any]) -> Model:
    """The model of a config.json. Raises OctavoError for an architecture that is not known, or a field that is missing."""
    return ARCHITECTURES[model_type_of(config, ARCHITECTURES, "cannot be planned", "known are")](Numbers(config))


def dense(c: Numbers, *, qkv_bias: bool = False, head_norms: bool = False) -> Model:
    """Llama and its kin: grouped-query attention, gated MLP."""
    return _decoder(c, "model", "lm_head", qkv_bias=qkv_bias, head_norms=head_norms)


def _qwen_vl(c: Numbers) -> Model:
    text, tied = c.part("text_config"), c.flag("tie_word_embeddings")
    vision = qwen_vision(c.part("vision_config"))
    return _decoder(text, "model.language_model", "lm_head", head_norms=True, tied=tied, vision=vision)


def _decoder(
    c: Numbers,
    root: str,
    head: str,
    *,
    qkv_bias: bool = False,
    head_norms: bool = False,
    tied: bool | None = None,
    vision: list[Weight] | None = None,
) -> Model:
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    kv_heads, dim = c.get("num_key_value_heads", heads), c.get("head_dim", hidden // heads)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    weights = _ends(c, root, head, c.flag("tie_word_embeddings") if tied is None else tied)
    for i in range(layers):
        at = f"{root}.layers.{i}"
        names = [f"{at}.self_attn.{p}_proj" for p in "qkv"]
        rows = [heads * dim, kv_heads * dim, kv_heads * dim]
        weights += matrices("attention", names, rows, hidden, "rows", bias or qkv_bias, heads=(heads, kv_heads, kv_heads))
        weights += matrices("attention", [f"{at}.self_attn.o_proj"], [hidden], heads * dim, "columns", bias)
        if head_norms:
            weights += [vector(f"{at}.self_attn.{p}_norm.weight", dim) for p in "qk"]
        weights += _block_norms(at, hidden)
        weights += _mixture(c, at, hidden) if _is_sparse(c, i) else gated_mlp("mlp", f"{at}.mlp", hidden, c, mlp_bias)
    return Model(
        str(c.values["model_type"]),
        (*weights, *(vision or [])),
        Attention(layers, heads, kv_heads, dim, dim),
        hidden,
        c["intermediate_size"],
        c["vocab_size"],
        _positions(c),
        ("*.rotary_emb.inv_freq", *KV_SCALES),
    )


def _is_sparse(c: Numbers, layer: int) -> bool:
    if c.get("num_experts", c.get("num_local_experts", 0, least=0), least=0) == 0:
        return False
    return layer not in (c.values.get("mlp_only_layers") or ()) and (layer + 1) % c.get("decoder_sparse_step", 1) == 0


def _mixture(c: Numbers, at: str, hidden: int) -> list[Weight]:
    experts = c.get("num_experts", c.get("num_local_experts", 1))
    router = matrices("router", [f"{at}.mlp.gate"], [experts], hidden, "whole", kept=ROUTER)
    return router + expert_mlps(f"{at}.mlp.experts.{{}}", hidden, c["moe_intermediate_size"], experts, c["num_experts_per_tok"])


def latent(c: Numbers, root: str = "model", head: str = "lm_head", vision: list[Weight] | None = None) -> Model:
    """DeepSeek V3, V3.2 and Kimi: multi-head latent attention, a mixture of experts after the first dense layers."""
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    q_lora, kv_lora, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, v_dim, bias = c["qk_nope_head_dim"], c["v_head_dim"], c.flag("attention_bias")
    index = (c["index_n_heads"], c["index_head_dim"], c["index_topk"]) if "index_n_heads" in c.values else (0, 0, 0)
    experts, inner, chosen = c["n_routed_experts"], c["moe_intermediate_size"], c["num_experts_per_tok"]
    weights = _ends(c, root, head, c.flag("tie_word_embeddings"))
    for i in range(layers):
        at, attn = f"{root}.layers.{i}", f"{root}.layers.{i}.self_attn"
        weights += matrices("attention", [f"{attn}.q_a_proj"], [q_lora], hidden, "whole", bias)
        weights += matrices("attention", [f"{attn}.q_b_proj"], [heads * (nope + rope)], q_lora, "rows", heads=(heads,))
        weights += matrices("attention", [f"{attn}.kv_a_proj_with_mqa"], [kv_lora + rope], hidden, "whole", bias)
        weights += matrices("attention", [f"{attn}.kv_b_proj"], [heads * (nope + v_dim)], kv_lora, "rows", heads=(heads,))
        weights += matrices("attention", [f"{attn}.o_proj"], [hidden], heads * v_dim, "columns", bias)
        weights += [vector(f"{attn}.q_a_layernorm.weight", q_lora), vector(f"{attn}.kv_a_layernorm.weight", kv_lora)]
        weights += _indexer(f"{attn}.indexer", hidden, q_lora, *index[:2]) + _block_norms(at, hidden)
        if i < c.get("first_k_dense_replace", 0, least=0):
            weights += gated_mlp("mlp", f"{at}.mlp", hidden, c)
            continue
        weights += matrices("router", [f"{at}.mlp.gate"], [experts], hidden, "whole", kept=ROUTER)
        weights += expert_mlps(f"{at}.mlp.experts.{{}}", hidden, inner, experts, chosen)
        if shared := c.get("n_shared_experts", 0, least=0):
            weights += gated_mlp("shared experts", f"{at}.mlp.shared_experts", hidden, shared * inner)
    extra = ("*.rotary_emb.inv_freq", "*.mlp.gate.e_score_correction_bias", *KV_SCALES)
    return Model(
        str(c.values["model_type"]),
        (*weights, *(vision or [])),
        Attention(layers, heads, heads, nope + rope, v_dim, kv_lora, rope, *index),
        hidden,
        c["intermediate_size"],
        c["vocab_size"],
        _positions(c),
        (*extra, *(f"{root}.layers.{layers + i}.*" for i in range(c.get("num_nextn_predict_layers", 0, least=0)))),
    )


def _indexer(at: str, hidden: int, q_lora: int, heads: int, dim: int) -> list[Weight]:
    if not heads:
        return []
    return [
        *matrices("indexer", [f"{at}.wq_b"], [heads * dim], q_lora, "whole"),
        *matrices("indexer", [f"{at}.wk"], [dim], hidden, "whole"),
        *matrices("indexer", [f"{at}.weights_proj"], [heads], hidden, "whole", kept=INDEX_WEIGHTS),
        vector(f"{at}.k_norm.weight", dim),
        vector(f"{at}.k_norm.bias", dim),
    ]


def _kimi(c: Numbers) -> Model:
    text = Numbers({**c.part("text_config").values, "model_type": c.values["model_type"]})
    vision = kimi_vision(c.part("vision_config"), text["hidden_size"])
    return latent(text, "language_model.model", "language_model.lm_head", vision)


def matrices(
    component: str,
    names: list[str],
    rows: list[int],
    columns: int,
    split: str,
    bias: bool = False,
    *,
    heads: tuple[int, ...] = (),
    kept: str = "",
) -> list[Weight]:
    """A stack of matrices, and their biases."""
    stack = Weight(component, tuple(names), tuple((n, columns) for n in rows), split, heads, kept=kept)
    if not bias:
        return [stack]
    shared = "rows" if split == "rows" else "whole"  # a row-parallel layer adds its bias once, after the sum
    tensors, sizes = tuple(f"{name}.bias" for name in names), tuple((n,) for n in rows)
    return [stack, Weight(component, tensors, sizes, shared, heads, kept=VECTOR)]


def vector(name: str, size: int, component: str = "norms") -> Weight:
    return Weight(component, (name,), ((size,),), kept=VECTOR)


def gated_mlp(component: str, at: str, hidden: int, inner: Numbers | int, bias: bool = False) -> list[Weight]:
    """gate, up and down; `inner` is the width between, or the config that has it."""
    width = inner if isinstance(inner, int) else inner["intermediate_size"]
    up = matrices(component, [f"{at}.gate_proj", f"{at}.up_proj"], [width, width], hidden, "rows", bias)
    return up + matrices(component, [f"{at}.down_proj"], [hidden], width, "columns", bias)


def expert_mlps(at: str, hidden: int, inner: int, experts: int, active: int) -> list[Weight]:
    """The routed experts of one layer, split like an MLP: every rank holds a part of each."""
    up, down = (f"{at}.gate_proj", f"{at}.up_proj"), (f"{at}.down_proj",)
    return [
        Weight("experts", up, ((inner, hidden), (inner, hidden)), "rows", experts=experts, active=active),
        Weight("experts", down, ((hidden, inner),), "columns", experts=experts, active=active),
    ]


def _ends(c: Numbers, root: str, head: str, tied: bool) -> list[Weight]:
    shape = ((c["vocab_size"], c["hidden_size"]),)
    name = f"{root}.embed_tokens"
    return [
        Weight("embeddings", (name,), shape, active=0, kept=TIED if tied else EMBEDDINGS),
        Weight("lm_head", (name if tied else head,), shape, kept=HEAD, tied=tied),
        vector(f"{root}.norm.weight", c["hidden_size"]),
    ]


def _block_norms(at: str, hidden: int) -> list[Weight]:
    return [vector(f"{at}.{name}.weight", hidden) for name in ("input_layernorm", "post_attention_layernorm")]


def _positions(c: Numbers) -> int:
    """The longest context: YaRN's stretched one where the config gives the original's (as octavo.engine.runner has it)."""
    limit = c["max_position_embeddings"]
    rope = c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) == "yarn" and rope.get("factor"):
        limit = max(limit, int((rope.get("original_max_position_embeddings") or limit) * rope["factor"]))
    return limit


KV_SCALES = ("*.k_scale", "*.v_scale", "*.q_scale", "*.kv_scale", "*_proj.output_scale")
ARCHITECTURES: dict[str, Callable[[Numbers], Model]] = {
    "llama": dense,
    "mistral": dense,
    "qwen2": lambda c: dense(c, qkv_bias=True),
    "qwen3": lambda c: dense(c, head_norms=True),
    "qwen3_moe": lambda c: dense(c, head_norms=True),
    "qwen3_vl": _qwen_vl,
    "qwen3_vl_moe": _qwen_vl,
    "deepseek_v3": latent,
    "deepseek_v32": latent,
    "kimi_k2": latent,
    "kimi_k25": _kimi,
}
