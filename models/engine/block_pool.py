"""Which blocks of the paged KV cache are free, cached or used, and by whom.

Every block is in exactly one of three states:

    free     holds nothing worth keeping
    cached   full, computed, used by nobody; found again by its content, evicted when needed
    used     `ref_count` sequences have it in their block tables

    free ──allocate──> used ──last release──> cached (if its content is known) or free
                        ^                       │
                        └───────── hit ─────────┘      cached ──evict──> used (as a new block)

A full block's content is known by a key that chains the previous block's key with its own token
ids and the digests of the pictures that lie in it. A hit compares the token ids and the pictures
too, from the beginning on, so that a collision of the hash can never serve another conversation's
memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.engine.messages import ImageSpan


class BlockContent(NamedTuple):
    """What a full block holds, and after what: the thing compared on a hit."""

    parent: BlockContent | None
    token_ids: tuple[int, ...]
    pictures: tuple[tuple[bytes, int], ...]
    """(digest, position of the block's first token relative to the picture's first)"""

    def key(self, parent_key: bytes) -> bytes:
        digest = hashlib.sha256(parent_key)
        digest.update(array("q", self.token_ids).tobytes())
        for picture, offset in self.pictures:
            digest.update(picture)
            digest.update(array("q", (offset,)).tobytes())
        return digest.digest()


def is_same(one: BlockContent | None, other: BlockContent | None) -> bool:
    """Whether two blocks hold the same, after the same. Step by step, since `==` of long chains
    would be too deep a recursion; and only as far back as they are not one and the same."""
    while one is not other:
        if one is None or other is None or one[1:] != other[1:]:
            return False
        one, other = one.parent, other.parent
    return True


class Prefix:
    """The chain of full-block contents of one sequence, computed as far as it has grown."""

    def __init__(self, block_size: int, images: Sequence[ImageSpan]) -> None:
        self._block_size = block_size
        self._images = images
        self._contents: list[BlockContent] = []
        self._keys: list[bytes] = []

    def block(self, index: int, token_ids: Sequence[int]) -> tuple[bytes, BlockContent]:
        """Key and content of full block `index` of `token_ids`."""
        while len(self._keys) <= index:
            start = len(self._keys) * self._block_size
            end = start + self._block_size
            content = BlockContent(
                parent=self._contents[-1] if self._contents else None,
                token_ids=tuple(token_ids[start:end]),
                pictures=tuple(
                    (span.image.digest, start - span.start)
                    for span in self._images
                    if span.start < end and start < span.end
                ),
            )
            self._contents.append(content)
            self._keys.append(content.key(self._keys[-1] if self._keys else b""))
        return self._keys[index], self._contents[index]

    def adopt(self, index: int, content: BlockContent) -> None:
        """Takes a content that is the same for its own, so that what follows has the same parent,
        and comparing it ends there."""
        if self._contents[index] is not content:
            self._contents[index] = content
            del self._contents[index + 1 :], self._keys[index + 1 :]


@dataclass
class _Block:
    ref_count: int = 0
    key: bytes | None = None
    content: BlockContent | None = None


class BlockPool:
    """Hands out block numbers. Knows nothing of tensors, sequences or devices."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._by_key: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.num_used = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones, and cached ones by evicting them."""
        return len(self._free) + len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, prefix: Prefix, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The longest run of known blocks that holds the sequence's beginning. Takes nothing."""
        matched: list[int] = []
        if not self.enable_prefix_caching:
            return matched
        for index in range(max_tokens // self.block_size):
            key, content = prefix.block(index, token_ids)
            block_id = self._by_key.get(key)
            if block_id is None:
                break
            known = self._blocks[block_id].content
            if known is None or not is_same(known, content):
                break
            prefix.adopt(index, known)
            matched.append(block_id)
        return matched

    def can_allocate(self, num_new: int, matched: Sequence[int] = ()) -> bool:
        """Whether `num_new` blocks can be had beside keeping the `matched` ones."""
        matched_evictable = sum(1 for block_id in matched if block_id in self._evictable)
        return num_new <= self.num_available - matched_evictable

    def take(self, matched: Iterable[int]) -> None:
        """Adds one user to each of the matched blocks."""
        for block_id in matched:
            if self._blocks[block_id].ref_count == 0:
                del self._evictable[block_id]
                self.num_used += 1
            self._blocks[block_id].ref_count += 1

    def allocate(self, num_new: int) -> list[int]:
        """`num_new` blocks with one user each; `can_allocate` must have said so."""
        return [self._allocate_one() for _ in range(num_new)]

    def _allocate_one(self) -> int:
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, _ = self._evictable.popitem(last=False)
            self._forget(block_id)
        self._blocks[block_id].ref_count = 1
        self.num_used += 1
        return block_id

    def _forget(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.key is not None:
            del self._by_key[block.key]
            block.key = block.content = None

    def remember(self, block_id: int, key: bytes, content: BlockContent) -> None:
        """Makes a used block, now full and computed, known by its content."""
        block = self._blocks[block_id]
        # Two sequences may compute the same block side by side: the first one stays the known
        # one, the other is an anonymous copy that becomes free when it is released.
        if self.enable_prefix_caching and block.key is None and key not in self._by_key:
            block.key, block.content = key, content
            self._by_key[key] = block_id

    def release(self, block_table: Sequence[int]) -> None:
        """Takes one user from each block; unused ones become cached or free."""
        # In reverse, so that a chain's end is evicted before its beginning, which more share.
        for block_id in reversed(block_table):
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.num_used -= 1
                if block.key is None:
                    self._free.append(block_id)
                else:
                    self._evictable[block_id] = None

    def check_integrity(self, block_tables: Iterable[Sequence[int]] = ()) -> None:
        """Raises AssertionError unless every block is accounted for exactly once.

        Args:
            block_tables: of all sequences that hold blocks; their number of users must agree.
        """
        users = [0] * self.num_blocks
        for table in block_tables:
            for block_id in table:
                users[block_id] += 1
        free, cached = set(self._free), set(self._evictable)
        used = {i for i, block in enumerate(self._blocks) if block.ref_count > 0}
        if not (
            len(free) == len(self._free)
            and len(free) + len(cached) + len(used) == self.num_blocks
            and not (free & cached or free & used or cached & used)
            and len(used) == self.num_used
            and users == [block.ref_count for block in self._blocks]
            and all(self._blocks[i].key is not None for i in cached)
            and all(self._blocks[i].key is None for i in free)
            and all(self._blocks[i].key == key for key, i in self._by_key.items())
        ):
            raise AssertionError(
                f"KV blocks leaked: {len(free)} free + {len(cached)} cached + {len(used)} used "
                f"of {self.num_blocks}; users {sum(users)}"
            )
