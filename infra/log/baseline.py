"""Baselines: what a replay found of each place of a history, in one safetensors file.

Any reader of the format (https://github.com/huggingface/safetensors) can open one. Its metadata
hold ``cacher``, a JSON object that says what the file is of (:class:`Header`) and has the SHA-256
of each tensor, and ``sha256``, that of this JSON text. All tensors have one dimension. Those of
``PLACES`` have one value for each place, state after state in the order of the header; ``run`` is
an index into its ``runs``, a ``sampled`` token of -1 says that none was drawn. ``values`` have
``width`` logits for each place of a state: the largest ones, largest first, whose tokens are in
``ids``, or, where there are no ``ids``, those of all tokens in order.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Final, Literal, Self

import msgspec
import numpy as np
from msgspec import Struct
from safetensors import SafetensorError, safe_open

from domain.baseline import Covered
from domain.canonical import as_json
from domain.chain import Head
from domain.errors import NotComparable
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, StateId, TokenId, Version
from domain.teacher_forcing import Before
from domain.transfer import Identity
from domain.work import Reference, RowKind
from infra.log.files import writing

PLACES: Final = {
    "version": "<i4",
    "run": "<i4",
    "token_position": "<i8",
    "token_id": "<i4",
    "sampled": "<i4",
    "logprob": "<f8",
    "logsumexp": "<f8",
}
ROWS: Final = {"ids": "<i4", "values": "<f4"}

_NAMES: Final = {"<i8": "I64", "<i4": "I32", "<f8": "F64", "<f4": "F32"}
_CHUNK: Final = 1 << 20


class Extent(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A state: what is covered of it (:class:`Covered`), and by how many values.

    It has so many places, with so many logits each; ``fingerprint`` is the id.
    """

    state_id: StateId
    version: Version
    identity: Identity
    model_id: ModelId
    fingerprint: str
    places: int
    width: int


class Header(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a baseline is of: states of a log as it was at a head, and by which numerics."""

    format: Literal["cacher-baseline"] = "cacher-baseline"
    version: Literal[1] = 1
    log_id: str
    position: Position
    hash: str
    rows: Literal["top_k", "raw"]
    states: tuple[Extent, ...]
    runs: tuple[str, ...]
    fingerprints: tuple[Fingerprint, ...]
    sha256: dict[str, str]


# writing


class BaselineFileWriter:
    """Writes a baseline; :class:`domain.baseline.BaselineWriter`. Used as a context manager.

    Until :meth:`finish` there is no file, and what is written is not held in memory.
    """

    def __init__(self, path: Path, *, k: int | None) -> None:
        """Of each place the ``k`` largest logits are kept, or all of them."""
        self.kind: RowKind = "raw" if k is None else "top_k"
        self.k = k or 0
        self._path = path
        self._states: list[Extent] = []
        self._runs: dict[str, int] = {}
        self._fingerprints: dict[str, Fingerprint] = {}

    def __enter__(self) -> Self:
        types = PLACES | _row_types(self.kind)
        with ExitStack() as stack:
            folder = self._path.parent
            self._columns: dict[str, _Column] = {
                name: _Column(stack.enter_context(TemporaryFile(dir=folder)), type_)
                for name, type_ in sorted(types.items())
            }
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, covered: Covered, places: Sequence[Before]) -> None:
        """Keep the places of a state, one or more, each with a row of logits."""
        self._fingerprints[covered.fingerprint.id] = covered.fingerprint
        self._put("version", [one.version for one in places])
        self._put("run", [self._runs.setdefault(one.run, len(self._runs)) for one in places])
        self._put("token_position", [one.token_position for one in places])
        self._put("token_id", [one.reference.token_id for one in places])
        self._put("sampled", [-1 if one.sampled is None else one.sampled for one in places])
        self._put("logprob", [one.reference.logprob for one in places])
        self._put("logsumexp", [one.reference.logsumexp for one in places])
        for one in places:
            values = one.reference.row or b""
            if self.kind == "top_k":
                half = len(values) // 2
                self._columns["ids"].write(values[:half])
                values = values[half:]
            self._columns["values"].write(values)
        extent = Extent(
            state_id=covered.state_id,
            version=covered.version,
            identity=covered.identity,
            model_id=covered.model_id,
            fingerprint=covered.fingerprint.id,
            places=len(places),
            width=len(values) // 4,
        )
        self._states.append(extent)

    def _put(self, name: str, values: Sequence[float]) -> None:
        self._columns[name].write(np.asarray(values, PLACES[name]).tobytes())

    def finish(self, log_id: str, head: Head) -> None:
        """Write the file, in place of one that was there; it is on disk when this returns."""
        header = Header(
            log_id=log_id,
            position=head.position,
            hash=head.hash.hex(),
            rows="raw" if self.kind == "raw" else "top_k",
            states=tuple(self._states),
            runs=tuple(self._runs),
            fingerprints=tuple(self._fingerprints.values()),
            sha256={name: column.sha256.hexdigest() for name, column in self._columns.items()},
        )
        with writing(self._path) as file:
            file.write(self._prelude(header))
            for column in self._columns.values():
                file.writelines(column.chunks())

    def _prelude(self, header: Header) -> bytes:
        """What comes before the tensors in a safetensors file."""
        text = as_json(header)
        digest = hashlib.sha256(text.encode()).hexdigest()
        tensors: dict[str, Any] = {"__metadata__": {"cacher": text, "sha256": digest}}
        begin = 0
        for name, column in self._columns.items():
            end = begin + column.size
            tensors[name] = {
                "dtype": _NAMES[column.type],
                "shape": [column.size // np.dtype(column.type).itemsize],
                "data_offsets": [begin, end],
            }
            begin = end
        encoded = msgspec.json.encode(tensors)
        encoded += b" " * (-len(encoded) % 8)
        return struct.pack("<Q", len(encoded)) + encoded


class _Column:
    """A tensor as it grows."""

    def __init__(self, file: IO[bytes], type_: str) -> None:
        self.type = type_
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def chunks(self) -> Iterator[bytes]:
        self._file.seek(0)
        while data := self._file.read(_CHUNK):
            yield data


# reading


class BaselineFile:
    """A baseline that has been checked to be whole: :class:`domain.baseline.Baseline`.

    Reads one state at a time. Used as a context manager.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            NotComparable: it is no baseline, or was cut or altered.
        """
        self._path = path
        try:
            self._file: Any = safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise NotComparable(f"{path} cannot be read as a baseline: {error}") from error
        self._header = self._check()
        self._fingerprints = {one.id: one for one in self._header.fingerprints}
        self._offsets: dict[StateId, tuple[int, int, Extent]] = {}
        place = value = 0
        for extent in self._header.states:
            self._offsets[extent.state_id] = (place, value, extent)
            place += extent.places
            value += extent.places * extent.width

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def state_ids(self) -> tuple[StateId, ...]:
        """The states it has, in the order they were recorded."""
        return tuple(self._offsets)

    def covered(self, state_id: StateId) -> Covered:
        """What it has of a state."""
        _, _, extent = self._offsets[state_id]
        return Covered(
            state_id=state_id,
            version=extent.version,
            identity=extent.identity,
            model_id=extent.model_id,
            fingerprint=self._fingerprints[extent.fingerprint],
        )

    def read(self, state_id: StateId) -> list[Before]:
        """The places of a state, in the order they were recorded."""
        place, value, extent = self._offsets[state_id]
        width, count = extent.width, extent.places
        columns = {name: self._slice(name, place, count).tolist() for name in PLACES}
        parts = [
            self._slice(name, value, count * width).reshape(count, width)
            for name in _row_types(self._header.rows)
        ]
        return [
            Before(
                version=Version(version),
                run=self._header.runs[run],
                token_position=token_position,
                sampled=None if sampled < 0 else TokenId(sampled),
                reference=Reference(
                    token_id=TokenId(token),
                    logprob=logprob,
                    logsumexp=logsumexp,
                    kind=self._header.rows,
                    row=b"".join(part[index].tobytes() for part in parts),
                ),
            )
            for index, (version, run, token_position, token, sampled, logprob, logsumexp) in (
                enumerate(zip(*columns.values(), strict=True))
            )
        ]

    def _slice(self, name: str, begin: int, count: int) -> Any:
        return self._file.get_slice(name)[begin : begin + count]

    def _check(self) -> Header:
        """The header, once everything is found to be as it was written."""
        metadata = self._file.metadata() or {}
        text = metadata.get("cacher", "")
        if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
            raise NotComparable(f"{self._path} is no baseline, or what it says of itself changed")
        try:
            header = msgspec.json.decode(text, type=Header)
        except msgspec.DecodeError as error:
            reason = f"{self._path} is no baseline that this release reads: {error}"
            raise NotComparable(reason) from error
        if self._tensors() != _tensors(header):
            raise NotComparable(f"{self._path} was altered: its tensors are not those it had")
        for name, digest in header.sha256.items():
            if self._digest(name) != digest:
                raise NotComparable(f"{self._path} was altered: {name} is not what was recorded")
        return header

    def _tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Type and shape of each tensor."""
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}

    def _digest(self, name: str) -> str:
        tensor, found = self._file.get_slice(name), hashlib.sha256()
        (size,) = tensor.get_shape()
        for begin in range(0, size, _CHUNK):
            found.update(tensor[begin : min(begin + _CHUNK, size)].tobytes())
        return found.hexdigest()


def _tensors(header: Header) -> dict[str, tuple[str, list[int]]]:
    """Type and shape that each tensor must have."""
    places = sum(one.places for one in header.states)
    values = sum(one.places * one.width for one in header.states)
    return {name: (_NAMES[type_], [places]) for name, type_ in PLACES.items()} | {
        name: (_NAMES[type_], [values]) for name, type_ in _row_types(header.rows).items()
    }


def _row_types(kind: RowKind) -> dict[str, str]:
    """Types of the tensors that hold rows of logits."""
    return {name: type_ for name, type_ in ROWS.items() if kind == "top_k" or name != "ids"}
