"""Backups: the log at one moment, whoever writes; in place only when it is sound."""

import asyncio
import math
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from domain.log_errors import LogError, LogIsLocked
from infra.log import backup
from infra.log.backup import back_up, check
from infra.log.sqlite_log import SqliteLog
from tests.builders import BY, append, created, forwarded
from tests.end_to_end.tampering import tampering

STATES = 40
NEVER = 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder / "backup.db"


async def fill(log: SqliteLog) -> None:
    appends = [append(created("a" * 500), state=n) for n in range(STATES)]
    appends += [append(forwarded(500, "b"), 1, state=n) for n in range(STATES)]
    await log.append(appends, provenance=BY)


@pytest.fixture
def written(path: Path) -> Path:
    async def write() -> None:
        async with await SqliteLog.open(path) as log:
            await fill(log)

    asyncio.run(write())
    return path


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for sql in statements:
            connection.execute(sql)


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.endswith(".lock")}


class Busy:
    """Writes to a log in every step of a copy; ``steps`` counts them."""

    def __init__(self, log: SqliteLog, most: int) -> None:
        self.steps, self.written, self.total = 0, 0, 0
        self._log, self._most, self._loop = log, most, asyncio.get_running_loop()

    def __call__(self, done: int, total: int) -> None:
        self.steps, self.total = self.steps + 1, total
        if self.steps <= self._most:
            writing = self._log.append([append(created(), state=NEVER + self.steps)], provenance=BY)
            asyncio.run_coroutine_threadsafe(writing, self._loop).result()
            self.written += 1


async def test_a_copy_is_the_log_at_one_moment_while_it_is_written(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "PAGES", 8)
    async with await SqliteLog.open(path) as log:
        await fill(log)
        head = await log.head()
        busy = Busy(log, most=10**9)
        checked = await asyncio.to_thread(back_up, path, target, progress=busy)
        assert busy.written == busy.steps == math.ceil(busy.total / 8) > 1
        assert (checked.head, checked.events, checked.problems) == (head, 2 * STATES, ())
        assert (await log.head()).position == head.position + busy.written
    assert check(target) == checked


async def test_without_its_transaction_the_copy_would_begin_anew_with_every_write(
    path: Path, target: Path
) -> None:
    """The control of the test above: these writes do disturb a copy in steps."""
    async with await SqliteLog.open(path) as log:
        await fill(log)
        busy = Busy(log, most=30)

        def copy() -> None:
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as to:
                source.backup(to, pages=8, progress=lambda _, left, all_: busy(all_ - left, all_))

        await asyncio.to_thread(copy)
    assert busy.steps >= 30 + math.ceil(busy.total / 8) - 1


async def test_a_backup_opens_as_a_log_that_goes_on(written: Path, target: Path) -> None:
    head = back_up(written, target).head
    assert files(target.parent) == {"backup.db"}
    async with await SqliteLog.open(target) as restored:
        assert await restored.head() == head
        await restored.append([append(forwarded(501, "c"), 2)], provenance=BY)
    assert check(target).events == 2 * STATES + 1


async def test_an_empty_log_has_a_backup(path: Path, target: Path) -> None:
    async with await SqliteLog.open(path) as log:
        genesis = await log.genesis()
    checked = back_up(path, target)
    assert (checked.head, checked.events, checked.states) == (genesis, 0, 0)


UNSOUND: dict[str, tuple[tuple[str, ...], str, int]] = {
    "a payload": (
        ("UPDATE events SET payload = replace(payload, 'b', 'B') WHERE position = 60",),
        "position 60: a column was changed",
        59,
    ),
    "a hash": (
        ("UPDATE events SET hash = zeroblob(32) WHERE position = 7",),
        "position 7: a column was changed",
        6,
    ),
    "a row that was removed": (
        ("DELETE FROM events WHERE position = 9",),
        "position 10: does not follow position 8",
        8,
    ),
    "a state that is hidden": (
        ("DELETE FROM states WHERE created_position = 3",),
        "the list of states is not that of the events",
        80,
    ),
    "a state that stands elsewhere": (
        ("UPDATE states SET version = 3 WHERE created_position = 3",),
        "the list of states is not that of the events",
        80,
    ),
    "an index": (
        (
            "PRAGMA writable_schema = ON",
            "DELETE FROM sqlite_schema WHERE name = 'events_by_state'",
        ),
        "integrity_check: ",
        80,
    ),
}


@pytest.mark.parametrize("fault", UNSOUND)
def test_what_is_not_sound_takes_no_place(written: Path, target: Path, fault: str) -> None:
    statements, problem, reached = UNSOUND[fault]
    sound = back_up(written, target)
    before = target.read_bytes()
    change(written, *statements)
    found = back_up(written, target, replace=True)
    assert any(problem in one for one in found.problems)
    assert found.head.position == reached
    assert found.problems == check(written).problems
    assert (target.read_bytes(), check(target)) == (before, sound)
    assert files(target.parent) == {"backup.db"}


def test_a_version_that_is_missing_is_found_behind_a_chain_that_holds(
    written: Path, target: Path
) -> None:
    with tampering(written, target, rehash=True) as connection:
        connection.execute("DELETE FROM events WHERE position = 5")  # a state's creation
    (problem,) = check(target).problems
    assert "version 2 of state-" in problem
    assert problem.endswith("comes after 0")


def flip_page(path: Path, page: int) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * (page - 1) : 4096 * (page - 1) + 8] = b"\xff" * 8
    path.write_bytes(data)


def test_a_page_that_is_broken_is_found_wherever_it_is(written: Path, target: Path) -> None:
    back_up(written, target)
    whole = target.read_bytes()
    with closing(sqlite3.connect(target)) as connection:
        sql = "SELECT pageno FROM dbstat WHERE name NOT LIKE 'sqlite%' AND pagetype != 'overflow'"
        pages = [page for (page,) in connection.execute(sql)]
    assert len(pages) > 10
    for page in pages:
        flip_page(target, page)
        try:
            assert check(target).problems, page
        except LogError as error:
            assert "cannot be read as a log" in str(error)  # noqa: PT017 - either way it is found
        target.write_bytes(whole)
    assert check(target).problems == ()


# what is there already


def test_a_file_that_is_there_is_replaced_only_if_that_is_meant(
    written: Path, target: Path
) -> None:
    target.write_bytes(b"something dear")
    with pytest.raises(LogError, match="is there already; --force replaces it"):
        back_up(written, target)
    assert target.read_bytes() == b"something dear"
    assert back_up(written, target, replace=True).problems == ()
    assert check(target).events == 2 * STATES


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_what_lies_beside_from_another_database_is_not_taken_for_a_part(
    written: Path, target: Path, suffix: str
) -> None:
    beside = Path(f"{target}{suffix}")
    beside.write_bytes(b"from another database")
    with pytest.raises(LogError, match=f"{suffix} is there already"):
        back_up(written, target)
    back_up(written, target, replace=True)
    assert not beside.exists()


def test_the_log_itself_is_no_place_for_its_backup(written: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(written)
    for name in (written, link):
        with pytest.raises(LogError, match="is the log itself"):
            back_up(written, name, replace=True)
    assert check(written).problems == ()


async def test_a_log_in_use_is_not_replaced(written: Path, target: Path) -> None:
    async with await SqliteLog.open(target) as used:
        with pytest.raises(LogIsLocked):
            back_up(written, target, replace=True)
        await used.append([append(created())], provenance=BY)


# what fails


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """No file may grow beyond so many bytes; undone at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_copy_that_finds_no_room_leaves_what_was_there(
    written: Path, target: Path, full_disk: Callable[[int], None]
) -> None:
    target.write_bytes(b"the backup of yesterday")
    full_disk(written.stat().st_size // 2)
    with pytest.raises(LogError, match="could not be copied"):
        back_up(written, target, replace=True)
    assert target.read_bytes() == b"the backup of yesterday"
    assert files(target.parent) == {"backup.db"}


def test_a_copy_that_was_cut_off_is_no_obstacle(written: Path, target: Path) -> None:
    Path(f"{target}.partial").write_bytes(b"half a database")
    assert back_up(written, target).problems == ()
    assert files(target.parent) == {"backup.db"}


def test_a_folder_that_is_not_there_is_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="there is no folder"):
        back_up(written, tmp_path / "none" / "backup.db")
    assert not (tmp_path / "none").exists()


def test_a_log_that_is_not_there_makes_no_file(path: Path, target: Path) -> None:
    with pytest.raises(LogError, match="there is no log at"):
        back_up(path, target)
    assert files(target.parent) == set()
