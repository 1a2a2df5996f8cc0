"""Bookkeeping of KV blocks: who holds one, which can be found by content, which goes next.

Integers and hashes only; the tensors live in :mod:`infra.engine.kv_store`.

A block holds the K/V of ``BLOCK_TOKENS`` consecutive tokens of one text. A full block is
*published* under a key that names everything its bits depend on: the numerics fingerprint and all
tokens up to the block's end. Equal texts therefore share blocks without being told. A block that
nobody holds stays findable until its place is needed: least recently used goes first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

BLOCK_TOKENS: Final = 32


class OutOfBlocks(Exception):
    """Every block is held."""


def block_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Key of the block holding ``tokens``, which come after the text that ``previous`` names.

    SHA-256, so that no client can make two texts share a key. The first block's ``previous`` is
    the fingerprint.
    """
    return hashlib.sha256(previous + array("q", tokens).tobytes()).digest()


def block_keys(root: bytes, tokens: Sequence[int], *, limit: int) -> list[bytes]:
    """Keys of the full blocks within the first ``limit`` tokens."""
    keys: list[bytes] = []
    for start in range(0, limit - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        root = block_key(root, tokens[start : start + BLOCK_TOKENS])
        keys.append(root)
    return keys


def blocks_for(tokens: int) -> int:
    """How many blocks ``tokens`` tokens take."""
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """A fixed number of blocks with reference counts, found by content, reused by age.

    Block 0 is never handed out: rows that only pad a batch write there.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity - 1, 0, -1))
        self._references = [0] * capacity
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    @property
    def available(self) -> int:
        """Blocks that nobody holds: free ones and those that would be evicted."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by content."""
        return len(self._block_of)

    @property
    def held(self) -> int:
        """Blocks that some sequence holds."""
        return self.capacity - 1 - self.available

    def count_cached(self, keys: Iterable[bytes]) -> int:
        """How many leading keys can be found; holds nothing and counts nothing."""
        count = 0
        for key in keys:
            if key not in self._block_of:
                break
            count += 1
        return count

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Hold the blocks of the longest run of leading keys that can be found."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._hold(block)
            blocks.append(block)
        self.hits += len(blocks)
        self.misses += len(keys) - len(blocks)
        return blocks

    def allocate(self) -> int:
        """Hold a fresh block, evicting the least recently used if none is free.

        Raises:
            OutOfBlocks: every block is held.
        """
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self.evictions += 1
        else:
            raise OutOfBlocks
        self._references[block] = 1
        return block

    def publish(self, block: int, key: bytes) -> int:
        """Make a full block findable; returns the block to use from now on.

        Where the content is there already, that block is held instead and ``block`` let go: by
        the numerics contract both have the same bits.
        """
        known = self._block_of.get(key)
        if known is None:
            self._block_of[key] = block
            self._key_of[block] = key
            return block
        self._hold(known)
        self.release([block])
        return known

    def release(self, blocks: Sequence[int]) -> None:
        """Let blocks of one text go. Its end is forgotten before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget(self) -> None:
        """Drop every block that nobody holds."""
        for block in self._idle:
            del self._block_of[self._key_of.pop(block)]
            self._free.append(block)
        self._idle.clear()

    def _hold(self, block: int) -> None:
        self._references[block] += 1
        self._idle.pop(block, None)
