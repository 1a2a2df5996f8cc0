"""Who runs next: integers only, no tensor.

A *sequence* is a text whose K/V is being computed. Each step of the engine is one forward pass
over *slices*: at most one run of consecutive tokens of each of several sequences. Sequences join
and leave between steps. One that has been admitted can always finish: its blocks were counted
when it came in.
"""

from collections import deque
from dataclasses import dataclass, field

from infra.engine.blocks import BLOCK_TOKENS, BlockPool, block_key, block_keys, blocks_for


@dataclass(eq=False)
class Sequence:
    """A text in work.

    ``tokens`` grows while it is generated, to at most ``limit``. Logits are wanted for every
    position from ``first_wanted`` on. ``root`` names the numerics for the keys of its blocks; a
    sequence without one is private: it uses no block of others and leaves none behind.
    """

    tokens: list[int]
    limit: int
    first_wanted: int
    root: bytes | None
    computed: int = 0
    reused: int = 0
    table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens whose K/V is not there yet."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Slice:
    """Tokens ``start`` to ``start + count`` of a sequence, computed in one forward pass."""

    sequence: Sequence
    start: int
    count: int

    @property
    def wanted(self) -> range:
        """Positions whose logits are wanted."""
        return range(max(self.start, self.sequence.first_wanted), self.start + self.count)


class Scheduler:
    """Admits sequences in order of arrival and cuts their work into forward passes.

    ``max_sequences`` bounds how many run together, ``max_rows`` the rows of one pass: decoding
    sequences go first with one row each, prefills share what is left, so that a long prompt
    delays a stream by one bounded pass at a time.
    """

    def __init__(self, pool: BlockPool, *, max_sequences: int, max_rows: int) -> None:
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_rows = max_rows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._running or self._waiting)

    @property
    def sequences(self) -> int:
        """Sequences waiting or running."""
        return len(self._running) + len(self._waiting)

    def fits(self, limit: int) -> bool:
        """Whether a sequence of ``limit`` tokens can ever be admitted."""
        return blocks_for(limit) < self._pool.capacity

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and let its blocks go. Twice does nothing."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._running.remove(sequence)
            self._pool.release(sequence.table)
            sequence.table = []

    def plan(self) -> list[Slice]:
        """The next forward pass; its sequences hold the blocks it writes to."""
        self._admit()
        rows = self._max_rows
        slices: list[Slice] = []
        for sequence in sorted(self._running, key=lambda s: s.remaining > 1):
            count = min(sequence.remaining, rows)
            if count:
                slices.append(Slice(sequence, sequence.computed, count))
                rows -= count
        for piece in slices:
            missing = blocks_for(piece.start + piece.count) - len(piece.sequence.table)
            piece.sequence.table += [self._pool.allocate() for _ in range(missing)]
        return slices

    def commit(self, slices: list[Slice]) -> None:
        """Note that a pass was computed, and publish the blocks it filled."""
        for piece in slices:
            sequence = piece.sequence
            sequence.computed += piece.count
            if sequence.root is not None:
                self._publish(sequence, sequence.root)

    def _publish(self, sequence: Sequence, root: bytes) -> None:
        for index in range(len(sequence.keys), sequence.computed // BLOCK_TOKENS):
            start = index * BLOCK_TOKENS
            previous = sequence.keys[-1] if sequence.keys else root
            key = block_key(previous, sequence.tokens[start : start + BLOCK_TOKENS])
            sequence.table[index] = self._pool.publish(sequence.table[index], key)
            sequence.keys.append(key)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            if self._promised() + blocks_for(sequence.limit) > self._pool.available:
                return
            self._waiting.popleft()
            if sequence.root is not None:
                # The first wanted row is computed even if its block could be found.
                keys = block_keys(sequence.root, sequence.tokens, limit=sequence.first_wanted)
                sequence.table = self._pool.match(keys)
                sequence.keys = keys[: len(sequence.table)]
                sequence.computed = sequence.reused = len(sequence.table) * BLOCK_TOKENS
            self._running.append(sequence)

    def _promised(self) -> int:
        """Blocks that running sequences may still ask for."""
        return sum(blocks_for(s.limit) - len(s.table) for s in self._running)
