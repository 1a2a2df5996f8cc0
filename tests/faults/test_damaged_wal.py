"""A WAL that was cut or had a byte changed: what opens is a beginning of the history."""

import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from domain.chain import Row
from domain.log_errors import LogError
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from tests.faults.histories import ROUNDS, check_calls, checkpoint_every, record, rows_of
from tests.faults.vfs import needs_vfs, watched, without_syncs
from tests.faults.whole import check_whole

pytestmark = needs_vfs

HEADER: Final = 32
"""Bytes before the first frame (https://sqlite.org/fileformat2.html#walformat)."""
FRAME_HEADER: Final = 24
"""Page number, size after commit, two salts, two checksums."""
FRAME: Final = FRAME_HEADER + 4096

ROUNDS_MADE: Final = len(ROUNDS) if os.environ.get("SOAK") == "1" else 3
CHECKPOINT_PAGES: Final = 20

MOMENTS: Final = {
    "nothing moved": (0, "SELECT 1"),
    "all moved": (0, "PRAGMA wal_checkpoint(PASSIVE)"),
    "begun anew": (CHECKPOINT_PAGES, "SELECT 1"),
}
"""What had been moved from the WAL by then: pages between checkpoints, and a last word."""


class Copied(NamedTuple):
    """A log as it lay on the disk beside its running writer, and what it held."""

    database: Path
    wal: bytes
    rows: list[Row]


async def copied(moment: str, folder: Path) -> Copied:
    """Make the history and copy its files before the log is closed."""
    pages, last = MOMENTS[moment]
    database, copy = folder / "log.db", folder / "copy.db"
    with watched(without_syncs):
        async with await SqliteLog.open(database) as log:
            checkpoint_every(log, pages)
            await record(log, rounds=ROUNDS_MADE)
            log._writer._connection.execute(last).fetchall()
            shutil.copy(database, copy)
            wal = (folder / "log.db-wal").read_bytes()
            return Copied(copy, wal, await log.rows())


def damaged(wal: bytes) -> Iterator[bytes]:
    """The WAL cut, and with a byte changed, around every boundary; changed all over headers."""
    places = {boundary + by for boundary in range(HEADER, len(wal), FRAME) for by in (-1, 0, 1)}
    for place in sorted(places):
        yield wal[:place]
    for place in sorted(places | set(range(HEADER + FRAME_HEADER))):
        yield wal[:place] + bytes([wal[place] ^ 1]) + wal[place + 1 :]


async def opened(found: Copied, wal: bytes, path: Path) -> list[Row] | None:
    """What a log with this WAL holds; null if it is refused, and then left as it was."""
    path.parent.mkdir()
    shutil.copy(found.database, path)
    beside = path.with_name("log.db-wal")
    beside.write_bytes(wal)
    with watched(without_syncs):
        try:
            return await rows_of(path)
        except LogError as error:
            refused = str(error)
    assert "cut, damaged or copied at another moment" in refused
    assert filecmp.cmp(path, found.database, shallow=False)
    assert beside.read_bytes() == wal
    return None


@pytest.mark.parametrize("moment", MOMENTS)
async def test_what_opens_with_a_damaged_wal_is_a_beginning_of_the_history(
    moment: str, tmp_path: Path
) -> None:
    found = await copied(moment, tmp_path)
    opens, shorter, refused = 0, 0, 0
    for number, wal in enumerate(damaged(found.wal)):
        path = tmp_path / str(number) / "log.db"
        rows = await opened(found, wal, path)
        if rows is None:
            refused += 1
            continue
        check_calls(rows)
        assert rows == found.rows[: len(rows)]
        assert check_whole(path).position == len(rows)
        opens, shorter = opens + 1, shorter + (len(rows) < len(found.rows))
    assert opens > 0
    assert (shorter > 0, refused > 0) == ((moment != "all moved"), (moment == "all moved"))


async def test_an_undamaged_wal_opens_with_everything(tmp_path: Path) -> None:
    for moment in MOMENTS:
        (tmp_path / moment).mkdir()
        found = await copied(moment, tmp_path / moment)
        assert await opened(found, found.wal, tmp_path / moment / "again" / "log.db") == found.rows


async def test_a_reader_refuses_a_wal_that_does_not_belong_to_its_database(tmp_path: Path) -> None:
    found = await copied("all moved", tmp_path)
    shutil.copy(found.database, tmp_path / "read.db")
    (tmp_path / "read.db-wal").write_bytes(found.wal[: HEADER + 20 * FRAME])
    with pytest.raises(LogError, match=r"read\.db and read\.db-wal do not belong together"):
        await SqliteReader.open(tmp_path / "read.db")
