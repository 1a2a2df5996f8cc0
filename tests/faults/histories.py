"""A short history that every kind of write is in."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from domain.chain import Row
from domain.errors import LogUnavailable
from domain.events import HeadRewound, Recorded, StateCreated, StateDeleted
from domain.ids import Version
from domain.origin import Fork
from domain.ports import Append
from infra.log.sqlite_log import SqliteLog
from tests.builders import (
    FINGERPRINT,
    append,
    created,
    forwarded,
    generated,
    idempotency,
    provenance,
    started,
    state_id,
)


def _fork(text: str) -> StateCreated:
    origin = Fork(state_id=state_id(0), version=Version(2), head_position=len(text))
    return msgspec.structs.replace(created(text), origin=origin)


Call = tuple[Append, ...]
_Answer = TypeVar("_Answer")

ROUNDS: Final[tuple[tuple[Call, ...], ...]] = (
    ((append(created()),),),
    ((append(forwarded(3), 1, fingerprint=FINGERPRINT, logits=(b"1" * 5000, b"2")),),),
    ((append(_fork("abcd"), state=1), append(_fork("abc"), state=2)),),
    (
        (append(generated(4, "de"), 2, fingerprint=FINGERPRINT, logits=(b"3" * 99, b"4")),),
        (append(forwarded(4, "long" * 500), 1, state=1),),
        (append(HeadRewound(to_position=1), 1, state=2),),
        (append(created("another"), state=3), append(created("and one"), state=4)),
    ),
    ((append(StateDeleted(), 2, state=1),),),
    ((append(forwarded(6, "end"), 3),), (append(forwarded(1, "end"), 2, state=2),)),
)
"""Calls that are sent together, round by round; each call's events are there all or none."""


SIZES: Final = {
    f"call-{number}-{n}": len(call)
    for number, calls in enumerate(ROUNDS)
    for n, call in enumerate(calls)
}
"""How many events each call records, by its key."""


async def _raise(key: str, error: LogUnavailable) -> None:
    raise error


async def record(
    log: SqliteLog,
    acknowledged: Callable[[Sequence[Recorded]], None] = lambda events: None,
    refused: Callable[[str, LogUnavailable], Awaitable[None]] = _raise,
    rounds: int = len(ROUNDS),
) -> None:
    """Make the history. A call that is ``refused`` is sent again, with its key, until it is not."""

    async def see_through(key: str, write: Callable[[], Awaitable[_Answer]]) -> _Answer:
        while True:
            try:
                return await write()
            except LogUnavailable as error:
                await refused(key, error)

    async def send(call: Call, key: str) -> None:
        by, once = provenance(request_id=key), idempotency(key)
        acknowledged(
            await see_through(key, lambda: log.append(call, provenance=by, idempotency=once))
        )

    async def intend(key: str) -> None:
        intent, by = started(base_version=2), provenance(request_id=key)
        await see_through(key, lambda: log.begin_generation(intent, provenance=by))

    for number, calls in enumerate(ROUNDS[:rounds]):
        sent = [send(call, f"call-{number}-{n}") for n, call in enumerate(calls)]
        await asyncio.gather(*sent, intend("intent"))


async def rows_of(path: Path) -> list[Row]:
    """Everything a log holds: opened as the server opens it."""
    async with await SqliteLog.open(path, connections=1) as log:
        return await log.rows()


def check_calls(rows: Sequence[Row], acknowledged: Iterable[Row] = ()) -> None:
    """Each call is there wholly or not at all, and wherever it was ``acknowledged``, as then."""
    found = Counter(row.request_id for row in rows)
    assert found == {key: SIZES[key] for key in found}
    assert set(acknowledged) <= set(rows)


def checkpoint_every(log: SqliteLog, pages: int) -> None:
    """Let the writer move the WAL into the database early."""
    log._writer._connection.execute(f"PRAGMA wal_autocheckpoint = {pages}")
