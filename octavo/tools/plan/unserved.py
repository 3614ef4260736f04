"""Architectures that can be planned and are not served yet, built of the engine's own layers. It shrinks with each that lands.

Names and shapes are the checkpoint's. Not counted: buffers that are no parameters (a router's correction bias), and the
multi-token prediction layers after the last, which are not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from octavo.distributed import TensorParallel
from octavo.errors import OctavoError
from octavo.kvcache import Field, KVCacheSpec, Layout, spec_for
from octavo.layers.embedding import Embedding
from octavo.layers.linear import ColumnParallelLinear, GateUpLinear, LMHead, QKVLinear, RowParallelLinear
from octavo.layers.moe import Experts
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import longest_context
from octavo.quant.formats import WHOLE
from octavo.quant.scheme import BLOCK
from octavo.tools.plan.model_source import Numbers
from octavo.tools.plan.roofline import Attention
from octavo.tools.plan.towers import Kept, Places, Vectors, kimi_tower, qwen_tower
from octavo.tools.plan.walk import ROUTER, Walker

__all__ = ["UNSERVED", "UnservedModel", "build_unserved", "stored_as"]

INDEX_WEIGHTS = "64 weights a token that decide what attention sees"
EXTRA = ("*.rotary_emb.*", "*.mlp.gate.e_score_correction_bias", "*.k_scale", "*.v_scale", "*.q_scale", "*.kv_scale",
         "*_proj.output_scale", "lm_head.weight")  # fmt: skip


@dataclass
class UnservedModel:
    """What a plan asks of a model, as octavo.models.contract has it. max_len: the longest context."""

    numbers: Numbers
    tp: TensorParallel
    places: Places
    attention: Attention
    ignored: Sequence[str] = EXTRA

    @property
    def max_len(self) -> int:
        rope = self.numbers.values.get("rope_parameters") or self.numbers.values.get("rope_scaling") or {}
        return longest_context(self.numbers["max_position_embeddings"], rope)

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        return iter((f"{path}.-" if getattr(layer, "reads_siblings", False) else path, layer) for path, layer in self.places)

    def workspace_bytes(self, tokens: int) -> int:
        return tokens * (4 * self.numbers["intermediate_size"] + 8 * self.numbers["hidden_size"]) * 4

    def kv_specs(self, kv_cache_dtype: str, dtype: torch.dtype, fp8_dtype: torch.dtype, layout: Layout) -> list[KVCacheSpec]:
        """Keys and values, or MLA's latent with DeepSeek's indexer's keys, which every rank has whole."""
        a = self.attention
        if not a.latent:
            heads = self.tp.part(a.kv_heads)
            return [spec_for(kv_cache_dtype, heads, a.qk_dim, dtype, fp8_dtype, layout)] * a.layers
        if stored_as(a, kv_cache_dtype) == "fp8_ds_mla":  # a scale a group of 128 of the latent
            fields = [Field("latent", (a.latent,), fp8_dtype), Field("scale", (ceil(a.latent / BLOCK),), torch.float32)]
            latent = KVCacheSpec((*fields, Field("rope", (a.rope,), torch.bfloat16)))
        else:
            wide = dtype if kv_cache_dtype == "auto" else torch.bfloat16
            latent = KVCacheSpec((Field("latent", (a.latent,), wide), Field("rope", (a.rope,), wide)))
        if not a.index_dim:
            return [latent] * a.layers
        keys = Field("index_k", (a.index_dim,), fp8_dtype), Field("index_scale", (ceil(a.index_dim / BLOCK),), torch.float32)
        return [latent, KVCacheSpec(keys)] * a.layers


def stored_as(attention: Attention, kv_cache_dtype: str) -> str:
    """The cache's format for a canonical --kv-cache-dtype. Raises OctavoError for one that MLA's cache has not."""
    if kv_cache_dtype in ("auto", "bfloat16") or not attention.latent:
        return kv_cache_dtype
    if kv_cache_dtype == "fp8_e4m3":
        return "fp8_ds_mla"
    raise OctavoError(f"--kv-cache-dtype {kv_cache_dtype} is not for MLA models, whose FP8 cache is fp8_ds_mla; use fp8.")


# --- layers that the served models have not -------------------------------------------------------------------------------


@dataclass
class Whole:
    """A matrix that every rank has whole."""

    name: str
    rows: int
    columns: int
    bias: bool = False

    def load(self, loader: Walker) -> None:
        loader.weight([self.name], [(self.rows, self.columns)], [WHOLE])
        if self.bias:
            loader.vector(f"{self.name}.bias", (self.rows,))


# --- architectures --------------------------------------------------------------------------------------------------------


def _ends(c: Numbers, tp: TensorParallel, root: str, head: str, tied: bool) -> Places:
    vocab, hidden = c["vocab_size"], c["hidden_size"]
    table, at = f"{root}.embed_tokens", head.rpartition(".")[0]
    lm_head = LMHead(vocab, hidden, tp, tied=table if tied else None)
    return [(table, Embedding(vocab, hidden, tp)), (f"{root}.norm", RMSNorm(hidden, 0)), (at, lm_head)]


def _mlp(at: str, hidden: int, inner: int, tp: TensorParallel) -> Places:
    down = RowParallelLinear("down_proj", inner, hidden, bias=False, tp=tp)
    return [(at, GateUpLinear(hidden, inner, bias=False, tp=tp)), (at, down)]


def _block_norms(at: str, hidden: int) -> Places:
    return [(f"{at}.{name}", RMSNorm(hidden, 0)) for name in ("input_layernorm", "post_attention_layernorm")]


def _grouped(c: Numbers, tp: TensorParallel, root: str = "model", tied: bool | None = None) -> UnservedModel:
    """Qwen3-VL's text: grouped-query attention with normed heads, and a mixture of experts where the config has one."""
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    kv_heads, dim = c.get("num_key_value_heads", heads), c.get("head_dim", hidden // heads)
    bias = bool(c.values.get("attention_bias"))
    places = _ends(c, tp, root, "lm_head", bool(c.values.get("tie_word_embeddings")) if tied is None else tied)
    for i in range(layers):
        at, attn = f"{root}.layers.{i}", f"{root}.layers.{i}.self_attn"
        places += [(attn, QKVLinear(hidden, heads, kv_heads, dim, bias=bias, tp=tp)),
                   (attn, RowParallelLinear("o_proj", heads * dim, hidden, bias=bias, tp=tp)),
                   (f"{attn}.q_norm", RMSNorm(dim, 0)), (f"{attn}.k_norm", RMSNorm(dim, 0)),
                   *_block_norms(at, hidden)]  # fmt: skip
        experts = c.get("num_experts", c.get("num_local_experts", 0, least=0), least=0)
        dense = not experts or i in (c.values.get("mlp_only_layers") or ()) or (i + 1) % c.get("decoder_sparse_step", 1)
        if dense:
            places += _mlp(f"{at}.mlp", hidden, c["intermediate_size"], tp)
            continue
        chosen = Experts(hidden, c["moe_intermediate_size"], experts, c["num_experts_per_tok"], tp)
        places += [(f"{at}.mlp", Kept(Whole("gate", experts, hidden), ROUTER)), (f"{at}.mlp.experts", chosen)]
    return UnservedModel(c, tp, places, Attention(layers, heads, kv_heads, dim, dim))


def _latent(c: Numbers, tp: TensorParallel, root: str = "model", head: str = "lm_head") -> UnservedModel:
    """DeepSeek V3, V3.2 and Kimi: multi-head latent attention, a mixture of experts after the first dense layers."""
    hidden, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    q_lora, kv_lora, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, v_dim, bias = c["qk_nope_head_dim"], c["v_head_dim"], bool(c.values.get("attention_bias"))
    index = [c[n] for n in ("index_n_heads", "index_head_dim", "index_topk")] if "index_n_heads" in c.values else [0, 0, 0]
    experts, inner, chosen = c["n_routed_experts"], c["moe_intermediate_size"], c["num_experts_per_tok"]
    shared = c.get("n_shared_experts", 0, least=0)

    def split(name: str, columns: int, rows: int) -> ColumnParallelLinear:
        return ColumnParallelLinear([name], columns, [rows], bias=False, tp=tp, heads=[heads])

    places = _ends(c, tp, root, head, bool(c.values.get("tie_word_embeddings")))
    for i in range(layers):
        at, attn = f"{root}.layers.{i}", f"{root}.layers.{i}.self_attn"
        places += [(attn, Whole("q_a_proj", q_lora, hidden, bias)), (attn, split("q_b_proj", q_lora, heads * (nope + rope))),
                   (attn, Whole("kv_a_proj_with_mqa", kv_lora + rope, hidden, bias)),
                   (attn, split("kv_b_proj", kv_lora, heads * (nope + v_dim))),
                   (attn, RowParallelLinear("o_proj", heads * v_dim, hidden, bias=bias, tp=tp)),
                   (f"{attn}.q_a_layernorm", RMSNorm(q_lora, 0)), (f"{attn}.kv_a_layernorm", RMSNorm(kv_lora, 0)),
                   *(_indexer(f"{attn}.indexer", hidden, q_lora, *index[:2]) if index[0] else []),
                   *_block_norms(at, hidden)]  # fmt: skip
        if i < c.get("first_k_dense_replace", 0, least=0):
            places += _mlp(f"{at}.mlp", hidden, c["intermediate_size"], tp)
            continue
        places.append((f"{at}.mlp", Kept(Whole("gate", experts, hidden), ROUTER)))
        places.append((f"{at}.mlp.experts", Experts(hidden, inner, experts, chosen, tp)))
        places += _mlp(f"{at}.mlp.shared_experts", hidden, shared * inner, tp) if shared else []
    unread = [f"{root}.layers.{layers + i}.*" for i in range(c.get("num_nextn_predict_layers", 0, least=0))]
    attention = Attention(layers, heads, heads, nope + rope, v_dim, kv_lora, rope, *index)
    return UnservedModel(c, tp, places, attention, (*EXTRA, *unread))


def _indexer(at: str, hidden: int, q_lora: int, heads: int, dim: int) -> Places:
    weights = Kept(Whole("weights_proj", heads, hidden), INDEX_WEIGHTS)
    norm = Vectors({"weight": (dim,), "bias": (dim,)})
    return [(at, Whole("wq_b", heads * dim, q_lora)), (at, Whole("wk", dim, hidden)), (at, weights), (f"{at}.k_norm", norm)]


def _qwen_vl(c: Numbers, tp: TensorParallel) -> UnservedModel:
    model = _grouped(c.part("text_config"), tp, "model.language_model", bool(c.values.get("tie_word_embeddings")))
    model.places += qwen_tower(c.part("vision_config"), tp)
    return model


def _kimi(c: Numbers, tp: TensorParallel) -> UnservedModel:
    model = _latent(c.part("text_config"), tp, "language_model.model", "language_model.lm_head")
    model.places += kimi_tower(c.part("vision_config"), model.numbers["hidden_size"], tp)
    return model


UNSERVED: dict[str, Callable[[Numbers, TensorParallel], UnservedModel]] = {
    "qwen3_vl": _qwen_vl,
    "qwen3_vl_moe": _qwen_vl,
    "deepseek_v3": _latent,
    "deepseek_v32": _latent,
    "kimi_k2": _latent,
    "kimi_k25": _kimi,
}


def build_unserved(config: Mapping[str, Any], tp: TensorParallel) -> UnservedModel:
    """Raises OctavoError for a field that is missing or wrong, and for heads that do not split."""
    return UNSERVED[config["model_type"]](Numbers(config), tp)
