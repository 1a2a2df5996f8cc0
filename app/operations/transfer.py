"""Exporting a log or some of its states, and importing states into another one."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from importlib.metadata import version as release
from itertools import groupby
from typing import Final, Literal

import msgspec
from msgspec import Struct

from app.operations.proofs import Proofs, note
from app.operations.states import check_metadata
from domain.chain import Head, Row
from domain.content import StoredLogits
from domain.errors import (
    BrokenExport,
    InvalidInput,
    StateExists,
    StateIsErased,
    StateNotFound,
    VersionConflict,
    VersionNotFound,
)
from domain.events import ERASED, Recorded, StateCreated, decode, needs
from domain.export import (
    FORMAT,
    EventLine,
    FingerprintLine,
    Header,
    Line,
    LogitsLine,
    ReleasedLine,
    StateAt,
    Tally,
    write_line,
)
from domain.ids import Position, StateId, Version
from domain.log_errors import UnknownEvent
from domain.merkle import Inclusion
from domain.origin import parents_of
from domain.packing import Packer, unpacked_lines
from domain.ports import EventLog, Idempotency, LogReader, Provenance, Signer
from domain.reading import Reading
from domain.transfer import Identity, Imported, identity, source_of

PAGE: Final = 256
PAGE_BYTES: Final = 1 << 20
"""Events, and bytes of what they hold, that are in memory at a time (more if one has more)."""

Place = tuple[Position, StateId]


class _Keeps(Struct):
    """What of a payload says whether logits were kept beside the event."""

    stored_logits: StoredLogits | None = None


_keeps: Final = msgspec.json.Decoder(_Keeps)


class Export:
    """A file that can be written. What is in it is settled, whatever is recorded meanwhile.

    Make it with :meth:`of_log` or :meth:`of_states`.
    """

    def __init__(self, log: LogReader, header: Header, places: Sequence[Place]) -> None:
        self.header = header
        self._log = log
        self._places = places
        self._fingerprints: set[str] = set()

    @classmethod
    async def of_log(cls, log: LogReader, signer: Signer | None = None) -> "Export":
        """A whole log, up to its newest event now."""
        return cls(log, await _header(log, signer, "log"), ())

    @classmethod
    async def of_states(
        cls,
        log: LogReader,
        states: Sequence[tuple[StateId, Version | None]],
        signer: Signer | None = None,
    ) -> "Export":
        """States as they are, or were at a version, and what they come from.

        With the analyses of what they held then that others can make again: of no other state.

        Raises:
            StateNotFound, VersionNotFound: there is no such state or version.
            StateIsErased: it, or one that it comes from, can never be read again.
        """
        header = await _header(log, signer, "state")
        past = _Past(log, header.checkpoint.position)
        asked = [await past.at(state_id, version) for state_id, version in states]
        needed: dict[StateId, Version] = {}
        left = list(asked)
        while left:
            one = left.pop()
            if one.state_id not in needed:
                left += [await past.at(*parent) for parent in past.parents[one.state_id]]
            needed[one.state_id] = max(needed.get(one.state_id, one.version), one.version)
        places = [
            (position, state_id)
            for state_id, version in needed.items()
            for position in past.positions[state_id][:version]
        ]
        for state_id in {one.state_id for one in asked}:
            seen = past.analyses[state_id]
            places += [(at, state_id) for at, version in seen if version <= needed[state_id]]
        header = msgspec.structs.replace(header, states=tuple(asked))
        return cls(log, header, sorted(places))

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The file, part by part; nothing is read ahead of who takes them."""
        packer, tally = Packer(), Tally()
        lines: list[Line] = [self.header]
        size = 0
        async for row, inclusion in self._rows():
            more = [line async for line in self._lines(row, inclusion)]
            lines += more
            size += _size(more)
            if len(lines) > PAGE or size > PAGE_BYTES:
                if data := await asyncio.to_thread(_packed, packer, tally, lines):
                    yield data
                lines, size = [], 0
        lines.append(ReleasedLine(until=await self._log.released_until()))
        yield await asyncio.to_thread(_packed, packer, tally, lines)
        yield packer.pack(write_line(tally.end())) + packer.end()

    async def _rows(self) -> AsyncIterator[tuple[Row, Inclusion | None]]:
        checkpoint = self.header.checkpoint
        if self.header.kind == "log":
            async for row in _events(self._log, Position(0), checkpoint.position):
                yield row, None
            return
        proofs = Proofs(self._log)
        for start in range(0, len(self._places), PAGE):
            places = self._places[start : start + PAGE]
            inclusions = await proofs.inclusions([at for at, _ in places], checkpoint.size)
            proven = iter(inclusions)
            for state_id, run in groupby(places, key=lambda place: place[1]):
                positions = [position for position, _ in run]
                after, wanted = Position(positions[0] - 1), frozenset(positions)
                async for row in _events(self._log, after, positions[-1], state_id):
                    if row.position in wanted:
                        yield row, next(proven)

    async def _lines(self, row: Row, inclusion: Inclusion | None) -> AsyncIterator[Line]:
        name = row.fingerprint
        if name is not None and name not in self._fingerprints:
            fingerprint = await self._log.fingerprint(name)
            if fingerprint is None:
                raise UnknownEvent(row.position, f"there is no fingerprint {name}")
            self._fingerprints.add(name)
            yield FingerprintLine(**msgspec.structs.asdict(fingerprint))
        yield EventLine.of(row, inclusion)
        if _may_keep_logits(row):
            for data in await self._log.stored_logits(row.position):
                yield LogitsLine(data=data)


class _Past:
    """Where the events of states are, up to a position, and what the states come from.

    ``analyses`` are those that need no other state, each with the latest version that it needs.
    """

    def __init__(self, log: LogReader, until: Position) -> None:
        self._log = log
        self._until = until
        self.positions: dict[StateId, list[Position]] = {}
        self.analyses: dict[StateId, list[tuple[Position, Version]]] = {}
        self.parents: dict[StateId, tuple[tuple[StateId, Version], ...]] = {}

    async def at(self, state_id: StateId, version: Version | None) -> StateAt:
        """A state at a version, or as it was at the end."""
        if state_id not in self.positions:
            await self._read(state_id)
        newest = Version(len(self.positions[state_id]))
        if version is not None and not 1 <= version <= newest:
            raise VersionNotFound(state_id, version, newest)
        return StateAt(state_id=state_id, version=version or newest)

    async def _read(self, state_id: StateId) -> None:
        positions = []
        analyses = []
        created: Row | None = None
        async for row in _events(self._log, Position(0), self._until, state_id):
            if row.type == ERASED:
                raise StateIsErased(state_id, row.recorded_at)
            created = created or row
            if row.version is not None:
                positions.append(row.position)
            elif (version := needs(decode(row))) is not None:
                analyses.append((row.position, version))
        if created is None:
            raise StateNotFound(state_id)
        event = decode(created).event
        self.parents[state_id] = parents_of(event.origin) if isinstance(event, StateCreated) else ()
        self.positions[state_id] = positions
        self.analyses[state_id] = analyses


def _may_keep_logits(row: Row) -> bool:
    try:
        return row.sealed or _keeps.decode(row.payload).stored_logits is not None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnknownEvent(row.position, f"not a known event: {error}") from error


async def _header(log: LogReader, signer: Signer | None, kind: Literal["log", "state"]) -> Header:
    checkpoint = await Proofs(log).checkpoint()
    return Header(
        format="cacher-export",
        version=FORMAT,
        kind=kind,
        checkpoint=checkpoint,
        note=note(checkpoint, signer),
        erasable=log.erasable,
        created_by=f"cacher-api3 {release('cacher-api3')}",
    )


async def _events(
    log: LogReader, after: Position, until: Position, state_id: StateId | None = None
) -> AsyncIterator[Row]:
    """Events of a state or of all, in the order of the log, up to and with a position."""
    while after < until:
        page = await log.page(after=after, limit=PAGE, max_bytes=PAGE_BYTES, state_id=state_id)
        if not page:
            return
        for row in page:
            if row.position > until:
                return
            yield row
        after = page[-1].position


def _size(lines: Iterable[Line]) -> int:
    return sum(
        len(line.payload if isinstance(line, EventLine) else line.data)
        for line in lines
        if isinstance(line, EventLine | LogitsLine)
    )


def _packed(packer: Packer, tally: Tally, lines: Sequence[Line]) -> bytes:
    return packer.pack(tally.write(lines))


class Arrival(Struct, frozen=True, kw_only=True):
    """What came into a log: a ``whole`` one, or states; ``head`` is the newest event now."""

    whole: bool
    states: tuple[StateId, ...]
    events: int
    head: Head


def arrival(recorded: Sequence[Recorded]) -> Arrival:
    """What came in by an import of states."""
    newest = recorded[-1].row
    return Arrival(
        whole=False,
        states=tuple(dict.fromkeys(one.state_id for one in recorded)),
        events=len(recorded),
        head=Head(newest.position, newest.hash),
    )


async def open_export(parts: Iterable[bytes], *, limit: int | None = None) -> Reading:
    """An export from its bytes; ``limit`` bounds what it unpacks to.

    Raises:
        BrokenExport: it is none, or one of a newer release.
    """
    return await asyncio.to_thread(lambda: Reading(unpacked_lines(parts, limit=limit)))


async def import_states(
    log: EventLog,
    reading: Reading,
    *,
    provenance: Provenance,
    idempotency: Idempotency | None = None,
) -> tuple[Recorded, ...]:
    """Add the states of an export to a log, and those that they come from if they are not there.

    Raises:
        BrokenExport: the file does not prove what it holds, or it is of a whole log.
        TooLarge: it unpacks to too much.
        StateExists: a state is there already.
        IdempotencyKeyReused, QueueFull, LogUnavailable: as for ``EventLog.append``.
    """
    imported = await asyncio.to_thread(_read, reading)
    await asyncio.to_thread(_check_metadata, imported)
    fresh = await _fresh(log, reading.header, imported)
    try:
        return await log.adopt(fresh, provenance=provenance, idempotency=idempotency)
    except VersionConflict as conflict:
        raise StateExists(conflict.facts["state_id"]) from conflict


def _read(reading: Reading) -> list[Imported]:
    header = reading.header
    if header.kind == "log":
        raise BrokenExport(
            "the file holds a whole log, which can only be restored into a database without events:"
            " cacher import FILE --database DATABASE"
        )
    if header.erasable:
        raise BrokenExport(
            "what the file holds is sealed, and the keys of an erasable log are never exported:"
            " restore an export of the whole log, with its key file beside the database"
        )
    return [
        Imported(
            row=one.row,
            source=source_of(one.row, header.checkpoint.log_id),
            fingerprint=one.fingerprint,
            logits=one.logits,
        )
        for one in reading.events()
    ]


def _check_metadata(imported: Iterable[Imported]) -> None:
    for one in imported:
        event = decode(one.row).event
        if isinstance(event, StateCreated):
            try:
                check_metadata(event.metadata)
            except InvalidInput as error:
                raise BrokenExport(f"state {one.row.state_id!r}: {error}") from error


async def _fresh(log: LogReader, header: Header, imported: Sequence[Imported]) -> list[Imported]:
    """What of an export is not in the log yet.

    Raises:
        StateExists: an exported state is, or what another one comes from is there with other
            events, or fewer.
    """
    asked = {one.state_id for one in header.states}
    found: dict[StateId, list[Identity]] = defaultdict(list)
    for one in imported:
        if one.row.version is not None:
            found[one.row.state_id].append(identity(one.row, header.checkpoint.log_id))
    known = set()
    for state_id, events in found.items():
        if here := await log.state_rows(state_id, until=Version(len(events))):
            if state_id in asked or [identity(row, log.log_id) for row in here] != events:
                raise StateExists(state_id)
            known.add(state_id)
    return [one for one in imported if one.row.state_id not in known]
