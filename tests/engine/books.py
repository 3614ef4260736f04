"""Whether the books of a BlockPool and of an EncoderCache agree with those who hold what is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from octavo.engine.block_pool import BlockPool
from octavo.engine.encoder_cache import EncoderCache


def check_books(pool: BlockPool, held: Iterable[Sequence[int]]) -> None:
    """AssertionError unless `held`, the blocks of each holder, agrees with the pool's books."""
    lists = [list(block_ids) for block_ids in held]
    assert all(len(set(block_ids)) == len(block_ids) for block_ids in lists), "a holder has one block twice"
    counts, blocks = Counter(block for block_ids in lists for block in block_ids), range(pool.num_blocks)
    assert pool._ref_counts == [counts[block] for block in blocks], "a block's count is not its holders'"
    assert set(pool._free) == {b for b in blocks if not counts[b]}, "a block is lost, or both free and held"
    assert pool._cached == {name: b for b, name in enumerate(pool._hashes) if name is not None}, "names and blocks disagree"
    assert all(pool._hashes[b] is not None for b, count in counts.items() if count > 1), "a block without a name is shared"


def check_images(cache: EncoderCache, features: Iterable[bytes], needed: Iterable[tuple[str, bytes]]) -> None:
    """AssertionError unless the cache knows the images whose `features` the device has, and holds those that requests need."""
    holders = {(name, key) for key, names in cache._holders.items() for name in names}
    assert set(cache._tokens) == set(cache._holders) == set(features) - set(cache._evicted), "the device has other images"
    assert cache._left.keys() <= {key for key, names in cache._holders.items() if names}, "a part is kept that nobody needs"
    assert set(needed) <= holders, "an image that a request still needs may be evicted"
    assert set(cache._free) == {key for key, names in cache._holders.items() if not names}
    assert cache.held == sum(cache._tokens[key] for key, names in cache._holders.items() if names)
    assert cache.used == sum(cache._tokens.values()) <= cache.capacity
