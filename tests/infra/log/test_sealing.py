"""What an erasable log stores can be read with the key of its state, and in no other way."""

import asyncio
import base64
import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.chain import Head, Row, follow, row_hash
from domain.errors import IdempotencyKeyReused, LogUnavailable, VersionConflict
from domain.events import decode, encode
from domain.log_errors import EventErased
from infra.log import sealing
from infra.log.keyring import KEY_BYTES, Keyring, key_file
from infra.log.sealing import Places, seal, seal_text, unseal, unseal_text
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.builders import (
    BY,
    append,
    created,
    forwarded,
    idempotency,
    row,
    started,
    state_id,
)
from tests.infra.log.following import verified

SECRET = "xylophones"  # in no id, name or type


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[SqliteLog]:
    async with await SqliteLog.open(path, erasable=True) as opened:
        yield opened


# one record

keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)


@given(keys, st.binary(max_size=200), st.binary(max_size=20))
def test_what_was_sealed_is_opened_with_its_key_in_its_place(
    key: bytes, plain: bytes, place: bytes
) -> None:
    assert unseal(key, seal(key, plain, place), place) == plain


@given(keys, st.text(max_size=40), st.binary(max_size=20))
def test_a_sealed_text_is_json_that_says_so(key: bytes, plain: str, place: bytes) -> None:
    sealed = seal_text(key, plain, place)
    (ciphertext,) = json.loads(sealed).values()
    assert row(created(), payload=sealed).sealed
    assert len(base64.b64decode(ciphertext, validate=True)) == 12 + len(plain.encode()) + 16
    assert unseal_text(key, sealed, place) == plain


@given(keys, st.binary(min_size=1, max_size=40), st.data())
def test_any_changed_bit_is_noticed(key: bytes, plain: bytes, data: st.DataObject) -> None:
    sealed = bytearray(seal(key, plain, b"here"))
    at = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[at // 8] ^= 1 << at % 8
    assert unseal(key, bytes(sealed), b"here") is None


@given(keys, keys, st.binary(max_size=9), st.integers(0, 30))
def test_another_key_another_place_or_a_part_opens_nothing(
    key: bytes, other: bytes, plain: bytes, count: int
) -> None:
    sealed = seal(key, plain, b"here")
    assert unseal(key, sealed, b"there") is None
    assert unseal(None, sealed, b"here") is None
    assert unseal(key, sealed[: min(count, len(sealed) - 1)], b"here") is None
    if other != key:
        assert unseal(other, sealed, b"here") is None


@pytest.mark.parametrize(
    "stored", ["", "{}", '{"sealed":1}', '{"sealed":"?"}', '{"sealed":"AAAA"}', '{"sealed":"AA"}']
)
def test_what_was_never_sealed_is_not_opened(stored: str) -> None:
    assert unseal_text(bytes(KEY_BYTES), stored, b"here") is None


def test_the_same_text_is_never_sealed_alike() -> None:
    assert len({seal_text(bytes(KEY_BYTES), "the same", b"here") for _ in range(50)}) == 50


def test_every_place_is_its_own() -> None:
    one, two = Places("a log"), Places("another log")
    event = row(created())
    changes = [{"version": 2}, {"at_version": 1}, {"type": "x"}, {"state_id": state_id(1)}]
    places = [
        *(where.event(event) for where in (one, two)),
        *(one.event(msgspec.structs.replace(event, **change)) for change in changes),
        *(
            where.blob(state_id(), version, step)
            for where in (one, two)
            for version in (1, 2)
            for step in (0, 1)
        ),
        *(one.blob(state_id(1), 1, 0),),
        *(one.intent(state_id(n), version) for n in (0, 1) for version in (1, 2)),
    ]
    assert len(set(places)) == len(places)


def test_what_was_sealed_long_ago_is_still_opened() -> None:
    stored = '{"sealed":"AAECAwQFBgcICQoLJsFneT4IkdliOEjnuP6A0H3aj04="}'
    place = Places("a log").event(row(created()))
    wanted = (
        '["cacher-api3 sealed 1","a log","event","state-00000000000000000000000000000000",'
        '1,null,"state_created"]'
    )
    assert place.decode() == wanted
    assert unseal_text(bytes(range(KEY_BYTES)), stored, place) == "añb"


# a whole log


async def fill(log: SqliteLog) -> None:
    """Every kind of thing that is stored, all with the secret in it."""
    await log.append([append(created(SECRET))], provenance=BY, idempotency=KEY)
    blobs = (SECRET.encode(), b"more of " + SECRET.encode())
    await log.append([append(forwarded(len(SECRET), SECRET), 1, logits=blobs)], provenance=BY)
    stop = msgspec.structs.replace(started().parameters, stop_sequences=(SECRET,))
    intent = msgspec.structs.replace(started(base_version=2), parameters=stop)
    await log.begin_generation(intent, provenance=BY, idempotency=STREAM)


BODY = f'{{"text":"{SECRET}"}}'.encode()
KEY = idempotency(body=BODY)
STREAM = idempotency("stream", body=BODY)
TOKENS = ",".join(str(ord(letter)) for letter in SECRET)
TRACES = {
    "text": SECRET.encode(),
    "tokens": TOKENS.encode(),
    **{
        f"base64 of the text, shifted by {shift}": base64.b64encode(
            bytes(shift) + SECRET.encode() + bytes(2 - shift)
        )[4:-4]
        for shift in range(3)
    },
    "digest of the body": hashlib.sha256(BODY).digest(),
}


def traces(path: Path) -> dict[str, set[str]]:
    """Which files of a log hold which trace of the secret."""
    files = [file for file in path.parent.iterdir() if file.is_file()]
    found = {
        name: {file.name for file in files if wanted in file.read_bytes()}
        for name, wanted in TRACES.items()
    }
    return {name: where for name, where in found.items() if where}


@pytest.mark.parametrize("closed", [False, True])
async def test_no_file_of_an_erasable_log_holds_what_its_states_hold(
    path: Path, closed: bool
) -> None:
    async with await SqliteLog.open(path, erasable=True) as log:
        await fill(log)
        if not closed:
            assert traces(path) == {}
    assert traces(path) == {}


async def test_the_files_of_a_log_that_is_not_erasable_do(path: Path) -> None:
    """The control of the test before: the same search finds all that it looks for."""
    async with await SqliteLog.open(path) as log:
        await fill(log)
    found = traces(path)
    assert found.keys() == {"text", "tokens", "digest of the body"}
    assert set.union(*found.values()) == {"log.db"}


async def test_what_was_stored_sealed_is_read_as_it_was(path: Path) -> None:
    async with await SqliteLog.open(path, erasable=True) as log:
        await fill(log)
    async with await SqliteLog.open(path) as log:
        rows = await log.rows()
        assert [one.sealed for one in rows] == [True, True]
        events = [created(SECRET), forwarded(len(SECRET), SECRET)]
        assert [decode(one).event for one in rows] == events
        assert [one.opened for one in rows] == list(map(encode, events))
        assert await log.state_rows(state_id()) == rows
        assert await log.newest(state_id()) == rows[1]
        assert await log.page(after=0, limit=9, max_bytes=10**6) == rows
        assert await log.page(after=0, limit=9, max_bytes=10**6, state_id=state_id()) == rows
        assert await log.logits(2) == (SECRET.encode(), b"more of " + SECRET.encode())
        assert SECRET.encode() not in b"".join(await log.stored_logits(2))
        remembered = await log.recall(KEY)
        assert remembered is not None
        assert remembered.request_digest == KEY.request_digest
        assert [one.event for one in remembered.events] == events[:1]
        begun = await log.begun_generation(STREAM)
        assert begun is not None
        assert begun.parameters.stop_sequences == (SECRET,)
        assert await verified(log) == 2


async def test_what_append_returns_is_what_is_read(log: SqliteLog) -> None:
    (first,) = await log.append([append(created())], provenance=BY)
    (second,) = await log.append([append(forwarded(3), 1)], provenance=BY)
    assert [decode(one) for one in await log.rows()] == [first, second]


async def test_a_key_is_known_by_its_body_alone(log: SqliteLog) -> None:
    first = await log.append([append(created())], provenance=BY, idempotency=KEY)
    again = await log.append([append(created(), state=1)], provenance=BY, idempotency=KEY)
    assert again == first
    other = idempotency(body=b"another body")
    with pytest.raises(IdempotencyKeyReused):
        await log.append([append(created(), state=2)], provenance=BY, idempotency=other)
    remembered = await log.recall(other)
    assert remembered is not None
    assert remembered.request_digest != other.request_digest
    await log.begin_generation(started(), provenance=BY, idempotency=STREAM)
    with pytest.raises(IdempotencyKeyReused):
        await log.begun_generation(idempotency("stream", body=b"another body"))


async def test_digests_of_two_logs_do_not_match(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.db"
        async with await SqliteLog.open(path, erasable=True) as log:
            await fill(log)
        with closing(sqlite3.connect(path)) as connection:
            digests += connection.execute(
                "SELECT request_digest FROM idempotency_keys"
                " UNION ALL SELECT request_digest FROM generations_started"
            ).fetchall()
    assert digests[0] == digests[1] != digests[2] == digests[3]


async def test_a_reader_without_the_keys_follows_the_chain_and_reads_nothing(path: Path) -> None:
    async with await SqliteLog.open(path, erasable=True) as log:
        await fill(log)
    key_file(path).rename(path.with_name("aside"))
    async with await SqliteReader.open(path) as reader:
        rows = await reader.rows()
        assert await verified(reader) == 2
        assert [one.opened for one in rows] == [None, None]
        with pytest.raises(EventErased):
            decode(rows[0])


async def test_a_payload_that_was_put_in_another_place_does_not_open(path: Path) -> None:
    """Not even with the chain hashed again behind it."""
    async with await SqliteLog.open(path, erasable=True) as log:
        await log.append([append(created())], provenance=BY)
        for version in (1, 2):
            await log.append([append(forwarded(2 + version), version)], provenance=BY)
        genesis = await log.genesis()
        second, third = (await log.rows())[1:]
    with closing(sqlite3.connect(path)) as connection, connection:
        for one, other in ((second, third), (third, second)):
            put = "UPDATE events SET payload = ? WHERE position = ?"
            connection.execute(put, (other.payload, one.position))
    async with await SqliteReader.open(path) as reader:
        rows = await reader.rows()
        assert [bool(one.opened) for one in rows] == [True, False, False]
        chained(rows, genesis)


def chained(rows: list[Row], head: Head) -> None:
    """A chain can be made of any rows: it is no proof of what a payload holds."""
    for one in rows:
        again = msgspec.structs.replace(one, previous_hash=head.hash)
        again = msgspec.structs.replace(again, hash=row_hash(again))
        head = follow(head, again)


# keys before what they seal


async def test_keys_are_kept_in_one_transaction_for_each_batch_that_begins_states(
    log: SqliteLog,
) -> None:
    commits: list[str] = []
    ring = log._sealer.keyring  # type: ignore[attr-defined]
    ring._connection.set_trace_callback(commits.append)
    await log.append([append(created(), state=n) for n in range(20)], provenance=BY)
    assert commits.count("COMMIT") == 1
    await log.append([append(forwarded(3), 1, state=n) for n in range(20)], provenance=BY)
    assert commits.count("COMMIT") == 1
    waiting = [log.append([append(created(), state=n)], provenance=BY) for n in range(20, 60)]
    await asyncio.gather(*waiting)
    assert 2 <= commits.count("COMMIT") < 40
    assert sum(sql.startswith("\nINSERT") for sql in commits) == 60


async def test_a_key_that_could_not_be_kept_seals_nothing(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Keyring, "add", full)
        with pytest.raises(LogUnavailable, match="disk is full"):
            await log.append([append(created())], provenance=BY)
    assert await log.rows() == []
    await log.append([append(created())], provenance=BY)
    await log.append([append(forwarded(3), 1)], provenance=BY)
    async with await SqliteReader.open(path) as reader:
        assert all(one.opened for one in await reader.rows())


async def test_a_key_whose_events_could_not_be_kept_seals_what_comes_instead(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr("infra.log.batch.extend", fails)
        with pytest.raises(LogUnavailable):
            await log.append([append(created("abc"))], provenance=BY)
    await log.append([append(created("xyz"))], provenance=BY)
    async with await SqliteReader.open(path) as reader:
        assert [decode(one).event for one in await reader.rows()] == [created("xyz")]


async def test_a_refused_creation_leaves_the_key_of_the_state_that_is_there(
    log: SqliteLog,
) -> None:
    await log.append([append(created())], provenance=BY)
    with pytest.raises(VersionConflict):
        await log.append([append(created("xyz"))], provenance=BY)
    assert [decode(one).event for one in await log.rows()] == [created()]


CHILD = """
import asyncio, sys
from infra.log.sqlite_log import SqliteLog
from tests.builders import BY, append, created

async def main():
    async with await SqliteLog.open(sys.argv[1], erasable=True) as log:
        async def begin(writer):
            for number in range(10**6):
                await log.append([append(created(), state=8 * number + writer)], provenance=BY)
                print(number, flush=True)
        await asyncio.gather(*map(begin, range(8)))

asyncio.run(main())
"""


def kill_after(path: Path, acknowledgements: int) -> None:
    """Kill a process that begins states one after another."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for _ in range(acknowledgements):
        assert child.stdout.readline()
    child.kill()
    child.communicate()


async def test_a_crash_never_leaves_an_event_without_its_key(path: Path) -> None:
    await asyncio.to_thread(kill_after, path, 100)
    async with await SqliteLog.open(path) as log:
        rows = await log.rows()
        assert len(rows) >= 100
        assert all(one.opened for one in rows)
        assert await verified(log) == len(rows)


async def test_a_log_that_is_not_erasable_seals_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it take the time for it: nothing of the cipher is called."""

    def called(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(sealing, "AESGCM", called)
    async with await SqliteLog.open(path) as log:
        await fill(log)
        assert not any(one.sealed for one in await log.rows())
        assert await log.logits(2) == (SECRET.encode(), b"more of " + SECRET.encode())
