"""The memory of the KV cache, as block ids.

A block is `block_size` tokens of every layer's cache; what lies in it is the runner's business. A full block can be named by
the hash of its tokens and of all tokens before it, and a request whose prompt begins alike shares it. A block that nobody
holds keeps its name until the memory is needed: it waits in one queue, from whose front fresh blocks are taken.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["ROOT", "BlockPool", "block_hash", "root_of"]

ROOT = b""  # the parent of a first block; another root would be another, separate cache


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name, 32 bytes, of a full block of `token_ids` that follows the block named `parent`.

    Equal names are taken for equal contents, across users. So the hash is cryptographic: a weaker one could be made to collide
    and would give one user another's cache. Unlike Python's it is also the same on every rank.
    """
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def root_of(salt: str | None) -> bytes:
    """The parent of a first block among requests of one cache salt.

    No tokens hash to it: the bytes that it begins with would be a token id past any vocabulary.
    """
    return ROOT if salt is None else hashlib.sha256(b"cache_salt:" + salt.encode()).digest()


class BlockPool:
    """Hands out the blocks 0 to num_blocks - 1, counts their holders, and finds cached prefixes.

    Each method takes time in proportion to the blocks it is given, whatever the size of the pool.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"A pool of {num_blocks} blocks of {block_size} tokens cannot hold anything.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._holders = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}
        # Taken from the front. An OrderedDict, because a hit takes its block out of the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones among them."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The part of the blocks that somebody holds, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content, for one holder. RuntimeError if fewer are free: look at num_free first."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks were asked for and {len(self._free)} are free.")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            self._forget(block)
        return blocks

    def free(self, block_ids: Sequence[int]) -> None:
        """One holder gives up its blocks, listed in the order of its tokens. RuntimeError if one of them has no holder."""
        for block in reversed(block_ids):  # a prefix is of no use without its beginning, so the tail is the first to be lost
            if not self._holders[block]:
                raise RuntimeError(f"Block {block} is free already.")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if self._names[block] is None:  # nothing to lose: take this one before any cached one
                    self._free.move_to_end(block, last=False)

    def name_blocks(self, names: list[bytes], token_ids: Sequence[int], count: int, root: bytes = ROOT) -> None:
        """Extends `names`, those of a request's first blocks, to its first `count` blocks. Each must be full of `token_ids`.
        Requests of different `root` share no names.

        Does nothing without prefix caching.
        """
        if self.prefix_caching:
            for i in range(len(names), count):
                tokens = token_ids[i * self.block_size : (i + 1) * self.block_size]
                names.append(block_hash(names[-1] if names else root, tokens))

    def commit(self, block_ids: Sequence[int], names: Sequence[bytes]) -> None:
        """Makes held blocks, full and computed, known by `names`. Of two equal blocks the first one keeps the name."""
        for block, name in zip(block_ids, names, strict=self.prefix_caching):
            if not self._holders[block]:
                raise RuntimeError(f"Block {block} is free; only its holder can name it.")
            if self._names[block] is None and name not in self._named:
                self._names[block] = name
                self._named[name] = block

    def match(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `names`. They are not held yet: see `share`."""
        found: list[int] = []
        for name in names:
            if (block := self._named.get(name)) is None:
                break
            found.append(block)
        return found

    def forget_prefixes(self) -> None:
        """No block is found by its name any more: what the blocks hold is of other weights."""
        self._names, self._named = [None] * self.num_blocks, {}

    def free_beside(self, block_ids: Iterable[int]) -> int:
        """How many blocks would be free if the distinct `block_ids` were held."""
        return len(self._free) - sum(not self._holders[block] for block in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """One more holder for blocks that `match` found."""
        for block in block_ids:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1

    def _forget(self, block: int) -> None:
        if (name := self._names[block]) is not None:
            del self._named[name]
            self._names[block] = None
