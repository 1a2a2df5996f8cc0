"""After an erasure nothing of a state can be read, in no file, and everything else stands."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from app.operations.proofs import Proofs
from domain.errors import (
    HasDescendants,
    IdempotencyKeyReused,
    LogUnavailable,
    NotErasable,
    StateIsErased,
    StateNotFound,
    VersionConflict,
)
from domain.events import Event, StateDeleted, StateErased, decode
from domain.ids import StateId, Version
from domain.log_errors import EventErased
from domain.origin import Fork, Merge, Parent
from domain.state import Erased, fold_rows
from infra.log import erasing
from infra.log.keyring import Keyring, key_file, prepare
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.app.api import eventually
from tests.builders import (
    BY,
    append,
    created,
    forwarded,
    idempotency,
    provenance,
    started,
    state_id,
)
from tests.infra.log.following import verified

SECRET = "xylophones"
TOKENS = ",".join(str(ord(letter)) for letter in SECRET)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[SqliteLog]:
    async with await SqliteLog.open(path, erasable=True) as opened:
        yield opened


def beginning(*parents: int, text: str = SECRET) -> Event:
    """A state that begins with what others held."""
    if len(parents) == 1:
        fork = Fork(state_id=state_id(*parents), version=Version(1), head_position=len(text))
        return msgspec.structs.replace(created(text), origin=fork)
    whole = tuple(
        Parent(state_id=state_id(one), version=Version(1), head_position=len(text))
        for one in parents
    )
    merge = Merge(parents=whole, strategy="concatenate")
    return msgspec.structs.replace(created(text), origin=merge)


async def begin(log: SqliteLog, number: int, *parents: int) -> None:
    event = beginning(*parents) if parents else created(SECRET)
    await log.append([append(event, state=number)], provenance=BY)


def ids(numbers: Iterable[int]) -> tuple[StateId, ...]:
    return tuple(map(state_id, numbers))


def holding(path: Path, *wanted: bytes) -> set[str]:
    """Names of the files of a log that hold any of some bytes."""
    files = [file for file in path.parent.iterdir() if file.is_file()]
    return {file.name for file in files if any(one in file.read_bytes() for one in wanted)}


def key_of(path: Path, number: int = 0) -> bytes:
    log_id = prepare(path, erasable=False)
    assert log_id is not None
    with closing(Keyring.open(path, log_id)) as ring:
        return ring.find([state_id(number)])[state_id(number)]


# what is erased


async def test_an_erased_state_can_never_be_read_again_and_its_log_still_proves_itself(
    log: SqliteLog, path: Path
) -> None:
    await begin(log, 0)
    await begin(log, 1)
    await log.append([append(forwarded(10, SECRET), 1)], provenance=BY)
    key, other = key_of(path), key_of(path, 1)
    before, root = await log.rows(), (await Proofs(log).checkpoint()).root
    assert holding(path, key) == {"log.db.keys"}  # the search finds what is there

    (erased,) = await log.erase([state_id()], provenance=BY)

    assert (erased.event, erased.version) == (StateErased(), 3)
    assert not erased.row.sealed
    assert holding(path, key, SECRET.encode(), TOKENS.encode()) == set()
    assert holding(path, other) == {"log.db.keys"}
    rows = await log.rows()
    assert [one.columns() for one in rows[:3]] == [one.columns() for one in before]
    assert [bool(one.opened) for one in rows] == [False, True, False, False]
    assert decode(rows[1]).event == created(SECRET)
    assert fold_rows(await log.state_rows(state_id())) == Erased(
        state_id=state_id(), version=Version(3), erased_at=BY.recorded_at
    )
    assert await verified(log) == 4
    assert (await Proofs(log).checkpoint(3)).root == root
    async with await SqliteReader.open(path) as reader:
        assert [bool(one.opened) for one in await reader.rows()] == [False, True, False, False]


async def test_what_is_kept_beside_its_events_goes_and_that_of_others_stays(
    log: SqliteLog, path: Path
) -> None:
    for number in (0, 1):
        key = idempotency(f"create-{number}")
        await log.append([append(created(), state=number)], provenance=BY, idempotency=key)
        blobs = (b"12345", b"678")
        event = append(forwarded(3), 1, state=number, logits=blobs)
        await log.append([event], provenance=provenance(recorded_at="2026-02-01T00:00:00.000000Z"))
        stream = idempotency(f"stream-{number}")
        await log.begin_generation(started(number), provenance=BY, idempotency=stream)
    kept = "SELECT bytes FROM logits_kept"
    digests = "SELECT key, request_digest = zeroblob(32) FROM idempotency_keys ORDER BY key"
    with closing(sqlite3.connect(path)) as connection:
        (size,) = connection.execute(kept).fetchone()
        await log.erase([state_id()], provenance=BY, idempotency=idempotency("erase"))
        assert connection.execute(kept).fetchone() == (size // 2,)
        found = [("create-0", 1), ("create-1", 0), ("erase", 0)]
        assert connection.execute(digests).fetchall() == found
    assert await log.logits(2) == ()
    assert await log.logits(4) == (b"12345", b"678")
    assert await log.begun_generation(idempotency("stream-0")) is None
    assert await log.begun_generation(idempotency("stream-1")) == started(1)


async def test_a_retry_of_an_erased_answer_is_refused_whatever_its_body(log: SqliteLog) -> None:
    for number in (0, 1):
        await log.append(
            [append(created(), state=number)],
            provenance=BY,
            idempotency=idempotency(f"create-{number}"),
        )
    await log.erase([state_id()], provenance=BY)
    for again in (idempotency("create-0"), idempotency("create-0", body=b"another")):
        with pytest.raises(EventErased):
            await log.recall(again)
        with pytest.raises(EventErased):
            await log.append([append(created(), state=2)], provenance=BY, idempotency=again)
    remembered = await log.recall(idempotency("create-1"))
    assert remembered is not None
    assert remembered.request_digest == idempotency("create-1").request_digest


async def test_a_retry_of_the_erasure_gets_its_events_and_erases_nothing_else(
    log: SqliteLog,
) -> None:
    await begin(log, 0)
    key = idempotency("erase")
    first = await log.erase([state_id()], provenance=BY, idempotency=key)
    assert await log.erase([state_id()], provenance=BY, idempotency=key) == first
    remembered = await log.recall(key)
    assert remembered is not None
    assert remembered.events == first
    other = idempotency("erase", body=b"another")
    with pytest.raises(IdempotencyKeyReused):
        await log.erase([state_id()], provenance=BY, idempotency=other)
    assert len(await log.rows()) == 2


async def test_a_deleted_state_can_be_erased_and_an_erased_one_cannot_be_again(
    log: SqliteLog,
) -> None:
    await log.append([append(created()), append(StateDeleted(), 1)], provenance=BY)
    await log.erase([state_id()], provenance=BY)
    with pytest.raises(StateIsErased, match=BY.recorded_at):
        await log.erase([state_id()], provenance=BY)
    with pytest.raises(StateNotFound):
        await log.erase([state_id(9)], provenance=BY)
    assert len(await log.rows()) == 3
    assert (await log.live_states(limit=9)).state_ids == ()


async def test_a_refused_erasure_records_nothing_and_destroys_no_key(log: SqliteLog) -> None:
    await begin(log, 0)
    with pytest.raises(StateNotFound):
        await log.erase(ids([0, 9]), provenance=BY)
    (row,) = await log.rows()
    assert decode(row).event == created(SECRET)


async def test_nothing_is_appended_to_an_erased_state(log: SqliteLog) -> None:
    await begin(log, 0)
    await log.erase([state_id()], provenance=BY)
    with pytest.raises(VersionConflict):
        await log.append([append(forwarded(10), 1)], provenance=BY)
    with pytest.raises(LogUnavailable, match="no key"):
        await log.append([append(forwarded(10), 2)], provenance=BY)
    with pytest.raises(LogUnavailable, match="no key"):
        await log.begin_generation(started(), provenance=BY)
    await begin(log, 1)
    assert await verified(log) == 3


async def test_a_log_that_is_not_erasable_refuses(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await begin(log, 0)
        with pytest.raises(NotErasable):
            await log.erase([state_id()], provenance=BY)
        assert len(await log.rows()) == 1


# who else holds it


async def test_states_that_hold_what_is_to_be_erased_are_named(log: SqliteLog) -> None:
    await begin(log, 0)
    await begin(log, 1, 0)
    await begin(log, 2)
    await begin(log, 3, 2, 1)
    await begin(log, 4, 2)
    with pytest.raises(HasDescendants) as refused:
        await log.erase([state_id()], provenance=BY)
    assert refused.value.facts == {"state_id": state_id(), "descendants": ids([1, 3])}
    with pytest.raises(HasDescendants) as refused:
        await log.erase(ids([0, 1]), provenance=BY)
    assert refused.value.facts["descendants"] == ids([3])
    assert all(row.opened for row in await log.rows())
    erased = await log.erase(ids([0, 1, 3]), provenance=BY)
    assert [one.state_id for one in erased] == list(ids([0, 1, 3]))
    assert (await log.live_states(limit=9)).state_ids == ids([4, 2])


async def test_erased_descendants_stand_in_nobodys_way(log: SqliteLog) -> None:
    await begin(log, 0)
    await begin(log, 1, 0)
    await begin(log, 2, 1)
    await log.erase([state_id(2)], provenance=BY)
    with pytest.raises(HasDescendants) as refused:
        await log.erase([state_id()], provenance=BY)
    assert refused.value.facts["descendants"] == ids([1])
    await log.erase([state_id(1)], provenance=BY)
    await log.erase([state_id()], provenance=BY)


@pytest.mark.parametrize("parents", [(0,), (1, 0)])
async def test_nothing_begins_with_what_was_erased(
    log: SqliteLog, parents: tuple[int, ...]
) -> None:
    await begin(log, 0)
    await begin(log, 1)
    await log.erase([state_id()], provenance=BY)
    with pytest.raises(StateIsErased):
        await begin(log, 2, *parents)
    await begin(log, 3, 1)
    assert await log.state_ids() == list(ids([0, 1, 3]))


async def test_forks_that_are_made_at_the_same_moment_never_survive_with_the_text(
    log: SqliteLog, path: Path
) -> None:
    """Forks of forks race the erasure of all that is there, in the same batch and between."""
    chance = random.Random(5)
    await begin(log, 0)
    made, refused, rounds = [0], 0, 0

    async def fork(number: int) -> None:
        nonlocal refused
        try:
            await begin(log, number, chance.choice(made))
            made.append(number)
        except StateIsErased:
            refused += 1

    async def erase() -> None:
        nonlocal rounds
        doomed = ids([0])
        while True:
            try:
                await log.erase(doomed, provenance=BY)
                return
            except HasDescendants as found:
                rounds += 1
                doomed += found.facts["descendants"]

    numbers = iter(range(1, 10**6))
    forks = [asyncio.ensure_future(fork(next(numbers))) for _ in range(3)]
    erased = asyncio.ensure_future(erase())
    while not erased.done():
        forks = [asyncio.ensure_future(fork(next(numbers))) for _ in range(chance.randint(1, 3))]
        await (asyncio.gather(*forks) if len(made) < 40 else asyncio.wait([erased]))
    await asyncio.gather(*forks, fork(next(numbers)))
    assert rounds > 0
    assert refused > 0
    assert not any(row.opened for row in await log.rows() if row.type != "state_erased")
    assert await verified(log) == 2 * len(made)


# crashes and failures in between

CHILD = """
import asyncio, os, signal, sys
from infra.log import erasing
from infra.log.keyring import Keyring
from infra.log.sqlite_log import SqliteLog
from tests.builders import BY, append, created, state_id

def crash(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with await SqliteLog.open(sys.argv[1], erasable=True) as log:
        for number in (0, 1):
            await log.append([append(created("xylophones"), state=number)], provenance=BY)
        sys.stdout.buffer.write(b"".join(log._sealer.keyring.find([state_id()]).values()))
        sys.stdout.flush()
        {crash_at} = crash
        await log.erase([state_id()], provenance=BY)

asyncio.run(main())
"""
POINTS = {
    "before anything is recorded": "erasing.Eraser._let_go_of_what_is_beside",
    "before the keys are destroyed": "Keyring.destroy",
    "before the journal of the keys is overwritten": "Keyring._scrub",
    "before the WAL is emptied": "erasing.empty_wal",
}


def crashed(path: Path, point: str) -> bytes:
    """A log whose process was killed in the middle of an erasure; the key of the state."""
    code = CHILD.replace("{crash_at}", POINTS[point])
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, check=False, timeout=60
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(run.stdout) == 32
    return run.stdout


@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_in_between_is_finished_by_the_next_start(path: Path, point: str) -> None:
    key = await asyncio.to_thread(crashed, path, point)
    nothing = point == "before anything is recorded"
    left = holding(path, key)
    assert (
        left
        == {
            "before anything is recorded": {"log.db.keys"},
            "before the keys are destroyed": {"log.db.keys"},
            "before the journal of the keys is overwritten": {"log.db.keys-journal"},
            "before the WAL is emptied": set(),
        }[point]
    )
    async with await SqliteLog.open(path) as log:
        state = fold_rows(await log.state_rows(state_id()))
        assert isinstance(state, Erased) != nothing
        assert holding(path, key) == ({"log.db.keys"} if nothing else set())
        assert holding(path, SECRET.encode(), TOKENS.encode()) == set()
        assert path.with_name("log.db-wal").stat().st_size == 0 or nothing
        (other,) = await log.state_rows(state_id(1))
        assert decode(other).event == created(SECRET)
        assert await verified(log) == (2 if nothing else 3)
        if nothing:
            await log.erase([state_id()], provenance=BY)
        assert holding(path, key) == set()


def fails(*_: object) -> None:
    raise sqlite3.OperationalError("disk I/O error")


async def test_a_destruction_that_fails_is_not_acknowledged_and_done_later_without_any_request(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def fails_twice(keyring: Keyring, state_ids: Iterable[StateId]) -> None:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise sqlite3.OperationalError("disk I/O error")
        destroy(keyring, state_ids)

    await begin(log, 0)
    key, destroy = key_of(path), Keyring.destroy
    monkeypatch.setattr(erasing, "RETRY_S", 0.02)
    monkeypatch.setattr(Keyring, "destroy", fails_twice)
    with pytest.raises(LogUnavailable, match="could not be destroyed yet: disk I/O error"):
        await log.erase([state_id()], provenance=BY)
    await asyncio.to_thread(eventually, lambda: holding(path, key) == set())
    assert tries == 3
    assert isinstance(fold_rows(await log.state_rows(state_id())), Erased)
    await begin(log, 1)
    assert tries == 3  # nothing is left to do


async def test_appends_do_not_try_again_what_failed_just_now(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[object] = []

    def counts(*_: object) -> None:
        tries.append(0)
        fails()

    await begin(log, 0)
    monkeypatch.setattr(erasing, "RETRY_S", 1000.0)
    with monkeypatch.context() as patched:
        patched.setattr(Keyring, "destroy", counts)
        with pytest.raises(LogUnavailable, match="not be destroyed yet"):
            await log.erase([state_id()], provenance=BY)
        for number in range(1, 5):
            await begin(log, number)
        assert len(tries) == 1


async def test_what_is_erased_is_shut_while_its_key_is_still_there(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, stream = idempotency("create"), idempotency("stream")
    for number, asked in ((0, create), (1, None)):
        event = append(created(SECRET), state=number)
        await log.append([event], provenance=BY, idempotency=asked)
    await log.append([append(forwarded(10), 1)], provenance=BY)
    await log.begin_generation(started(), provenance=BY, idempotency=stream)
    key = key_of(path)
    with monkeypatch.context() as patched:
        patched.setattr(Keyring, "destroy", fails)
        with pytest.raises(LogUnavailable, match="not be destroyed yet"):
            await log.erase([state_id()], provenance=BY)
        assert holding(path, key) == {"log.db.keys"}
        assert [row.opened is None for row in await log.rows()] == [True, False, True, True]
        assert all(row.opened is None for row in await log.state_rows(state_id()))
        with pytest.raises(EventErased):
            await log.recall(create)
        with pytest.raises(LogUnavailable, match="no key"):
            await log.append([append(forwarded(10), 3)], provenance=BY)
        with pytest.raises(LogUnavailable, match="no key"):
            await log.begin_generation(started(), provenance=BY)
        assert await verified(log) == 4
    assert holding(path, key) == {"log.db.keys"}


@pytest.mark.parametrize("with_key", [True, False])
async def test_an_erasure_that_is_asked_for_again_is_acknowledged_once_the_key_is_gone(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch, with_key: bool
) -> None:
    asked = idempotency("erase") if with_key else None
    await begin(log, 0)
    key = key_of(path)
    with monkeypatch.context() as patched:
        patched.setattr(Keyring, "destroy", fails)
        for _ in range(2):
            with pytest.raises(LogUnavailable, match="not be destroyed yet"):
                await log.erase([state_id()], provenance=BY, idempotency=asked)
    assert holding(path, key) == {"log.db.keys"}
    if with_key:
        (erased,) = await log.erase([state_id()], provenance=BY, idempotency=asked)
        assert erased.event == StateErased()
    else:
        with pytest.raises(StateIsErased):
            await log.erase([state_id()], provenance=BY)
    assert holding(path, key) == set()
    assert len(await log.rows()) == 2


async def test_a_log_is_opened_though_a_destruction_fails_again_and_what_is_erased_stays_shut(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await asyncio.to_thread(crashed, path, "before the keys are destroyed")
    monkeypatch.setattr(erasing, "RETRY_S", 0.02)
    with monkeypatch.context() as patched:
        patched.setattr(Keyring, "destroy", fails)
        log = await SqliteLog.open(path)
        assert [row.opened is None for row in await log.rows()] == [True, False, True]
        assert holding(path, key) == {"log.db.keys"}
    async with log:
        await asyncio.to_thread(eventually, lambda: holding(path, key) == set())


async def test_whoever_holds_the_key_file_holds_up_nothing_that_is_there(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasing, "RETRY_S", 0.02)
    await begin(log, 0)
    await begin(log, 1)
    key = key_of(path)
    with closing(sqlite3.connect(key_file(path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LogUnavailable, match="could not be destroyed yet: database is locked"):
            await log.erase([state_id()], provenance=BY)
        await log.append([append(forwarded(10), 1, state=1)], provenance=BY)
        assert holding(path, key) == {"log.db.keys"}
        other.execute("ROLLBACK")
    await asyncio.to_thread(eventually, lambda: holding(path, key) == set())


async def test_an_end_in_good_order_tries_once_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await SqliteLog.open(path, erasable=True) as log:
        await begin(log, 0)
        key = key_of(path)
        with monkeypatch.context() as patched:
            patched.setattr(Keyring, "destroy", fails)
            with pytest.raises(LogUnavailable, match="not be destroyed yet"):
                await log.erase([state_id()], provenance=BY)
        assert holding(path, key) == {"log.db.keys"}
    assert holding(path, key) == set()


# states whose keys are gone already: a copy of the log from before their erasure


@pytest.mark.parametrize("key", ["destroyed", "never there", "another"])
async def test_a_state_that_does_not_open_is_erased_all_the_same(path: Path, key: str) -> None:
    async with await SqliteLog.open(path, erasable=True) as log:
        await begin(log, 0)
        await begin(log, 1)
    change = {
        "destroyed": "UPDATE keys SET key = zeroblob(32) WHERE state_id = ?",
        "never there": "DELETE FROM keys WHERE state_id = ?",
        "another": "UPDATE keys SET key = randomblob(32) WHERE state_id = ?",
    }[key]
    with closing(sqlite3.connect(key_file(path), isolation_level=None)) as keys:
        keys.execute(change, (state_id(),))
    async with await SqliteLog.open(path) as log:
        with pytest.raises(EventErased):
            fold_rows(await log.state_rows(state_id()))
        (erased,) = await log.erase([state_id()], provenance=BY)
        assert (erased.event, erased.version) == (StateErased(), 2)
        assert isinstance(fold_rows(await log.state_rows(state_id())), Erased)
        assert [row.opened is None for row in await log.rows()] == [True, False, True]
        assert await verified(log) == 3


async def test_an_erasure_that_could_not_be_recorded_can_be_repeated(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    await begin(log, 0)
    key = key_of(path)
    with monkeypatch.context() as patched:
        patched.setattr("infra.log.batch.extend", is_full)
        with pytest.raises(LogUnavailable, match="nothing was recorded"):
            await log.erase([state_id()], provenance=BY)
    assert holding(path, key) == {"log.db.keys"}
    assert len(await log.rows()) == 1
    await log.erase([state_id()], provenance=BY)
    assert holding(path, key) == set()


async def test_a_reader_that_holds_up_the_wal_does_not_hold_up_the_erasure(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log._writer._connection.execute("PRAGMA busy_timeout = 10")
    await begin(log, 0)
    key = key_of(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as reading:
        reading.execute("BEGIN")
        reading.execute("SELECT count(*) FROM events").fetchone()
        await log.erase([state_id()], provenance=BY)
        assert "a reader still needs it" in caplog.text
        reading.execute("COMMIT")
    assert holding(path, key, SECRET.encode()) == set()


def test_pages_of_erased_states_are_read_to_the_last(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def erase_all_but(kept: int) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Keyring, "destroy", fails)
            async with await SqliteLog.open(path, erasable=True) as log:
                await log.append([append(created(), state=n) for n in range(6)], provenance=BY)
                doomed = [n for n in range(6) if n != kept]
                with pytest.raises(LogUnavailable, match="not be destroyed yet"):
                    await log.erase(ids(doomed), provenance=BY)

    async def left() -> list[bool]:
        async with await SqliteLog.open(path) as log:
            return [bool(row.opened) for row in (await log.rows())[:6]]

    asyncio.run(erase_all_but(2))
    monkeypatch.setattr(erasing, "_AT_ONCE", 2)
    assert asyncio.run(left()) == [False, False, True, False, False, False]
