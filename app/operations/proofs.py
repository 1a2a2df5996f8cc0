"""Proofs about the log, made from the roots over its tiles and the events of few of them."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from domain.chain import Head
from domain.errors import LogAltered, invalid
from domain.ids import Position
from domain.merkle import (
    TILE,
    Checkpoint,
    Consistency,
    Inclusion,
    Tile,
    Tree,
    tile,
    to_note,
)
from domain.note import Signature, text_of, with_signature
from domain.ports import LogReader, Signer

_TILES_A_READ: Final = 16
"""So many missing tiles are computed before others get a turn."""

Hashes = list[tuple[Position, bytes]]


class Proofs:
    """What a log can prove of itself. Events may be added meanwhile: below a size nothing changes.

    Everything raises ``InvalidInput`` for what the log does not have, ``LogAltered`` where its
    events are not those it kept the roots of, and ``LogUnavailable``.
    """

    def __init__(self, log: LogReader) -> None:
        self._log = log
        self._last: _Grown | None = None

    async def checkpoint(self, size: int | None = None) -> Checkpoint:
        """The log as it stands, or as it stood when it had ``size`` events."""
        grown = await self._grown(await self.size("size", size))
        newest = await grown.newest()
        return Checkpoint(
            log_id=self._log.log_id,
            size=grown.tree.size,
            position=newest.position,
            hash=newest.hash.hex(),
            root=grown.tree.root.hex(),
        )

    async def inclusions(
        self, positions: Sequence[Position], size: int | None = None
    ) -> list[Inclusion]:
        """That each of these events is among the first ``size`` (all, if null), in their order."""
        grown = await self._grown(await self.size("size", size))
        found: dict[Position, Inclusion] = {}
        for number, among in groupby(sorted(set(positions)), key=grown.tile_of):
            for one in await grown.inclusions(number, list(among)):
                found[one.position] = one
        return [found[position] for position in positions]

    async def consistency(self, first: int, second: int | None = None) -> Consistency:
        """That the first ``first`` events are the beginning of ``second`` (all, if null)."""
        second = await self.size("second", second)
        if not 0 <= first <= second:
            raise invalid("first", f"must be from 0 to {second}, which is second; it is {first}")
        grown = await self._grown(second)
        rows = await grown.rows((first - 1) // TILE) if first else []
        return grown.tree.consistency(first, _digests(rows))

    async def size(self, field: str, wanted: int | None) -> int:
        """A number of events that there are: those wanted, all of them if null."""
        size = await self._log.size()
        if wanted is None:
            return size
        if not 0 <= wanted <= size:
            raise invalid(field, f"must be from 0 to {size}, the events there are; it is {wanted}")
        return wanted

    async def _grown(self, size: int) -> "_Grown":
        """The log at a size; many proofs are of one. Missing tiles are computed from rows."""
        if self._last is None or self._last.tree.size != size:
            self._last = await self._read(size)
        return self._last

    async def _read(self, size: int) -> "_Grown":
        full = size // TILE
        tiles = (await self._log.tiles())[:full]
        while len(tiles) < full:
            wanted = min(full - len(tiles), _TILES_A_READ) * TILE
            rows = await _rows(self._log, _end(tiles), wanted)
            tiles += [tile(len(tiles) + n, rows[n * TILE :][:TILE]) for n in range(wanted // TILE)]
        return _Grown(self._log, tiles, await _rows(self._log, _end(tiles), size % TILE))


class _Grown:
    """A log at one size: its tree, and the rows that a proof is about."""

    def __init__(self, log: LogReader, tiles: list[Tile], rest: Hashes) -> None:
        self._log = log
        self._tiles = tiles
        self._rest = rest
        self.tree = Tree([one.hash for one in tiles], _digests(rest))

    async def rows(self, number: int) -> Hashes:
        """The rows of a tile, or those after the last one; held against the root kept of them."""
        if number == len(self._tiles):
            return self._rest
        after = _end(self._tiles[:number])
        rows = await _rows(self._log, after, TILE)
        if tile(number, rows) != self._tiles[number]:
            raise LogAltered(after, self._tiles[number].last_position)
        return rows

    async def newest(self) -> Head:
        """The newest row."""
        if self.tree.size == 0:
            return await self._log.genesis()
        return Head(*(await self.rows((self.tree.size - 1) // TILE))[-1])

    def tile_of(self, position: Position) -> int:
        """The number of the tile that holds an event, if any does."""
        return bisect_left(self._tiles, position, key=lambda one: one.last_position)

    async def inclusions(self, number: int, positions: Sequence[Position]) -> list[Inclusion]:
        """The proofs of events of one tile."""
        rows = await self.rows(number)
        indices = {one: number * TILE + offset for offset, (one, _) in enumerate(rows)}
        for unknown in (one for one in positions if one not in indices):
            raise invalid(
                "position",
                f"must be that of one of the first {self.tree.size} events, which end at position"
                f" {(await self.newest()).position}; it is {unknown}",
            )
        return self.tree.inclusions([(indices[one], one) for one in positions], _digests(rows))


async def _rows(log: LogReader, after: Position, count: int) -> Hashes:
    """Exactly ``count`` rows, which are there unless somebody removed them."""
    rows = await log.hashes(after=after, limit=count)
    if len(rows) < count:
        raise LogAltered(after, rows[-1][0] if rows else after)
    return rows


def _end(tiles: Sequence[Tile]) -> Position:
    return tiles[-1].last_position if tiles else Position(0)


def _digests(rows: Hashes) -> list[bytes]:
    return [digest for _, digest in rows]


def note(checkpoint: Checkpoint, signer: Signer | None) -> str:
    """The text of a checkpoint for people to keep, signed if there is a key."""
    text = to_note(checkpoint)
    if signer is None:
        return text
    signature = signer.sign(text_of(text).encode())
    return with_signature(text, Signature(signer.name, signer.key_id, signature))
