"""The keys of an erasable log: in one file, and in no file once they are destroyed."""

import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from domain.ids import StateId
from domain.log_errors import LogError
from infra.log.keyring import KEY_BYTES, Keyring, key_file, prepare
from infra.log.migrate import migrate
from infra.log.sqlite_log import SqliteLog
from tests.builders import BY, append, created, forwarded, state_id


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The database of an erasable log."""
    database = tmp_path / "log.db"
    migrate(database)
    assert prepare(database, erasable=True) is not None
    return database


def opened(path: Path, *, writable: bool = True) -> Keyring:
    log_id = prepare(path, erasable=False)
    assert log_id is not None
    return Keyring.open(path, log_id, writable=writable)


@pytest.fixture
def keyring(path: Path) -> Iterator[Keyring]:
    with closing(opened(path)) as ring:
        yield ring


def keys(count: int, first: int = 0) -> dict[StateId, bytes]:
    """Keys that are found nowhere but where they were put; ids in no order."""
    chance = random.Random(first)
    ids = [state_id(chance.getrandbits(120)) for _ in range(count)]
    return {one: chance.randbytes(KEY_BYTES) for one in ids}


def holding(path: Path, wanted: bytes) -> set[str]:
    """Names of the files beside a database that hold some bytes."""
    files = [file for file in path.parent.iterdir() if file.is_file()]
    return {file.name for file in files if wanted in file.read_bytes()}


def test_keys_come_back(path: Path, keyring: Keyring) -> None:
    some, more = keys(3), keys(2, first=3)
    keyring.add(some)
    keyring.add(more)
    assert keyring.find([*some, *more, state_id(99)]) == some | more
    assert keyring.find([]) == {}
    with closing(opened(path, writable=False)) as reading:
        assert reading.find(some) == some
        assert reading.secret == keyring.secret
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reading.add(keys(1, first=9))


def test_only_the_owner_may_read_them(path: Path, keyring: Keyring) -> None:
    keyring.add(keys(1))
    files = [file for file in path.parent.iterdir() if file.name.startswith("log.db.keys")]
    assert {file.name for file in files} == {"log.db.keys", "log.db.keys-journal"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_key_is_in_the_key_file_alone_and_in_none_once_it_was_destroyed(
    path: Path, keyring: Keyring
) -> None:
    """Many of them, so that they fill pages; added in parts and destroyed in another order."""
    there: dict[StateId, bytes] = {}
    for part in range(6):
        some = keys(70, first=part)
        keyring.add(some)
        there |= some
    for key in there.values():
        assert holding(path, key) == {"log.db.keys"}
    doomed = random.Random(7).sample(sorted(there), 200)
    for start in range(0, len(doomed), 40):
        part_of_them = doomed[start : start + 40]
        keyring.destroy(part_of_them)
        gone = [there.pop(one) for one in part_of_them]
        for key in gone:
            assert holding(path, key) == set()
    assert keyring.find(doomed) == {}
    assert keyring.find(there) == there
    for key in there.values():
        assert holding(path, key) == {"log.db.keys"}


def test_without_its_scrubbing_the_journal_would_keep_a_destroyed_key(
    path: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before: that search finds what is there to be found."""
    ((one, key),) = keys(1).items()
    keyring.add({one: key})
    with monkeypatch.context() as patched:
        patched.setattr(Keyring, "_scrub", lambda _: None)
        keyring.destroy([one])
    assert holding(path, key) == {"log.db.keys-journal"}
    with closing(opened(path)):  # as after a crash between the two
        assert holding(path, key) == set()


CHILD = """
import os, signal, sys
from pathlib import Path
from infra.log.keyring import Keyring, prepare

path = Path(sys.argv[1])
ring = Keyring.open(path, prepare(path, erasable=False), writable=True)
ring._connection.execute("PRAGMA cache_size = 1")  # changed pages are written before the commit
ring._connection.execute("BEGIN IMMEDIATE")
ring._connection.execute("UPDATE keys SET key = zeroblob(32)")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_destruction_that_was_cut_off_leaves_the_keys_and_can_be_repeated(
    path: Path, keyring: Keyring
) -> None:
    some = keys(300)
    keyring.add(some)
    one = next(iter(some))
    keyring.close()
    run = subprocess.run([sys.executable, "-c", CHILD, str(path)], check=False)
    assert run.returncode == -signal.SIGKILL
    journal = path.with_name("log.db.keys-journal").read_bytes()
    assert journal.strip(b"\0")  # it is needed: some keys are there alone
    with closing(opened(path)) as after:
        assert after.find(some) == some
        after.destroy([one])
        assert after.find(some) == {name: key for name, key in some.items() if name != one}
    assert holding(path, some[one]) == set()


def test_a_state_whose_creation_failed_gets_a_key_again(keyring: Keyring) -> None:
    first, second = keys(1), keys(1, first=1)
    one = next(iter(first))
    keyring.add(first)
    keyring.destroy([one])
    keyring.add({one: next(iter(second.values()))})
    assert list(keyring.find([one]).values()) == list(second.values())


def test_a_transaction_that_fails_changes_nothing_and_the_next_one_goes_through(
    keyring: Keyring,
) -> None:
    some = keys(2)
    one, other = some
    with pytest.raises(sqlite3.IntegrityError):
        keyring.add({one: some[one], other: b"too short"})
    assert keyring.find(some) == {}
    keyring.add(some)
    assert keyring.find(some) == some


# which logs have keys


async def test_a_log_that_is_not_erasable_has_no_keys(tmp_path: Path) -> None:
    async with await SqliteLog.open(tmp_path / "log.db") as log:
        await log.append([append(created())], provenance=BY)
        assert not log.erasable
    assert not key_file(tmp_path / "log.db").exists()


async def test_an_erasable_log_stays_so_whatever_the_setting(path: Path) -> None:
    for erasable, text in ((True, "ab"), (False, "cd"), (True, "ef")):
        async with await SqliteLog.open(path, erasable=erasable) as log:
            assert log.erasable
            await log.append([append(created(text), state=ord(text[0]))], provenance=BY)
            assert all(row.sealed and row.opened for row in await log.rows())


async def test_a_log_that_holds_texts_unsealed_is_never_made_erasable(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    async with await SqliteLog.open(path) as log:
        await log.append([append(created())], provenance=BY)
    with pytest.raises(LogError, match=r"CACHER_ERASABLE is set, but .*log\.db was not created"):
        await SqliteLog.open(path, erasable=True)
    assert not key_file(path).exists()
    async with await SqliteLog.open(path) as log:  # nothing is left locked, nothing was changed
        await log.append([append(forwarded(3), 1)], provenance=BY)
        assert not log.erasable


async def test_a_missing_key_file_is_named_and_the_start_refused(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append([append(created())], provenance=BY)
    aside = key_file(path).rename(path.with_name("aside"))
    with pytest.raises(LogError, match=r"keys is not at .*log\.db\.keys: without it nothing"):
        await SqliteLog.open(path)
    assert not key_file(path).exists()
    aside.rename(key_file(path))
    async with await SqliteLog.open(path) as log:
        assert all(row.opened for row in await log.rows())


async def test_keys_of_another_log_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "log.db"
    other.parent.mkdir()
    migrate(other)
    prepare(other, erasable=True)
    key_file(path).replace(key_file(other))
    with pytest.raises(LogError, match=r"keys in .*log\.db\.keys are not those of"):
        await SqliteLog.open(other)


async def test_a_file_that_holds_no_keys_is_refused(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append([append(created())], provenance=BY)
    key_file(path).write_bytes(b"no database" * 100)
    with pytest.raises(LogError, match=r"keys in .*log\.db\.keys cannot be read"):
        await SqliteLog.open(path)


def test_a_log_whose_making_was_cut_off_is_made_to_its_end(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    migrate(database)
    key_file(database).touch()
    log_id = prepare(database, erasable=True)
    assert log_id is not None
    with closing(Keyring.open(database, log_id)) as ring:
        assert len(ring.secret) == KEY_BYTES
