"""Who runs next: integers only, no tensor.

A *sequence* is a text whose K/V is being computed. Each step of the engine is one forward pass
over *slices*: at most one run of tokens of each of several sequences. Sequences join and leave
between steps. A sequence with one token to compute *decodes*, one with more is in *prefill*.

What is promised to each, whatever the others do:

* One that was admitted can always finish: its blocks were counted when it came in, and those of
  all that it may be forked into.
* As long as a pass has a row for every sequence, one that decodes is in every pass, and the
  prefill beside it is bounded: to less where nobody waits for a first token.
* Prefills share the rows of a pass equally; what one does not need goes to the others. Where
  there are more of them than rows, whoever has waited longest comes first.
* A block that several sequences need next is computed by one that leaves it behind, the others
  wait for it.
* Sequences are admitted in order of arrival. Where places or blocks for the next in line are not
  free yet, others may go before it, but no more than may run together: then all wait for it.

A running sequence can be *forked*: the fork shares the blocks of the tokens that both begin with,
and where it goes on inside a block, whoever writes to that block first gets a copy. The promise
holds because a *group*, a sequence and what it was forked into, never holds more different blocks
than its tables would have if they shared nothing but its *trunk*: the full blocks of the tokens up
to the first that must be computed. A group is never without those, so what it saves by sharing
them, with others too, is spare. What it saves by sharing other blocks it may lose at any step, so
that is lent to nobody.
"""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice

from infra.engine.blocks import BLOCK_TOKENS, BlockPool, Move, block_key, block_keys, blocks_for


@dataclass(eq=False)
class Sequence:
    """A text in work.

    ``tokens`` grows while it is generated, to at most ``limit``. Logits are wanted for every
    position from ``first_wanted`` on; rows from ``first_seen`` on are looked at. ``root`` names the
    numerics for the keys of its blocks; a sequence without one is private: it uses no block of
    others and leaves none behind. A ``shallow`` one leaves none either, since passes may end before
    they come to the last layers; it uses some as long as it has computed nothing itself.

    ``width`` is how many there may be at any one time of the sequences it is forked into, itself
    included. ``origin`` is what they come from; they share at least its first ``trunk`` blocks.

    ``prefix`` are the keys of the blocks that may be found instead of computed: all that begin
    before ``first_needed``. ``keys`` are those of its blocks that can be found, the first ones of
    its ``table``. ``reused`` of its ``computed`` tokens were not computed by itself.
    """

    tokens: list[int]
    limit: int
    first_wanted: int
    root: bytes | None
    width: int = 1
    first_seen: int | None = None
    shallow: bool = False
    computed: int = 0
    reused: int = 0
    overtaken: int = 0
    table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    trunk: int = field(init=False)
    origin: "Sequence" = field(init=False, repr=False)
    prefix: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.origin = self
        self.trunk = (self.first_needed + 1) // BLOCK_TOKENS
        self.prefix = list(self.keys)
        if self.root is not None and self.computed < self.first_needed:
            known = len(self.keys) * BLOCK_TOKENS
            coming = self.tokens[known : blocks_for(self.first_needed) * BLOCK_TOKENS]
            previous = self.keys[-1] if known else self.root
            self.prefix += block_keys(previous, coming, limit=len(coming))

    @property
    def first_needed(self) -> int:
        """The first position that is computed even where its K/V can be found."""
        seen = self.first_seen
        return self.first_wanted if seen is None else min(seen, self.first_wanted)

    @property
    def most_blocks(self) -> int:
        """Blocks that its group holds at most."""
        return self.trunk + self.width * (blocks_for(self.limit) - self.trunk)

    @property
    def remaining(self) -> int:
        """Tokens whose K/V is not there yet."""
        return len(self.tokens) - self.computed

    @property
    def next_key(self) -> bytes | None:
        """Key of the prefix block that is computed next; null past the prefix."""
        known = len(self.keys)
        begun = self.shallow and self.computed > known * BLOCK_TOKENS
        return None if begun or known >= len(self.prefix) else self.prefix[known]

    @property
    def adopts(self) -> bool:
        """Whether its next block may be found instead of computed."""
        return self.computed < self.first_needed and self.next_key is not None


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


@dataclass(frozen=True)
class Plan:
    """One forward pass, and the copies to be made before it, in order."""

    slices: list[Slice]
    moves: list[Move]


class Scheduler:
    """Admits sequences and cuts their work into forward passes.

    ``max_sequences`` bounds how many run together, ``max_rows`` the rows of one pass, and
    ``max_prefill_rows_beside_streams`` how many of them are prefill when somebody decodes (null:
    no bound of its own): what a long prompt may delay a stream by. Where all texts in prefill and
    in line are looked at, nobody waits for a first token: ``max_observed_rows_beside_streams``
    (null: as many).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_rows: int,
        max_prefill_rows_beside_streams: int | None = None,
        max_observed_rows_beside_streams: int | None = None,
    ) -> None:
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_rows = max_rows
        self._max_prefill_rows = max_prefill_rows_beside_streams or max_rows
        self._max_observed_rows = max_observed_rows_beside_streams or self._max_prefill_rows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # whoever has waited longest for rows comes first
        self._groups: dict[Sequence, list[Sequence]] = {}  # of them, by origin

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._running or self._waiting)

    @property
    def streaming(self) -> bool:
        """Whether a sequence decodes, or will once its next token is drawn."""
        return any(sequence.remaining <= 1 for sequence in self._running)

    @property
    def running(self) -> int:
        """Sequences with a place in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in line for a place in the batch."""
        return len(self._waiting)

    def fits(self, sequence: Sequence) -> bool:
        """Whether a sequence, with all that it may be forked into, can ever be admitted."""
        return sequence.width <= self._max_sequences and sequence.most_blocks < self._pool.capacity

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
            group = self._groups[sequence.origin]
            group.remove(sequence)
            if not group:
                del self._groups[sequence.origin]

    def remove_group(self, origin: Sequence) -> None:
        """Take out a sequence and all that it was forked into."""
        for sequence in list(self._groups.get(origin, (origin,))):
            self.remove(sequence)

    def fork(self, parent: Sequence, at: int, tokens: Seq[int], first_wanted: int) -> Sequence:
        """A sequence that goes on with ``tokens`` after the first ``at`` ones of ``parent``.

        It has their K/V without computing any, and may get as long as its origin.

        Raises:
            ValueError: the parent does not run, or has not computed so many; the fork leaves it
                within the trunk, is too long, or one more than there may be.
        """
        if len(self._groups.get(parent.origin, ())) == parent.origin.width:
            raise ValueError(f"{parent.origin.width} forks run already")
        return self._join(parent, at, tokens, first_wanted)

    def replace(self, parent: Sequence, at: int, tokens: Seq[int], first_wanted: int) -> Sequence:
        """A fork in the place of its parent, which is taken out.

        Raises:
            ValueError: as for :meth:`fork`.
        """
        child = self._join(parent, at, tokens, first_wanted)
        self.remove(parent)
        return child

    def reorder(self, beams: Seq[Sequence], parents: Seq[int], tokens: Seq[int]) -> list[Sequence]:
        """The beams after a step of a search: each goes on from ``parents[i]`` with ``tokens[i]``.

        ``parents`` are places in ``beams``, all of whose tokens are computed. The first that goes
        on from a beam is that beam itself, others are forks; a beam without any is taken out.

        Raises:
            ValueError: a beam is not computed, or as for :meth:`fork`.
        """
        if any(beam.remaining for beam in beams):
            raise ValueError("a beam is not computed yet")
        for place in set(range(len(beams))).difference(parents):
            self.remove(beams[place])
        after: list[Sequence] = []
        for place, token in zip(parents, tokens, strict=True):
            beam = beams[place]
            if beam in after:
                after.append(self.fork(beam, beam.computed, [token], beam.first_wanted))
            else:
                beam.tokens.append(token)
                after.append(beam)
        return after

    def _join(self, parent: Sequence, at: int, tokens: Seq[int], first_wanted: int) -> Sequence:
        origin = parent.origin
        if parent not in self._running or at > parent.computed:
            raise ValueError(f"the first {at} tokens of the parent are not computed")
        if at < origin.trunk * BLOCK_TOKENS:
            raise ValueError(f"a fork at {at} leaves the parent within the trunk")
        if at + len(tokens) > origin.limit:
            raise ValueError(f"a fork has at most {origin.limit} tokens")
        child = Sequence(
            [*parent.tokens[:at], *tokens],
            origin.limit,
            first_wanted,
            parent.root,
            computed=at,
            reused=at,
            table=parent.table[: blocks_for(at)],
            keys=parent.keys[: at // BLOCK_TOKENS],
        )
        child.origin = origin
        self._pool.share(child.table)
        self._groups[origin].append(child)
        self._running.append(child)
        return child

    def plan(self, *, beside_streams: bool = False) -> Plan:
        """The next forward pass; its sequences hold the blocks it writes to.

        ``beside_streams`` says that streams wait for it that are not of this scheduler.
        """
        for sequence in self._running:
            self._adopt(sequence)
        self._admit()
        ready = self._ready()[: self._max_rows]
        decoding = [sequence for sequence in ready if sequence.remaining == 1]
        rows = self._max_rows - len(decoding)
        if beside_streams or self.streaming:
            coming = [sequence for sequence in self._running if sequence.remaining > 1]
            observed = all(each.first_seen is not None for each in (*coming, *self._waiting))
            rows = min(rows, self._max_observed_rows if observed else self._max_prefill_rows)
        decoding.sort(key=lambda sequence: sequence.table)  # those that share blocks side by side
        slices = [Slice(sequence, sequence.computed, 1) for sequence in decoding]
        slices += _equal_parts([sequence for sequence in ready if sequence.remaining > 1], rows)
        for piece in slices:
            self._provide(piece)
        served = {piece.sequence for piece in slices}
        self._running.sort(key=lambda sequence: sequence in served)
        return Plan(slices, self._pool.take_moves())

    def _provide(self, piece: Slice) -> None:
        """Have a sequence hold the blocks that a slice writes to, and the first for itself."""
        table, begun = piece.sequence.table, piece.start // BLOCK_TOKENS
        if len(piece.sequence.keys) <= begun < len(table):
            table[begun] = self._pool.own(table[begun])
        missing = blocks_for(piece.start + piece.count) - len(table)
        table += [self._pool.allocate() for _ in range(missing)]

    def commit(self, slices: list[Slice]) -> None:
        """Note that a pass was computed, and publish the blocks it filled."""
        for piece in slices:
            sequence = piece.sequence
            sequence.computed += piece.count
            if sequence.root is not None and not sequence.shallow:
                self._publish(sequence, sequence.root)

    def _publish(self, sequence: Sequence, root: bytes) -> None:
        for index in range(len(sequence.keys), sequence.computed // BLOCK_TOKENS):
            start = index * BLOCK_TOKENS
            previous = sequence.keys[-1] if sequence.keys else root
            key = block_key(previous, sequence.tokens[start : start + BLOCK_TOKENS])
            sequence.table[index] = self._pool.publish(
                sequence.table[index], key, missed=index < len(sequence.prefix)
            )
            sequence.keys.append(key)

    def _admit(self) -> None:
        """Let in who could take all the blocks it may ever need, as could those already in."""
        places = sum(origin.width for origin in self._groups)
        trunks, promised = self._reserved() if self._waiting else (set(), 0)
        passed_over: list[Sequence] = []
        for sequence in list(islice(self._waiting, self._max_sequences)):
            owed = passed_over and passed_over[0].overtaken == self._max_sequences
            if owed or places == self._max_sequences:
                return
            found = self._pool.count_among(trunks, sequence.prefix[: sequence.trunk])
            blocks = len(trunks) + promised + sequence.most_blocks - found
            if places + sequence.width <= self._max_sequences and blocks < self._pool.capacity:
                self._waiting.remove(sequence)
                self._running.append(sequence)
                self._groups[sequence] = [sequence]
                self._adopt(sequence)
                places += sequence.width
                trunks, promised = self._reserved()
                for other in passed_over:
                    other.overtaken += 1
            else:
                passed_over.append(sequence)

    def _reserved(self) -> tuple[set[int], int]:
        """Blocks of the trunks, and how many more the groups may need."""
        trunks: set[int] = set()
        promised = 0
        for origin, (one, *_) in self._groups.items():
            held = one.table[: origin.trunk]
            trunks.update(held)
            promised += origin.most_blocks - len(held)
        return trunks, promised

    def _adopt(self, sequence: Sequence) -> None:
        """Hold blocks of its prefix that can be found by now, in place of computing them.

        Rows from ``first_needed`` on are computed even if their block was found: for what is
        wanted of them. What they store in the block is what is there.
        """
        known = len(sequence.keys)
        found = self._pool.match(sequence.prefix[known:]) if sequence.adopts else []
        if not found:
            return
        self._pool.release(sequence.table[known:])  # begun, not full
        sequence.table[known:] = found
        sequence.keys = sequence.prefix[: len(sequence.table)]
        computed = min(len(sequence.table) * BLOCK_TOKENS, sequence.first_needed)
        sequence.reused += computed - sequence.computed
        sequence.computed = computed

    def _ready(self) -> list[Sequence]:
        """Who computes: all but those whose next block another computes and is further in."""
        furthest_first = sorted(self._running, key=lambda sequence: -sequence.computed)
        furthest = {one.next_key: one for one in reversed(furthest_first) if not one.shallow}
        return [
            sequence
            for sequence in self._running
            if sequence.remaining
            and not (sequence.adopts and furthest.get(sequence.next_key, sequence) is not sequence)
        ]


def _equal_parts(sequences: list[Sequence], rows: int) -> list[Slice]:
    """Cut rows into slices, as equal as can be with none larger than its sequence needs.

    Where there are fewer rows than sequences, the first ones get one each.
    """
    slices: list[Slice] = []
    by_need = sorted(sequences[:rows], key=lambda sequence: sequence.remaining)
    for others, sequence in zip(reversed(range(len(by_need))), by_need, strict=True):
        count = min(sequence.remaining, rows // (others + 1))
        slices.append(Slice(sequence, sequence.computed, count))
        rows -= count
    return slices
