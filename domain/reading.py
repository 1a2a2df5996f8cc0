"""Reading an export: every line is checked against those before it, and nothing is taken on trust.

What :class:`Reading` hands out is proven but for what only the end shows. So nothing may come of
what it handed out before it has come to the end.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec
from msgspec import Struct

from domain.chain import Head, Row, blobs_digest, follow, genesis, row_hash
from domain.errors import BrokenExport, ExportTooNew
from domain.events import (
    DELETED,
    ERASED,
    SCHEMA,
    ContinuationsGenerated,
    Recorded,
    StateCreated,
    TokensGenerated,
    decode,
    misnumbered,
    needs,
)
from domain.export import (
    FORMAT,
    End,
    EventLine,
    FingerprintLine,
    Header,
    Line,
    LogitsLine,
    ReleasedLine,
    Tally,
    read_line,
)
from domain.fingerprint import Fingerprint
from domain.ids import Position, StateId, Version
from domain.log_errors import ChainBroken, LogError, UnknownEvent
from domain.merkle import TILE, Tree, from_note, includes, tile_hash
from domain.origin import parents_of
from domain.seals import check_seal
from domain.state import State, evolve
from domain.transfer import original_row, source_in

_STATE_ID: Final = re.compile(r"state-[0-9a-f]{32}", re.ASCII)


class Admitted(Struct, frozen=True, kw_only=True):
    """An event that proved itself, with what is kept beside it.

    ``recorded`` is null where it is sealed. ``fingerprint`` is the one that its row names.
    """

    row: Row
    recorded: Recorded | None
    fingerprint: Fingerprint | None
    logits: tuple[bytes, ...]


class _Announced(Struct):
    """What a file of any release begins with."""

    format: str
    version: int


class Reading:
    """An export that is read once, from its ``lines`` (each with its line feed).

    Of what was read so far, ``versions`` is where each state stands, ``size`` the number of events
    and ``head`` the newest of a whole log. ``sealed`` events could not be read for want of a key.
    ``released_until``, known at the end, is the position up to which logits may be missing.

    Raises:
        BrokenExport: it is no export, one of a newer release, or does not prove what it holds.
    """

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self._tally = Tally()
        self.header = self._header()
        self.head = genesis(self.header.checkpoint.log_id)
        self.versions: dict[StateId, Version] = {}
        self.size = 0
        self.sealed = 0
        self.released_until: Position | None = None
        self._states: dict[StateId, State] = {}
        self._ended: set[StateId] = set()
        self._needed: dict[StateId, Version] = {}
        for one in self.header.states:
            self._need(one.state_id, one.version)
        self._fingerprints: dict[str, Fingerprint] = {}
        self._tiles: list[bytes] = []
        self._rest: list[bytes] = []
        self._last_without_logits = Position(0)

    def events(self, opened: Callable[[Row], Row] = lambda row: row) -> Iterator[Admitted]:
        """The events in order; all of them are proven once there are no more.

        ``opened`` gives a sealed row what its payload holds, if there is a key to it.

        Raises:
            BrokenExport: the file does not prove what it holds; says where.
        """
        try:
            yield from self._events(opened)
        except (LogError, RecursionError) as error:
            raise BrokenExport(f"the file does not prove what it holds: {error}") from error

    def root(self) -> str:
        """The root over the events of a whole log that were read so far."""
        return Tree(self._tiles, self._rest).root.hex()

    def _header(self) -> Header:
        data = next(self._lines, b"")
        try:
            announced = msgspec.json.decode(data, type=_Announced)
        except (ValueError, RecursionError) as error:
            raise BrokenExport("this is no export of Cacher") from error
        if announced.format != "cacher-export":
            raise BrokenExport("this is no export of Cacher")
        if announced.version != FORMAT:
            raise ExportTooNew(
                f"the file has format {announced.version}, this release reads format {FORMAT}"
            )
        header = self._read(data)
        if not isinstance(header, Header):
            raise BrokenExport("the file does not begin with a header")
        try:
            noted = from_note(header.note)
        except ValueError as error:
            raise BrokenExport(f"the header holds no checkpoint: {error}") from error
        if noted != header.checkpoint:
            raise BrokenExport("the note in the header is of another checkpoint")
        if (header.kind == "state") != bool(header.states):
            raise BrokenExport("the header must name states if it is not of a whole log")
        return header

    def _read(self, data: bytes) -> Line:
        try:
            line = read_line(data)
        except ValueError as error:
            raise BrokenExport(f"line {self._tally.lines + 1}: {error}") from error
        if not isinstance(line, End):
            self._tally.add(line, data)
        return line

    def _events(self, opened: Callable[[Row], Row]) -> Iterator[Admitted]:
        row: Row | None = None
        blobs: list[bytes] = []
        for data in self._lines:
            line = self._read(data)
            if isinstance(line, LogitsLine) and row:
                blobs.append(line.data)
                continue
            if row:
                yield self._admit(row, tuple(blobs))
            row, blobs = None, []
            match line:
                case FingerprintLine():
                    self._add_fingerprint(line.fingerprint())
                case EventLine():
                    row = self._proven(line)
                    row = opened(row) if row.sealed else row
                case ReleasedLine() if self.released_until is None:
                    self.released_until = Position(line.until)
                case End() if self.released_until is not None:
                    self._finish(line, self.released_until)
                    return
                case _:
                    raise BrokenExport(f"line {self._tally.lines} is out of place")
        raise BrokenExport("the file is cut off: it has no end")

    def _add_fingerprint(self, fingerprint: Fingerprint) -> None:
        if not fingerprint.is_sound():
            raise BrokenExport(f"fingerprint {fingerprint.id} is not that of its document")
        if fingerprint.id in self._fingerprints:
            raise BrokenExport(f"fingerprint {fingerprint.id} is there twice")
        self._fingerprints[fingerprint.id] = fingerprint

    def _proven(self, line: EventLine) -> Row:
        """The row of a line that is part of the log which the header names."""
        row = line.row()
        if row.schema > SCHEMA:
            raise ExportTooNew(
                f"position {row.position}: schema {row.schema} is of a newer release; this one"
                f" reads schemas up to {SCHEMA}"
            )
        if not _STATE_ID.fullmatch(row.state_id):
            raise UnknownEvent(row.position, f"{row.state_id!r} is no state's id")
        if self.header.kind == "log":
            self._follow(line, row)
        else:
            self._include(line, row)
        self.head = Head(row.position, row.hash)
        self.size += 1
        return row

    def _check_source(self, row: Row) -> None:
        source = source_in(row)
        if source is None or (row.sealed and row.opened is None):
            return
        if row_hash(original_row(row, source)).hex() != source.hash:
            raise ChainBroken(row.position, "it is not what its source says it was there")

    def _follow(self, line: EventLine, row: Row) -> None:
        if line.inclusion is not None:
            raise ChainBroken(row.position, "a proof of inclusion has no place in a whole log")
        follow(self.head, row)
        self._rest.append(row.hash)
        if len(self._rest) == TILE:
            self._tiles.append(tile_hash(self._rest))
            self._rest = []

    def _include(self, line: EventLine, row: Row) -> None:
        if self.size and row.position <= self.head.position:
            raise ChainBroken(row.position, f"comes after position {self.head.position}")
        if row_hash(row) != row.hash:
            raise ChainBroken(row.position, "a column was changed: the row does not match its hash")
        proof = line.inclusion
        if proof is None or proof.position != row.position:
            raise ChainBroken(row.position, "there is no proof that the log holds it")
        if not includes(self.header.checkpoint, row.hash, proof):
            raise ChainBroken(row.position, "its proof does not lead to the root of the checkpoint")

    def _admit(self, row: Row, blobs: tuple[bytes, ...]) -> Admitted:
        """An event that happened to its state as it was, with all that is kept beside it."""
        self._number(row)
        if row.fingerprint is not None and row.fingerprint not in self._fingerprints:
            raise UnknownEvent(row.position, f"fingerprint {row.fingerprint} is not in the file")
        check_seal(row, erasable=self.header.erasable)
        recorded = None if row.sealed and row.opened is None else decode(row)
        self._check_source(row)
        if recorded is None:
            self.sealed += 1
        else:
            self._fold(recorded)
            if not row.sealed:  # sealed blobs authenticate themselves
                self._check_blobs(recorded, blobs)
        return Admitted(
            row=row,
            recorded=recorded,
            fingerprint=self._fingerprints[row.fingerprint] if row.fingerprint else None,
            logits=blobs,
        )

    def _number(self, row: Row) -> None:
        """An event leads to the next version of its state, or saw one that there is."""
        for name, possible in misnumbered(row):
            raise UnknownEvent(row.position, f"{name} is {getattr(row, name)}, not {possible}")
        reached = self.versions.get(row.state_id, Version(0))
        if row.at_version is not None:
            if row.at_version > reached or row.state_id in self._ended:
                ended = " and has ended" if row.state_id in self._ended else ""
                raise UnknownEvent(
                    row.position,
                    f"it saw version {row.at_version}, the state is at {reached}{ended}",
                )
        elif row.version != reached + 1:
            raise UnknownEvent(row.position, f"version {row.version} where {reached + 1} must come")
        else:
            self.versions[row.state_id] = row.version
            if row.type in (DELETED, ERASED):
                self._ended.add(row.state_id)

    def _check_analysis(self, analysis: Recorded) -> None:
        """An analysis among those of a state can be made again from what is in the file."""
        reached = self.versions[analysis.state_id]
        if self.header.kind == "state" and not 0 < (needs(analysis) or 0) <= reached:
            raise UnknownEvent(analysis.position, "it compares with what is not in the file")

    def _fold(self, recorded: Recorded) -> None:
        if recorded.row.version is None:
            self._check_analysis(recorded)
            return
        before = self._states.get(recorded.state_id)
        if before is None and recorded.version > 1:
            return  # sealed: what it was cannot be known
        self._states[recorded.state_id] = evolve(before, recorded)
        if isinstance(recorded.event, StateCreated) and self.header.kind == "state":
            for parent, version in parents_of(recorded.event.origin):
                if self.versions.get(parent, 0) < version:
                    raise UnknownEvent(
                        recorded.position, f"version {version} of {parent}, its parent, is missing"
                    )
                self._need(parent, version)

    def _need(self, state_id: StateId, version: Version) -> None:
        self._needed[state_id] = max(self._needed.get(state_id, version), version)

    def _check_blobs(self, recorded: Recorded, blobs: tuple[bytes, ...]) -> None:
        stored = None
        if isinstance(recorded.event, TokensGenerated | ContinuationsGenerated):
            stored = recorded.event.stored_logits
        if stored is not None and not blobs:  # let go of, here or where it was imported from
            if recorded.row.source is None:
                self._last_without_logits = recorded.position
        elif (None if stored is None else stored.digest) != (
            blobs_digest(blobs) if blobs else None
        ):
            raise ChainBroken(recorded.position, "its stored logits are not those it had")

    def _finish(self, end: End, released_until: Position) -> None:
        """Hold everything against what the file says of itself."""
        if end != self._tally.end():
            raise BrokenExport("the file was changed: its lines do not match their digest")
        if next(self._lines, None) is not None:
            raise BrokenExport("the file goes on after its end")
        if self._last_without_logits > released_until:
            raise ChainBroken(self._last_without_logits, "its stored logits are missing")
        if self.header.kind == "log":
            checkpoint = self.header.checkpoint
            reached = (self.size, self.head.position, self.head.hash.hex(), self.root())
            if reached != (
                checkpoint.size,
                checkpoint.position,
                checkpoint.hash,
                checkpoint.root,
            ):
                raise BrokenExport("the events do not lead to the checkpoint in the header")
        else:
            self._check_held()

    def _check_held(self) -> None:
        """All that is needed is there and nothing else, as far as it can be read what is needed."""
        lacking = any(
            self.versions.get(state_id, 0) < version for state_id, version in self._needed.items()
        )
        if lacking or (not self.sealed and self.versions != self._needed):
            raise BrokenExport("the file does not hold the states it names, and their ancestors")
