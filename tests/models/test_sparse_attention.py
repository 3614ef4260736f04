"""What an indexer finds: needles 30,000 tokens back, by a model of hand-made weights, and what transformers' chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Loaded, LoadModel, tokens
from models.test_logits import deepseek_v32, randomize
from models.test_mla_quantized import fake_choice
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from octavo import batch
from octavo.kvcache import KVCache, Layout

BLOCK, PIECE, CONTEXT = 64, 1024, 32768
WIDTH, VOCAB, FILLERS = 64, 256, 200  # of a token's vector; ids from FILLERS on are keys and answers, in turn
NEEDLES = {137: 200, 2_767: 202, 17_001: 204, 31_700: 206}  # where a key stands, the key; the answer is the id behind it
CONFIG: dict[str, Any] = dict(
    model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"], vocab_size=VOCAB, hidden_size=4 * WIDTH,
    intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
    first_k_dense_replace=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, n_shared_experts=1,
    q_lora_rank=2 * WIDTH, kv_lora_rank=2 * WIDTH, qk_nope_head_dim=WIDTH, qk_rope_head_dim=WIDTH, v_head_dim=WIDTH,
    index_n_heads=1, index_head_dim=2 * WIDTH, index_topk=2048, max_position_embeddings=CONTEXT, rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def induction(path: Path) -> None:
    """A model that says what stood behind the last place of the token that it sees.

    A hidden state has four parts: the token's vector, that of the token before, the answer's, and ones. Layer 0 copies the
    vector of the token before: the key that it attends to has angles one position behind the query's. Layer 1 attends to
    where the token before is this one, as its indexer does, and copies that token's vector.
    """
    own, before, answer, ones = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(4))
    low, high = own, before  # halves of latents
    one, hidden = torch.eye(WIDTH), 4 * WIDTH
    vectors = torch.nn.functional.normalize(torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))) * WIDTH**0.5
    embedding, head = torch.zeros(VOCAB, hidden), torch.zeros(VOCAB, hidden)
    embedding[:, own], embedding[:, ones], head[:, answer] = vectors, 1.0, vectors
    out = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(hidden)}
    angles = 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    for layer in range(2):
        m = {name: torch.zeros(shape) for name, shape in {
            "q_a_proj": (2 * WIDTH, hidden), "q_b_proj": (2 * WIDTH, 2 * WIDTH), "kv_a_proj_with_mqa": (3 * WIDTH, hidden),
            "kv_b_proj": (2 * WIDTH, 2 * WIDTH), "o_proj": (hidden, WIDTH), "indexer.wq_b": (2 * WIDTH, 2 * WIDTH),
            "indexer.wk": (2 * WIDTH, hidden), "indexer.weights_proj": (1, hidden),
        }.items()}  # fmt: skip
        m["q_a_proj"][low, own], m["q_a_proj"][high, ones] = one, one
        m["kv_a_proj_with_mqa"][low, own] = one
        m["kv_a_proj_with_mqa"][2 * WIDTH :: 2, ones] = 1 / WIDTH
        m["kv_b_proj"][WIDTH:, low] = one  # values
        m["indexer.weights_proj"][:, ones] = 1.0
        if layer == 0:
            turned = torch.stack([angles.cos(), -angles.sin()], -1).flatten()
            m["q_b_proj"][WIDTH:, high] = 100 * turned[:, None] / WIDTH
            m["o_proj"][before] = one
            m["indexer.wq_b"][: WIDTH // 2, high] = m["indexer.wk"][: WIDTH // 2, ones] = 1 / WIDTH
        else:
            m["kv_a_proj_with_mqa"][high, before] = one
            m["q_b_proj"][:WIDTH, low] = 8 * one
            m["kv_b_proj"][:WIDTH, high] = one  # keys
            m["o_proj"][answer] = one
            m["indexer.wq_b"][WIDTH:, low], m["indexer.wk"][WIDTH:, before] = one, one
        m |= {f"mlp.{n}_proj": torch.zeros(shape) for n, shape in dict(gate=(64, hidden), up=(64, hidden)).items()}
        m |= {"mlp.down_proj": torch.zeros(hidden, 64), "self_attn.indexer.k_norm": torch.ones(2 * WIDTH)}
        m |= {"self_attn.q_a_layernorm": torch.ones(2 * WIDTH), "self_attn.kv_a_layernorm": torch.ones(2 * WIDTH)}
        m |= {"input_layernorm": torch.ones(hidden), "post_attention_layernorm": torch.ones(hidden)}
        names = {n: n if n.startswith(("mlp.", "self_attn.")) or "layernorm" in n else f"self_attn.{n}" for n in m}
        out |= {f"model.layers.{layer}.{names[n]}.weight": t.contiguous() for n, t in m.items()}
        out[f"model.layers.{layer}.self_attn.indexer.k_norm.bias"] = torch.zeros(2 * WIDTH)
    save_file(out, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))


def haystack() -> list[int]:
    ids = torch.randint(3, FILLERS, (CONTEXT,), generator=torch.Generator().manual_seed(5)).tolist()
    for place, key in NEEDLES.items():
        ids[place : place + 2] = key, key + 1
    return ids


def with_cache(loaded: Loaded, kv: str, length: int) -> Loaded:
    """Gives the model a cache for contexts of `length`."""
    specs = loaded.model.kv_specs(kv, torch.float32, torch.float8_e4m3fn, Layout.PLAIN)
    loaded.cache, loaded.block_size = KVCache(specs, length // BLOCK + 1, BLOCK, loaded.platform.device), BLOCK
    loaded.model.bind_cache(loaded.cache.views)
    return loaded


def read(loaded: Loaded, ids: list[int]) -> None:
    """Fills the cache, whose block i + 1 is the context's block i. Pieces of a thousand tokens do not see one another, since a
    layer that looks one token back needs no more; each token is turned by the angles of its place in the whole."""
    pieces = [
        batch.Span(ids[at : at + PIECE], 0, list(range(1 + at // BLOCK, 1 + (at + PIECE) // BLOCK)), at)
        for at in range(0, len(ids), PIECE)
    ]
    for at in range(0, len(pieces), 8):
        loaded.hidden(pieces[at : at + 8])


def answers(loaded: Loaded) -> list[int]:
    """What the model says to each key as the last token of the whole context."""
    everything = list(range(1, 1 + CONTEXT // BLOCK))
    hidden = [loaded.hidden([batch.Span([key], CONTEXT - 1, everything)]) for key in NEEDLES.values()]
    with torch.inference_mode():
        found: list[int] = loaded.model.logits(torch.cat(hidden)).argmax(-1).tolist()
    return found


WANTED = [key + 1 for key in NEEDLES.values()]


def test_the_weights_do_so_in_transformers(tmp_path: Path) -> None:
    induction(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    ids = haystack()[120:180]
    with torch.no_grad():
        assert theirs(torch.tensor([[*ids, 200]])).logits[0, -1].argmax() == 201
        assert theirs(torch.tensor([[*ids, 202]])).logits[0, -1].argmax() != 203


@pytest.mark.parametrize("kv", ["auto", "fp8_e4m3"])
def test_needles_in_32k_tokens_are_found(kv: str, tmp_path: Path, load_model: LoadModel) -> None:
    """Of 32,768 tokens 2,048 are attended to. A needle is lost where its index keys are and where its latents are, and all
    are where the indexer looks for something else."""
    induction(tmp_path)
    loaded = with_cache(load_model(tmp_path), kv, CONTEXT)
    read(loaded, haystack())
    assert answers(loaded) == WANTED
    for name in ("index_k", "latent"):
        views = next(views for views in reversed(loaded.cache.views) if name in views)
        spoiled = views[name].view(torch.uint8)[1 + 2_768 // BLOCK]
        kept = spoiled.clone()
        spoiled.zero_()
        assert [found == wanted for found, wanted in zip(answers(loaded), WANTED, strict=True)] == [True, False, True, True]
        spoiled.copy_(kept)
    assert answers(loaded) == WANTED
    indexer: Any = loaded.model.model.layers[1].self_attn.indexer
    weight = indexer.weights_proj.weight
    weight.neg_()  # what looks most alike is chosen last
    assert not set(answers(loaded)) & set(WANTED)
    weight.neg_()
    assert answers(loaded) == WANTED


def test_at_4k_positions_the_same_are_chosen(tmp_path: Path, load_model: LoadModel) -> None:
    """Of 64 heads over 4,096 tokens of random weights: in FP32 what transformers' indexer chooses, but for the last bits; in
    FP8 what float64 does of the same codes. FP8 itself costs about 1.6% of the choice: many scores are near the last chosen."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=1, hidden_size=256, q_lora_rank=128, qk_rope_head_dim=64, max_position_embeddings=4096)
    model = randomize(deepseek_v32(**sizes, index_n_heads=64, index_head_dim=128, index_topk=2048))
    model.save_pretrained(tmp_path)
    ids, last = tokens(4096), 64
    attention, kept = model.model.layers[0].self_attn, DynamicCache(config=model.config)
    with torch.no_grad():
        h = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([ids])))
        latent = attention.q_a_layernorm(attention.q_a_proj(h))
        for at in range(0, 4096, last):
            places, part = torch.arange(at, at + last), slice(at, at + last)
            mask = torch.where(torch.arange(at + last) > places[:, None], -torch.inf, 0.0)[None]
            angles = model.model.rotary_emb(h, places[None])
            exact = attention.indexer(h[:, part], latent[:, part], angles, mask, places, past_key_values=kept)[0]
        coded = fake_choice(attention.indexer, h, latent, model.model.rotary_emb(h, torch.arange(4096)[None]), mask, last=last)[
            0
        ]
    found = {}
    for kv in ("auto", "fp8_e4m3"):
        loaded = with_cache(load_model(tmp_path), kv, 4096)
        read(loaded, ids)
        indexer, given = loaded.model.model.layers[0].self_attn.indexer, []
        indexer.register_forward_hook(lambda _, __, chosen, to=given: to.append(chosen))
        loaded.hidden([batch.Span(ids[-last:], 4096 - last, list(range(1, 1 + 4096 // BLOCK)))])
        (found[kv],) = given
    assert overlap(found["auto"], exact) > 0.9999
    assert overlap(found["fp8_e4m3"], coded) > 0.9999
    assert 0.98 < overlap(found["fp8_e4m3"], exact) < 0.999, "rounding to FP8 is seen, and no more than that"


def overlap(chosen: Tensor, wanted: Tensor) -> float:
    """The part of the wanted places that were chosen, on average over rows."""
    pairs = zip(chosen.tolist(), wanted.tolist(), strict=True)
    parts = [len(set(one) & set(other)) / len(other) for one, other in pairs]
    return sum(parts) / len(parts)
