"""The block pool: ids of KV cache blocks, with reference counts and a prefix cache.

A block holds `block_size` tokens of every layer's cache; the runner owns its contents. A full block can be cached under the
hash of its tokens and of all tokens before it, and a request with the same prefix shares it. A free block stays cached until
its memory is needed: free blocks wait in one queue, and allocation takes them from its front.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

__all__ = ["ROOT", "BlockPool", "block_hash", "root_of"]

ROOT = b""  # parent hash of a first block; requests with different roots have separate prefix caches


def block_hash(parent: bytes, token_ids: Sequence[int], extra: bytes = b"") -> bytes:
    """The hash, 32 bytes, of a full block of `token_ids` that follows the block with hash `parent`.

    extra: what else its contents depend on, such as the images whose tokens it has.

    Equal hashes are taken for equal contents, across users. The hash must therefore be cryptographic: with a weaker one a
    collision could be constructed, which would give one user another's cache. Unlike Python's hash it is equal on every rank.
    """
    return hashlib.sha256(parent + array("q", token_ids).tobytes() + extra).digest()


def root_of(salt: str | None) -> bytes:
    """The parent hash of a first block for requests with this cache salt.

    No block's tokens hash to it: its input begins with bytes that would be a token id past any vocabulary.
    """
    return ROOT if salt is None else hashlib.sha256(b"cache_salt:" + salt.encode()).digest()


class BlockPool:
    """Allocates the blocks 0 to num_blocks - 1, counts references to them, and finds cached prefixes.

    Each method takes time in proportion to the blocks it is given, whatever the size of the pool.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"A pool of {num_blocks} blocks of {block_size} tokens cannot hold anything.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        # Blocks are taken from the front. An OrderedDict, because a prefix hit removes a block from the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without references, cached ones included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The fraction of blocks with references, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Allocates `count` blocks of unknown content. RuntimeError if fewer are free: check num_free first."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks were asked for and {len(self._free)} are free.")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
            self._uncache(block)
        return blocks

    def free(self, block_ids: Sequence[int]) -> None:
        """Drops one reference to each block, listed in token order. RuntimeError if a block has none."""
        for block in reversed(block_ids):  # a suffix is useless without its prefix, so the last block is evicted first
            if not self._ref_counts[block]:
                raise RuntimeError(f"Block {block} is free already.")
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self._free[block] = None
                if self._hashes[block] is None:  # not cached: allocate it before any cached block
                    self._free.move_to_end(block, last=False)

    def hash_blocks(
        self,
        hashes: list[bytes],
        token_ids: Sequence[int],
        count: int,
        root: bytes = ROOT,
        extra: Callable[[int, int], bytes] = lambda start, stop: b"",
    ) -> None:
        """Extends `hashes`, the hashes of a request's first blocks, to its first `count` blocks, all full of `token_ids`.

        Requests with different `root` share no hashes. `extra(start, stop)`: of the block with these tokens, see block_hash.
        Does nothing without prefix caching.
        """
        if self.prefix_caching:
            for i in range(len(hashes), count):
                start, stop = i * self.block_size, (i + 1) * self.block_size
                hashes.append(block_hash(hashes[-1] if hashes else root, token_ids[start:stop], extra(start, stop)))

    def commit(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Adds full, computed blocks to the prefix cache under their hashes. Of two equal blocks the first stays cached."""
        for block, key in zip(block_ids, hashes, strict=self.prefix_caching):
            if not self._ref_counts[block]:
                raise RuntimeError(f"Block {block} is free; only its holder can name it.")
            if self._hashes[block] is None and key not in self._cached:
                self._hashes[block] = key
                self._cached[key] = block

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `hashes`. They have no new reference yet: see `share`."""
        found: list[int] = []
        for key in hashes:
            if (block := self._cached.get(key)) is None:
                break
            found.append(block)
        return found

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache: the blocks hold keys and values of other weights."""
        self._hashes, self._cached = [None] * self.num_blocks, {}

    def free_beside(self, block_ids: Iterable[int]) -> int:
        """How many blocks would be free if the distinct `block_ids` had references."""
        return len(self._free) - sum(not self._ref_counts[block] for block in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to blocks that `match` found."""
        for block in block_ids:
            if not self._ref_counts[block]:
                del self._free[block]
            self._ref_counts[block] += 1

    def _uncache(self, block: int) -> None:
        if (key := self._hashes[block]) is not None:
            del self._cached[key]
            self._hashes[block] = None
