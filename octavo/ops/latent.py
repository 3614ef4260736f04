"""Contracts of the ops of MLA and of sparse attention; part of `octavo.ops`, as which callers know them."""

from __future__ import annotations

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.kvcache import IndexCache, LatentCache
from octavo.ops.bound import bound
from octavo.ops.contract import Norm, Rotation

__all__ = [
    "absorbed_queries", "expanded_attention", "head_linear", "latent_attention", "select_keys", "write_index_keys",
    "write_latent",
]  # fmt: skip


def head_linear(x: Tensor, w: Tensor) -> Tensor:
    """Per-head product x [T, H, K] by w [H, K, N], FP32 accumulation: [T, H, N] in x's dtype."""
    return bound["head_linear"](x, w)  # type: ignore[no-any-return]


def write_latent(kv: Tensor, norm: Norm, rotation: Rotation, cache: LatentCache, slots: Tensor) -> None:
    """Store each token's latent (RMSNorm applied) and rope key (rotated) at `slots` [T]. kv [T, R + D]: the projection.

    In codes (`fp8_ds_mla`) each 128 values of a latent share a scale: amax, at least 1e-4, over the largest code, rounded up to
    a power of two. NaN and infinity are stored as 0, as in `write_kv`.
    """
    bound["write_latent"](kv, norm, rotation, cache, slots)


def absorbed_queries(q: Tensor, up_k: Tensor, rotation: Rotation) -> Tensor:
    """MLA's absorbed queries [T, H, R + D]: the nope part of q [T, H, N + D] times up_k [H, N, R], then q's rope part, rotated.

    A score q·(up_k c) is (q up_k)·c, so keys need not be expanded from latents c (arXiv:2405.04434, section 2.1.2).
    """
    return bound["absorbed_queries"](q, up_k, rotation)  # type: ignore[no-any-return]


def latent_attention(q: Tensor, cache: LatentCache, batch: ForwardBatch, scale: float, chosen: Tensor | None = None) -> Tensor:
    """Causal attention of absorbed queries q [T, H, R + D] over latents, which are keys and values at once: [T, H, R].

    The cache already holds this step's tokens. chosen: for sparse attention, INT32 [T, top_k], the positions in its request's
    context that a token attends to, ascending, padded with -1; None: all positions up to its own. Scores and sums are FP32.
    A row that pads a graph gives zeros.
    """
    return bound["latent_attention"](q, cache, batch, scale, chosen)  # type: ignore[no-any-return]


def expanded_attention(
    q: Tensor, up_k: Tensor, up_v: Tensor, rotation: Rotation, cache: LatentCache, batch: ForwardBatch, scale: float
) -> Tensor:
    """MLA prefill: causal attention of q [T, H, N + D] over keys and values expanded from each request's latents: [T, H, V].

    up_k [H, N, R], up_v [H, R, V]: a head's key is up_k c followed by the shared rope key, its value is c up_v. For long
    prompts: a query-key pair costs N + D + V multiplications instead of 2R + D, but each call expands the latents again.
    """
    return bound["expanded_attention"](q, up_k, up_v, rotation, cache, batch, scale)  # type: ignore[no-any-return]


def write_index_keys(k: Tensor, norm: Norm, rotation: Rotation, cache: IndexCache, slots: Tensor) -> None:
    """Store the indexer's keys at `slots` [T]: k [T, D] as projected, after LayerNorm and rotation of the first dimensions.

    In codes, a Hadamard transform times D^-1/2 is applied first, and each key has a scale as in `write_latent`.
    """
    bound["write_index_keys"](k, norm, rotation, cache, slots)


def select_keys(q: Tensor, weights: Tensor, rotation: Rotation, cache: IndexCache, batch: ForwardBatch, top_k: int) -> Tensor:
    """The `top_k` positions of each token's context with the highest index scores: INT32 [T, top_k], ascending, -1-padded.

    The score of position s is the sum over heads h of weights[t, h] * max(0, q[t, h]·k[s]), in FP32. q [T, Hi, D], as
    projected, is rotated as keys are, and transformed and quantized too if keys are stored in codes; weights [T, Hi]. Ties go
    to the earlier position; a token sees positions up to its own; NaN ranks as -infinity. A row that pads a graph selects none.
    """
    return bound["select_keys"](q, weights, rotation, cache, batch, top_k)  # type: ignore[no-any-return]
