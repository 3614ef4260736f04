"""The pool loses no block, gives none to two holders unless it is named, and remembers prefixes in the right order."""

import hashlib
import struct

import pytest
from cases import cases
from engine.books import check_books
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_pool import ROOT, BlockPool, block_hash


def names_of(pool, tokens):
    names = []
    pool.hash_blocks(names, tokens, len(tokens) // pool.block_size)
    return names


def cache(pool, tokens):
    """Allocates, names and frees the full blocks of `tokens`; returns them."""
    blocks = pool.allocate(len(tokens) // pool.block_size)
    pool.commit(blocks, names_of(pool, tokens))
    pool.free(blocks)
    return blocks


def test_allocates_each_block_once_and_counts():
    pool = BlockPool(8, 4)
    assert (pool.num_free, pool.usage) == (8, 0.0)
    a, b = pool.allocate(3), pool.allocate(5)
    assert sorted(a + b) == list(range(8))
    assert (pool.num_free, pool.usage) == (0, 1.0)
    check_books(pool, [a, b])
    pool.free(a)
    assert (pool.num_free, pool.usage) == (3, 1 - 3 / 8)
    check_books(pool, [b])
    assert pool.allocate(0) == []


def test_blocks_for_rounds_up():
    pool = BlockPool(8, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 1)])
def test_refuses_an_empty_pool(num_blocks, block_size):
    with pytest.raises(ValueError, match="cannot hold"):
        BlockPool(num_blocks, block_size)


def test_refuses_to_overdraw_and_is_unharmed():
    pool = BlockPool(4, 4)
    held = pool.allocate(3)
    with pytest.raises(RuntimeError, match="2 blocks were asked for and 1 are free"):
        pool.allocate(2)
    check_books(pool, [held])


def test_refuses_to_free_twice():
    pool = BlockPool(4, 4)
    held = pool.allocate(1)
    pool.free(held)
    with pytest.raises(RuntimeError, match="free already"):
        pool.free(held)


def test_refuses_to_name_a_free_block():
    pool = BlockPool(4, 2)
    with pytest.raises(RuntimeError, match="only its holder"):
        pool.commit([0], [b"name"])


def test_finds_the_longest_prefix_and_shares_it():
    pool = BlockPool(8, 2)
    blocks = cache(pool, [1, 2, 3, 4, 5, 6])
    found = pool.match(names_of(pool, [1, 2, 3, 4, 9, 9]))
    assert found == blocks[:2]
    assert pool.free_beside(found) == 6
    pool.share(found)
    assert (pool.num_free, pool.free_beside(found)) == (6, 6)
    pool.share(found)
    check_books(pool, [found, found])
    pool.free(found)
    pool.free(found)
    check_books(pool, [])


def test_a_block_is_known_by_everything_before_it():
    pool = BlockPool(8, 2)
    cache(pool, [1, 2, 3, 4])
    assert pool.match(names_of(pool, [3, 4])) == []
    assert pool.match(names_of(pool, [9, 9, 3, 4])) == []
    assert pool.match(names_of(pool, [1])) == []
    first, second = names_of(pool, [1, 2, 3, 4])
    assert len(pool.match([first, b"unknown", second])) == 1, "a prefix ends at the first block that is not cached"


def test_hash_depends_on_parent_tokens_and_their_order_alone():
    name = block_hash(ROOT, [1, 2])
    assert name == block_hash(ROOT, (1, 2))
    assert len(name) == 32
    assert len({name, block_hash(ROOT, [2, 1]), block_hash(name, [1, 2]), block_hash(b"salt", [1, 2])}) == 4
    assert block_hash(ROOT, [0, 256]) != block_hash(ROOT, [1, 0])  # ids do not run into each other
    # every rank must find the same, whatever its PYTHONHASHSEED
    assert name == hashlib.sha256(struct.pack("=2q", 1, 2)).digest()


def test_names_are_extended_not_computed_anew(monkeypatch):
    pool = BlockPool(8, 2)
    calls = []
    monkeypatch.setattr("octavo.engine.block_pool.block_hash", lambda p, t, extra: calls.append(t) or block_hash(p, t, extra))
    names, tokens = [], list(range(8))
    for count in range(5):
        pool.hash_blocks(names, tokens, count)
        pool.hash_blocks(names, tokens, count)
    assert calls == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert names == names_of(pool, tokens)


def test_of_equal_blocks_the_first_keeps_the_name():
    pool = BlockPool(4, 2)
    a, b = pool.allocate(1), pool.allocate(1)
    names = names_of(pool, [1, 2])
    pool.commit(a, names)
    pool.commit(b, names)
    assert pool.match(names) == a
    check_books(pool, [a, b])
    pool.free(b)
    assert pool.match(names) == a


def test_takes_blocks_without_a_name_first_then_old_tails():
    pool = BlockPool(6, 1)
    old = cache(pool, [1, 2])
    new = cache(pool, [3, 4])
    assert sorted(pool.allocate(2)) == sorted(set(range(6)) - {*old, *new})
    assert pool.allocate(1) == [old[1]]
    assert pool.match(names_of(pool, [1, 2])) == [old[0]]
    assert pool.match(names_of(pool, [3, 4])) == new
    assert pool.allocate(3) == [old[0], new[1], new[0]]
    assert pool.match(names_of(pool, [3, 4])) == []


def test_freed_nameless_blocks_go_before_cached_ones():
    pool = BlockPool(3, 1)
    plain = pool.allocate(1)
    cache(pool, [1, 2])
    pool.free(plain)
    assert pool.allocate(1) == plain


def test_a_hit_makes_a_block_young_again():
    pool = BlockPool(2, 1)
    first, second = cache(pool, [1]), cache(pool, [2])
    found = pool.match(names_of(pool, [1]))
    pool.share(found)
    pool.free(found)
    assert pool.allocate(2) == second + first


def test_without_prefix_caching_nothing_is_named():
    pool = BlockPool(4, 2, prefix_caching=False)
    names = []
    pool.hash_blocks(names, [1, 2], 1)
    assert names == []
    held = pool.allocate(1)
    pool.commit(held, names)
    assert pool.match([block_hash(ROOT, [1, 2])]) == []
    check_books(pool, [held])


@cases("held", [[], [[0]], [[0, 1], [1]], [[0, 1, 1]], [[0, 1, 2]]])
def test_check_sees_wrong_books(held):
    pool = BlockPool(4, 2)
    pool.allocate(2)
    with pytest.raises(AssertionError):
        check_books(pool, held)


class Pool(RuleBasedStateMachine):
    """Holders come, share and go; a dictionary of what was written in each block is the judge."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(7, 2)
        self.held = []  # (blocks, tokens)
        self.content = {}

    @rule(tokens=st.lists(st.integers(0, 1), max_size=9), named=st.booleans())
    def begin(self, tokens, named):
        found = self.pool.match(names_of(self.pool, tokens))
        for i, block in enumerate(found):
            assert self.content[block] == tokens[: 2 * i + 2]
        fresh = self.pool.blocks_for(len(tokens)) - len(found)
        if self.pool.free_beside(found) < fresh:
            return
        self.pool.share(found)
        blocks = found + self.pool.allocate(fresh)
        for i, block in enumerate(blocks[len(found) :], len(found)):
            self.content[block] = tokens[: 2 * i + 2]
        if named:
            names = names_of(self.pool, tokens)
            self.pool.commit(blocks[: len(names)], names)
        self.held.append((blocks, tokens))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)

    @invariant()
    def books_agree(self):
        check_books(self.pool, (blocks for blocks, _ in self.held))
        for blocks, tokens in self.held:
            assert [self.content[b] for b in blocks] == [tokens[: 2 * i + 2] for i in range(len(blocks))]


TestPool = Pool.TestCase
TestPool.settings = settings(deadline=None, max_examples=60, stateful_step_count=50)
