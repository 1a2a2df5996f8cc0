"""The file in which a log, or some of its states, leave it: gzip (RFC 1952) of JSON lines.

``zcat`` and ``jq`` read it. In order: a header; the events in the order of the log, each as its
whole row, after the fingerprint it names if that was not there before, and before the logits kept
beside it; up to where logits may be missing; an end that holds the digest of all lines before it.
The same content has the same bytes.

A whole log is proven by its chain, from the genesis that names it to the checkpoint in the header;
the events of states by the proof that comes with each, that the root of the checkpoint includes it.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from domain.chain import Row
from domain.fingerprint import Fingerprint
from domain.ids import StateId, Version
from domain.merkle import Checkpoint, Inclusion
from domain.transfer import Hash, Number

FORMAT: Final = 1
"""Number of the format that this release writes; it reads no other."""


class _Line(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="line",
):
    pass


class StateAt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A state up to a version."""

    state_id: StateId
    version: Version


class Header(_Line, frozen=True, kw_only=True, tag="header"):
    """What the file holds: a whole log, or ``states`` and what they come from.

    ``checkpoint`` is the log as it stood then, ``note`` the same as a text to keep, signed if there
    is a key. What an ``erasable`` log holds of states is sealed.
    """

    format: Literal["cacher-export"]
    version: int
    kind: Literal["log", "state"]
    states: tuple[StateAt, ...] = ()
    checkpoint: Checkpoint
    note: str
    erasable: bool = False
    created_by: str


class FingerprintLine(_Line, frozen=True, kw_only=True, tag="fingerprint"):
    """The numerics that events after it were computed under."""

    id: str
    document: str
    deterministic: bool

    def fingerprint(self) -> Fingerprint:
        """The fingerprint itself."""
        return Fingerprint(id=self.id, document=self.document, deterministic=self.deterministic)


class EventLine(_Line, frozen=True, kw_only=True, tag="event"):
    """A row as it is stored; ``payload`` is the exact text, hashes are hexadecimal."""

    position: Number
    state_id: StateId
    version: Number | None
    at_version: Number | None = None
    type: str
    schema: Number
    payload: str
    fingerprint: str | None = None
    recorded_at: str
    actor: str
    request_id: str
    previous_hash: Hash
    hash: Hash
    source: str | None = None
    inclusion: Inclusion | None = None

    @classmethod
    def of(cls, row: Row, inclusion: Inclusion | None = None) -> "EventLine":
        """The line of a row."""
        columns: dict[str, Any] = {name: getattr(row, name) for name in _ROW}
        hashes = {name: getattr(row, name).hex() for name in _HASHES}
        return cls(**columns, **hashes, inclusion=inclusion)

    def row(self) -> Row:
        """The row of the line."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in _ROW}
        columns |= {name: bytes.fromhex(getattr(self, name)) for name in _HASHES}
        return Row(**columns)


class LogitsLine(_Line, frozen=True, kw_only=True, tag="logits"):
    """One of the blobs kept beside the event before it, in order."""

    data: bytes


class ReleasedLine(_Line, frozen=True, kw_only=True, tag="released"):
    """Logits kept beside events up to a position may have been let go of when they were read."""

    until: Number


class End(_Line, frozen=True, kw_only=True, tag="end"):
    """How many lines of each kind there were, and the SHA-256 of all of them."""

    fingerprints: int
    events: int
    logits: int
    sha256: Hash


Line = Header | FingerprintLine | EventLine | LogitsLine | ReleasedLine | End

_HASHES: Final = ("previous_hash", "hash")
_ROW: Final = tuple(
    name for name in EventLine.__struct_fields__ if name not in {*_HASHES, "inclusion"}
)
_encoder: Final = msgspec.json.Encoder(order="deterministic")
_decoder: Final[msgspec.json.Decoder[Line]] = msgspec.json.Decoder(Line)


def read_line(data: bytes) -> Line:
    """The line in its bytes.

    Raises:
        ValueError: it is none, or not written as :func:`write_line` writes it.
    """
    try:
        line = _decoder.decode(data)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if isinstance(line, End) and write_line(line) != data:  # no digest covers it
        raise ValueError("not as it was written")
    return line


def write_line(line: Line) -> bytes:
    """The bytes of a line, with its line feed."""
    return _encoder.encode(line) + b"\n"


class Tally:
    """The lines of a file so far: what its end has to say of them."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._counts: Counter[type[Line]] = Counter()

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self._counts.total()

    def add(self, line: Line, data: bytes) -> None:
        """Count a line that is not the end."""
        self._digest.update(data)
        self._counts[type(line)] += 1

    def end(self) -> End:
        """The end of a file of these lines."""
        return End(
            fingerprints=self._counts[FingerprintLine],
            events=self._counts[EventLine],
            logits=self._counts[LogitsLine],
            sha256=self._digest.hexdigest(),
        )

    def write(self, lines: Sequence[Line]) -> bytes:
        """The bytes of lines, counted."""
        written = []
        for line in lines:
            data = write_line(line)
            self.add(line, data)
            written.append(data)
        return b"".join(written)
