"""Times DeepSeek-V3.2's indexer and the writes of its caches, a layer, each beside the limit, and checks them first.

    python -m bench.indexer

The choice is checked against scores of the same codes by torch in FP32: all that is chosen scores at least what is not. The
limit is the longer of 132 bytes a key that some token sees, once for a request, over the copy bandwidth, and 2 * 64 * 128
operations a pair of a token and a key over the rate of a large FP8 product, both measured in the same run. Calls go round
requests whose keys are more than the L2 cache holds, in captured graphs; medians.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import octavo.engine  # noqa: F401 (says how torch's threads wait, before torch is loaded)

import torch  # isort: skip

from torch import Tensor

from bench.timing import in_graph
from octavo import ops
from octavo.batch import ForwardBatch
from octavo.kvcache import IndexCache, KVCache, LatentCache, index_spec, latent_spec
from octavo.ops.reference_latent import hadamard, power_of_two_codes, read_index_keys, rotated
from octavo.platform import Platform, detect
from octavo.tools.bench.ceilings import measure_ceilings
from octavo.tools.bench.limit import Ceilings

HEADS, DIM, ROPE, TOP_K, BLOCK = 64, 128, 64, 2048, 64  # the indexer's
RANK, NOPE, V, ATTENTION_HEADS = 512, 128, 128, 128
DECODES = [(requests, context) for requests in (1, 32, 256) for context in (4096, 32768, 131072)]
PROMPTS = [(8192, 8192), (8192, 32768), (8192, 131072)]  # tokens, the context with them
ROTATE = 128 << 20  # bytes that sets of requests hold together
TOKENS = (1, 32, 256, 8192)  # that are written


class Keys:
    """A cache of index keys with what `write_index_keys` made of random ones, and requests over it."""

    def __init__(self, p: Platform, tokens: int):
        self.p, self.blocks = p, -(-tokens // BLOCK)
        cache = KVCache([index_spec(DIM, p.fp8_dtype, wide=False)], self.blocks, BLOCK, p.device)
        self.cache = IndexCache.of(cache.views[0])
        angles = torch.rand(1 << 17, ROPE // 2, device=p.device) * 7
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        gain, bias = (torch.randn(DIM, device=p.device).bfloat16() for _ in range(2))
        self.norm = ops.Norm(gain, 1e-6, bias)
        slots = torch.randperm(self.blocks * BLOCK, device=p.device)
        for at in slots.split(1 << 20):
            ops.write_index_keys(self.random(len(at), DIM), self.norm, self.rotation(len(at)), self.cache, at)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.p.device).bfloat16()

    def rotation(self, tokens: int) -> ops.Rotation:
        return ops.Rotation(self.cos_sin, torch.arange(tokens, device=self.p.device) % len(self.cos_sin), False)

    def batch(self, lens: Sequence[int], contexts: Sequence[int], first: int = 0) -> ForwardBatch:
        """Requests with so many tokens at the ends of their contexts, over blocks from `first` on in a random order."""
        widths = [-(-context // BLOCK) for context in contexts]
        order = torch.randperm(sum(widths), device=self.p.device)
        table = torch.zeros(len(lens), max(widths), dtype=torch.int32, device=self.p.device)
        for row, (width, ids) in enumerate(zip(widths, order.split(widths), strict=True)):
            table[row, :width] = ((first + ids) % self.blocks).int()
        starts = torch.tensor([0, *lens], device=self.p.device).cumsum(0)
        places = torch.cat([torch.arange(c - n, c, device=self.p.device) for n, c in zip(lens, contexts, strict=True)])
        return ForwardBatch(
            places, places, places, places, starts.int(), torch.tensor(contexts, device=self.p.device).int(), table,
            list(lens), list(contexts), BLOCK,
        )  # fmt: skip

    def call(self, batch: ForwardBatch) -> Callable[[], Tensor]:
        q, weights = self.random(batch.num_tokens, HEADS, DIM), self.random(batch.num_tokens, HEADS)
        rotation = ops.Rotation(self.cos_sin, batch.positions, False)
        return lambda: ops.select_keys(q, weights, rotation, self.cache, batch, TOP_K)

    def sets(self, lens: Sequence[int], contexts: Sequence[int]) -> list[Callable[[], Tensor]]:
        size = sum(contexts)
        number = max(1, min(128, ROTATE // (132 * size), self.blocks * BLOCK // size))
        return [self.call(self.batch(lens, contexts, i * size // BLOCK)) for i in range(number)]


def check(keys: Keys, lens: Sequence[int], contexts: Sequence[int]) -> str:
    """How far, over the scores' spread, what is not chosen is above what is; raises where that is more than rounding."""
    batch = keys.batch(lens, contexts)
    q, weights = keys.random(batch.num_tokens, HEADS, DIM), keys.random(batch.num_tokens, HEADS)
    rotation = ops.Rotation(keys.cos_sin, batch.positions, False)
    found = ops.select_keys(q, weights, rotation, keys.cache, batch, TOP_K).long()
    codes, scale = power_of_two_codes(
        torch.cat([rotated(q[..., :ROPE], rotation), q[..., ROPE:]], -1).float() @ hadamard(DIM).to(q.device), keys.p.fp8_dtype
    )
    queries = codes.float() * scale
    worst, start = 0.0, 0
    for row, (count, context) in enumerate(zip(lens, contexts, strict=True)):
        stored = read_index_keys(keys.cache, batch.block_tables[row, : -(-context // BLOCK)].long(), context)
        for token in (*range(start, min(start + 20, start + count)), start + count - 1):
            sees = context - count + token - start + 1
            own, places = weights[token].float() @ (queries[token] @ stored[:sees].T).relu(), found[token]
            chosen = places[places >= 0]
            if len(chosen) != min(TOP_K, sees) or (chosen.diff() <= 0).any() or chosen[-1] >= sees:
                raise AssertionError(f"token {token} of {sees} places has {len(chosen)}, which are not ascending ones")
            left = torch.ones(sees, dtype=torch.bool, device=q.device).index_fill(0, chosen, False)
            if left.any():
                worst = max(worst, float((own[left].max() - own[chosen].min()) / own.std()))
        start += count
    if not worst < 1e-2:  # rounding flips some codes of a query, each a part in 1000 of the spread
        raise AssertionError(f"a place that is not chosen scores {worst:.2e} spreads more than one that is")
    return f"{worst:.1e}"


def writes(p: Platform, keys: Keys) -> Iterator[tuple[str, Callable[[], object], float]]:
    """Name, call, and the bytes that it moves at least."""
    for tokens in TOKENS:
        slots = torch.randperm(1 << 14, device=p.device)[:tokens]
        rotation = keys.rotation(tokens)
        k = keys.random(tokens, DIM)
        yield (
            f"write_index_keys T={tokens}",
            lambda k=k, r=rotation, s=slots: ops.write_index_keys(k, keys.norm, r, keys.cache, s),  # type: ignore[misc]
            tokens * (2 * DIM + 132),
        )
        for kv, size in (("fp8_ds_mla", 656), ("auto", 2 * (RANK + ROPE))):
            cache = KVCache([latent_spec(kv, RANK, ROPE, torch.bfloat16, p.fp8_dtype)], 256, BLOCK, p.device)
            norm, kv_rows = ops.Norm(keys.random(RANK), 1e-6), keys.random(tokens, 1536 + RANK + ROPE)[:, 1536:]
            latent, pairs = LatentCache.of(cache.views[0]), rotation._replace(interleaved=True)
            yield (
                f"write_latent {kv} T={tokens}",
                lambda x=kv_rows, n=norm, r=pairs, c=latent, s=slots: ops.write_latent(x, n, r, c, s),  # type: ignore[misc]
                tokens * (2 * (RANK + ROPE) + size),
            )
        heads = ATTENTION_HEADS if tokens < 8192 else 16
        q, up = keys.random(tokens, heads, NOPE + ROPE), keys.random(heads, NOPE + V, RANK)
        weight = 2 * heads * RANK
        yield (
            f"absorbed_queries T={tokens} H={heads}",
            lambda q=q, up=up, r=pairs: ops.absorbed_queries(q, up[:, :NOPE], r),  # type: ignore[misc]
            2 * tokens * heads * (NOPE + RANK + 2 * ROPE) + weight * NOPE,
        )
        x = keys.random(tokens, heads, RANK)
        yield (
            f"head_linear T={tokens} H={heads}",
            lambda x=x, up=up: ops.head_linear(x, up[:, NOPE:].mT),  # type: ignore[misc]
            2 * tokens * heads * (RANK + V) + weight * V,
        )


def limit(on: Ceilings, lens: Sequence[int], contexts: Sequence[int]) -> float:
    """Microseconds."""
    pairs = sum(count * (context - count) + count * (count + 1) // 2 for count, context in zip(lens, contexts, strict=True))
    return 1e6 * max(132 * sum(contexts) / on.bandwidth, 2 * HEADS * DIM * pairs / (on.fp8 or on.plain))


def main() -> None:
    p = detect()
    ops.bind(p)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    with torch.inference_mode():
        on = measure_ceilings(p)
        keys = Keys(p, 1 << 25)
        for lens, contexts in (
            ([1] * 5, [9000, 1, 2048, 2049, 70_000]), ([70, 1, 300], [5000, 3000, 70_000]), ([1, 1, 130], [40_000, 2, 130_000]),
        ):  # fmt: skip
            print(f"checked {lens} tokens of {contexts}: {check(keys, lens, contexts)}", flush=True)
        torch.use_deterministic_algorithms(False)
        print(f"{p.name}: {on.bandwidth / 1e12:.2f} TB/s, FP8 {(on.fp8 or 0) / 1e12:.0f} TFLOP/s", flush=True)
        for lens, contexts in [([1] * n, [c] * n) for n, c in DECODES] + [([n], [c]) for n, c in PROMPTS]:
            calls = keys.sets(lens, contexts)
            us, least = in_graph(calls, max(len(calls), 3), 5), limit(on, lens, contexts)
            name = f"{len(lens)} x 1" if max(lens) == 1 else f"prompt of {lens[0]}"
            print(f"select_keys {name} at {contexts[0]:<8} {us:9.1f} us  limit {least:8.1f}  {least / us:4.0%}", flush=True)
        for name, call, moved in writes(p, keys):
            us, least = in_graph([call], 32, 5), 1e6 * moved / on.bandwidth
            print(f"{name:<34} {us:9.1f} us  limit {least:8.1f}  {least / us:4.0%}", flush=True)


if __name__ == "__main__":
    main()
