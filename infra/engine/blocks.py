"""Bookkeeping of KV blocks: who holds one, which can be found by content, which goes next.

Integers and hashes only; the tensors live in :mod:`infra.engine.kv_store`.

A block holds the K/V of ``BLOCK_TOKENS`` consecutive tokens of one text. A full block is
*published* under a key that names everything its bits depend on: the numerics fingerprint and all
tokens up to the block's end. Equal texts therefore share blocks without being told. A block that
nobody holds stays findable until its place is needed, least recently used goes first: from the
device to a slot of the host's memory where there are any, and from there to nothing.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
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


@dataclass(frozen=True)
class Transfer:
    """Copy a block of the device to a slot of the host, or the slot to the block."""

    block: int
    slot: int
    to_host: bool


@dataclass(frozen=True)
class Copy:
    """Copy a block of the device to another one."""

    source: int
    target: int


Move = Transfer | Copy
"""Moves are made in the order they were decided on: a later one may reuse the place that an
earlier one has copied from."""


class HostTier:
    """Slots of host memory for blocks that had to leave the device, reused by age."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def put(self, key: bytes) -> int | None:
        """A slot for a block's content, at the cost of the oldest; null if there are no slots."""
        if not self._free and self._slot_of:
            self.remove(next(iter(self._slot_of)))
        if not self._free:
            return None
        slot = self._slot_of[key] = self._free.pop()
        return slot

    def take(self, key: bytes) -> int | None:
        """The slot of a content, no longer findable and not yet free; null if it is not here."""
        return self._slot_of.pop(key, None)

    def free(self, slot: int) -> None:
        """Let a slot that was taken be used again."""
        self._free.append(slot)

    def remove(self, key: bytes) -> None:
        """Forget a content, if it is here."""
        slot = self.take(key)
        if slot is not None:
            self.free(slot)

    def clear(self) -> None:
        """Forget everything."""
        self._slot_of.clear()
        self._free = list(range(self.slots))


class BlockPool:
    """A fixed number of blocks with reference counts, found by content, reused by age.

    Block 0 is never handed out: rows that only pad a batch write there. A key is on the device or
    on the host, never on both. What was decided here is true once the ``moves`` are made.

    ``hits`` counts blocks that were found, ``restores`` those of them that came from the host,
    ``misses`` blocks that were looked for and then computed, ``evictions`` blocks that left the
    device. ``shared`` is how many more blocks there would have to be if none were shared.
    """

    def __init__(self, capacity: int, *, host_slots: int = 0) -> None:
        self.capacity = capacity
        self.host = HostTier(host_slots)
        self._free = list(range(capacity - 1, 0, -1))
        self._references = [0] * capacity
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._moves: list[Move] = []
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.restores = 0
        self.shared = 0

    @property
    def available(self) -> int:
        """Blocks that nobody holds: free ones and those that would be evicted."""
        return len(self._free) + len(self._idle)

    @property
    def free(self) -> int:
        """Blocks that nobody holds and that have no content."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that can be found by content."""
        return len(self._block_of)

    @property
    def held(self) -> int:
        """Blocks that some sequence holds."""
        return self.capacity - 1 - self.available

    def count_cached(self, keys: Iterable[bytes], *, on_device: bool = False) -> int:
        """How many leading keys can be found; holds nothing and counts nothing."""
        count = 0
        for key in keys:
            if key not in self._block_of and (on_device or key not in self.host):
                break
            count += 1
        return count

    def holders(self, key: bytes) -> int:
        """How many sequences hold the block of a content."""
        block = self._block_of.get(key)
        return 0 if block is None else self._references[block]

    def count_among(self, blocks: Container[int], keys: Iterable[bytes]) -> int:
        """How many leading keys can be found in these blocks."""
        found = takewhile(blocks.__contains__, map(self._block_of.get, keys))
        return sum(1 for _ in found)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Hold the blocks of the longest run of leading keys that can be found.

        What is on the host gets a fresh block; the run ends where there is none for it.
        """
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is not None:
                self._hold(block)
            elif key in self.host and self.available:
                block = self._restore(key)
            else:
                break
            blocks.append(block)
        self.hits += len(blocks)
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
            self._evict(block)
        else:
            raise OutOfBlocks
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more that are held already."""
        for block in blocks:
            self._hold(block)

    def own(self, block: int) -> int:
        """Hold in place of ``block`` one with its content that may be written to.

        It is the same one if nobody else holds it nor can find it, and a copy if not.
        """
        if self._references[block] == 1 and block not in self._key_of:
            return block
        self.release([block])
        copy = self.allocate()
        self._moves.append(Copy(block, copy))
        return copy

    def publish(self, block: int, key: bytes, *, missed: bool = False) -> int:
        """Make a full block findable; returns the block to use from now on.

        Where the content is there already, that block is held instead and ``block`` let go: by
        the numerics contract both have the same bits. ``missed`` says that it was looked for.
        """
        self.misses += missed
        known = self._block_of.get(key)
        if known is None:
            self.host.remove(key)
            self._name(block, key)
            return block
        self._hold(known)
        self.release([block])
        return known

    def release(self, blocks: Sequence[int]) -> None:
        """Let blocks of one text go. Its end is forgotten before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                self.shared -= 1
            elif block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def take_moves(self) -> list[Move]:
        """What is to be copied now, in order, before any block is written to."""
        taken, self._moves = self._moves, []
        return taken

    def forget(self) -> None:
        """Drop every block that nobody holds, wherever it is."""
        for block in self._idle:
            del self._block_of[self._key_of.pop(block)]
            self._free.append(block)
        self._idle.clear()
        self.host.clear()

    def _hold(self, block: int) -> None:
        self._references[block] += 1
        self.shared += self._references[block] > 1
        self._idle.pop(block, None)

    def _name(self, block: int, key: bytes) -> None:
        self._block_of[key] = block
        self._key_of[block] = key

    def _evict(self, block: int) -> None:
        key = self._key_of.pop(block)
        del self._block_of[key]
        self.evictions += 1
        slot = self.host.put(key)
        if slot is not None:
            self._moves.append(Transfer(block, slot, to_host=True))

    def _restore(self, key: bytes) -> int:
        """Have a content copied from the host into a fresh block."""
        slot = self.host.take(key)
        assert slot is not None
        block = self.allocate()
        self._moves.append(Transfer(block, slot, to_host=False))
        self.host.free(slot)
        self._name(block, key)
        self.restores += 1
        return block
