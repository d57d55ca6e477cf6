"""Blocks are free, cached or used, never two of these, and never lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from models.engine.block_pool import BlockPool, Prefix
from models.engine.messages import ImageSpan
from tests.unit.engine.harness import Picture


def fill(pool: BlockPool, tokens: list[int], images: tuple[ImageSpan, ...] = ()) -> list[int]:
    """Admits, computes and remembers a sequence; returns its block table."""
    prefix = Prefix(pool.block_size, images)
    matched = pool.match(prefix, tokens, len(tokens) - 1)
    num_new = pool.blocks_for(len(tokens)) - len(matched)
    assert pool.can_allocate(num_new, matched)
    pool.take(matched)
    table = matched + pool.allocate(num_new)
    for index in range(len(tokens) // pool.block_size):
        pool.remember(table[index], *prefix.block(index, tokens))
    return table


def test_a_released_sequence_is_found_again_by_its_beginning() -> None:
    pool = BlockPool(8, 4, enable_prefix_caching=True)
    first = fill(pool, list(range(10)))
    pool.release(first)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 2, 0)
    second = fill(pool, [*range(8), 50, 51])
    assert second[:2] == first[:2]
    pool.check_integrity([second])


def test_the_last_token_is_never_served_from_the_cache() -> None:
    pool = BlockPool(8, 4, enable_prefix_caching=True)
    pool.release(fill(pool, list(range(8))))
    prefix = Prefix(4, ())
    assert len(pool.match(prefix, list(range(8)), 7)) == 1


def test_equal_tokens_under_different_pictures_are_not_shared() -> None:
    pool = BlockPool(16, 4, enable_prefix_caching=True)
    tokens = [5, -200, -200, -200, -200, 6, 7, 8, 9]
    span = lambda digest: (ImageSpan(1, Picture(digest, 4)),)  # type: ignore[arg-type]  # noqa: E731
    red = fill(pool, tokens, span(b"red"))
    blue = fill(pool, tokens, span(b"blue"))
    assert not set(blue) & set(red)
    assert fill(pool, tokens, span(b"red"))[:2] == red[:2]
    assert fill(pool, tokens, span(b"blue"))[:2] == blue[:2], "both are known side by side"


def test_a_picture_that_starts_elsewhere_is_another_content() -> None:
    pool = BlockPool(16, 4, enable_prefix_caching=True)
    tokens = [-200] * 9
    at = lambda start: (ImageSpan(start, Picture(b"red", 9)),)  # type: ignore[arg-type]  # noqa: E731
    first = fill(pool, tokens, at(0))
    assert not set(fill(pool, tokens, at(-1))) & set(first)


def test_a_hit_compares_contents_and_not_only_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.engine import block_pool

    monkeypatch.setattr(block_pool.BlockContent, "key", lambda self, parent: b"all collide")
    pool = BlockPool(8, 4, enable_prefix_caching=True)
    first = fill(pool, [1, 2, 3, 4, 5])
    assert not set(fill(pool, [9, 9, 9, 9, 5])) & set(first)


def test_equal_blocks_after_colliding_ones_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second blocks have the same tokens and, by their keys, the same parent."""
    from models.engine import block_pool

    key = block_pool.BlockContent.key
    monkeypatch.setattr(
        block_pool.BlockContent,
        "key",
        lambda self, parent: key(self, parent) if parent else b"the first blocks collide",
    )
    pool = BlockPool(16, 4, enable_prefix_caching=True)
    common = [5, 6, 7, 8]
    fill(pool, [1, 1, 1, 1, 0])
    other = fill(pool, [2, 2, 2, 2, *common, 0])
    mine = fill(pool, [1, 1, 1, 1, *common, 0])
    assert not set(mine) & set(other)


def test_what_a_hit_compares_does_not_grow_with_the_conversation() -> None:
    pool = BlockPool(2048, 4, enable_prefix_caching=True)
    tokens = list(range(8000))
    pool.release(fill(pool, tokens))
    prefix = Prefix(4, ())
    prefix.block(1999, tokens)  # computed while it waited, and nothing was known yet
    matched = pool.match(prefix, tokens, len(tokens))
    assert len(matched) == 2000
    parents = [prefix.block(i, tokens)[1].parent for i in range(1, 2000)]
    assert all(
        parent is pool._blocks[block_id].content
        for parent, block_id in zip(parents, matched, strict=False)
    )


def test_nothing_is_evicted_while_blocks_are_free_and_then_the_oldest_goes() -> None:
    pool = BlockPool(8, 4, enable_prefix_caching=True)
    conversations = [[10 * n, 1, 2, 3, 4] for n in range(3)]  # one full block each
    tables = [fill(pool, tokens) for tokens in conversations]
    for table in tables:
        pool.release(table)
    assert (pool.num_free, pool.num_cached) == (5, 3)
    pool.release(fill(pool, conversations[0]))  # used again: now the youngest
    kept = fill(pool, [7] * 20)  # all that is free
    assert (pool.num_free, pool.num_cached) == (0, 3)
    evicted = [fill(pool, [n]) for n in (97, 98, 99)]
    assert [block for (block,) in evicted] == [tables[n][0] for n in (1, 2, 0)]
    pool.check_integrity([kept, *evicted])


def test_eviction_takes_the_least_recently_used_and_the_chains_end_first() -> None:
    pool = BlockPool(4, 4, enable_prefix_caching=True)
    old = fill(pool, [*range(8), 99])
    pool.release(old)  # two cached blocks and one free
    fill(pool, [70, 71, 72, 73, 74])  # takes the free one and the other free one
    taken = fill(pool, [80, 81])
    assert taken == [old[1]], "the chain's end goes first"
    prefix = Prefix(4, ())
    assert pool.match(prefix, list(range(8)), 7) == [old[0]]


class Pool(RuleBasedStateMachine):
    """Random admissions and releases, in a pool that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 4, enable_prefix_caching=True)
        self.tables: list[list[int]] = []

    @rule(length=st.integers(1, 20), family=st.integers(0, 2))
    def admit(self, length: int, family: int) -> None:
        tokens = [family * 100 + i for i in range(length)]
        prefix = Prefix(4, ())
        matched = self.pool.match(prefix, tokens, length - 1)
        if self.pool.can_allocate(self.pool.blocks_for(length) - len(matched), matched):
            self.tables.append(fill(self.pool, tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == 12


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40)


def test_the_check_finds_a_leak() -> None:
    pool = BlockPool(4, 4, enable_prefix_caching=True)
    table = fill(pool, [1, 2])
    with pytest.raises(AssertionError, match="leaked"):
        pool.check_integrity([])
    pool.release(table)
    pool.check_integrity([])
