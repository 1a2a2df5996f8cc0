"""Following the chain of a log, and holding the roots that are kept over its tiles against it."""

from collections.abc import Iterator, Sequence
from typing import Any

from app.operations.verification.findings import Findings
from domain.chain import Head, Row, follow, legible, legible_row, row_hash
from domain.events import misnumbered
from domain.ids import Position
from domain.log_errors import ChainBroken, EventErased, LogError
from domain.merkle import TILE, Tile, tile
from domain.report import Divergence
from domain.transfer import original_row, source_in


def broken(row: Row, field: str, expected: Any, actual: Any) -> Divergence:
    """A divergence of a row, whatever it holds."""
    row = legible_row(row)
    return Divergence(
        position=row.position,
        state_id=row.state_id,
        version=row.at_version if row.version is None else row.version,
        field=field,
        expected=expected,
        actual=actual,
    )


class Chain:
    """The chain from ``head`` on; after a break it goes on from the broken row."""

    def __init__(self, head: Head, tiles: Sequence[Tile], findings: Findings) -> None:
        self.head = head
        self._findings = findings
        self._tiles = _Tiles(tiles, head.position)

    def follow(self, rows: Sequence[Row]) -> None:
        """Go on with the next rows."""
        for row in rows:
            try:
                self.head = follow(self.head, row)
            except ChainBroken as error:
                actual = f"{row_hash(row).hex()}: {error}"
                self._findings.diverges(broken(row, "hash", row.hash.hex(), actual))
                self.head = Head(row.position, row.hash)
            if legible_row(row) != row:
                self._findings.diverges(broken(row, "text", "UTF-8", "bytes that are not UTF-8"))
            for name, possible in misnumbered(row):
                self._findings.diverges(broken(row, name, getattr(row, name), possible))
            self._findings.diverges(self._tiles.push(row))

    def finish(self, *, at_end: bool) -> None:
        """The last row was followed; ``at_end``: it is that of the log, as it was at first."""
        for found in self._tiles.left(self.head.position, at_end=at_end):
            self._findings.diverges(found)


class _Tiles:
    """The tiles that are kept of a log, held against its rows from the one after a position on."""

    def __init__(self, tiles: Sequence[Tile], after: Position) -> None:
        kept = [one for one in tiles if one.number >= 0]
        whole = [one for index, one in enumerate(kept) if one.number == index]
        begins = [Position(0), *(one.last_position for one in whole)]
        self._waiting = [
            (begin, one) for begin, one in zip(begins, whole, strict=False) if begin >= after
        ][::-1]
        self._stray = [one for one in tiles if one.number not in range(len(whole))]
        self._rows: list[tuple[Position, bytes]] = []

    def push(self, row: Row) -> Divergence | None:
        """Take the next row; a divergence if it fills a tile that is kept as another one."""
        if not self._waiting or row.position <= self._waiting[-1][0]:
            return None
        self._rows.append((row.position, row.hash))
        if len(self._rows) < TILE:
            return None
        _, kept = self._waiting.pop()
        found = tile(kept.number, self._rows)
        self._rows = []
        if found == kept:
            return None
        return _of_tile(kept, row.position, f"{found.last_position}:{found.hash.hex()}")

    def left(self, until: Position, *, at_end: bool) -> Iterator[Divergence]:
        """Tiles that no events fill."""
        beyond = [one for _, one in self._waiting if at_end or one.last_position <= until]
        for kept in (*self._stray, *beyond):
            yield _of_tile(kept, until, "no events that fill it")


def _of_tile(kept: Tile, position: Position, actual: str) -> Divergence:
    return Divergence(
        position=position,
        state_id=None,
        version=None,
        field=f"tiles[{kept.number}]",
        expected=f"{kept.last_position}:{kept.hash.hex()}",
        actual=actual,
    )


def compare_source(row: Row) -> Divergence | None:
    """Whether an imported row, as it was in the log it comes from, has the hash it had there."""
    there = row
    try:
        while (source := source_in(there)) is not None:
            there = original_row(there, source)
            if (actual := row_hash(there).hex()) != source.hash:
                return broken(row, "source", source.hash, actual)
    except EventErased:
        return None
    except (LogError, ValueError) as error:
        return broken(row, "source", "where the event was recorded first", str(error))
    return None


def logs_of(row: Row) -> list[str]:
    """The logs that an imported row says it comes from, the latest first."""
    found = []
    try:
        source = source_in(row)
    except LogError:  # as is said of the row
        return []
    while source is not None:
        found.append(legible(source.log_id))
        source = source.source
    return found
