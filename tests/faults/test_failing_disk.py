"""A disk that is full or broken: nothing is acknowledged that was not committed, and it passes.

The disk fails at the n-th write (sync, truncation), for growing n until none fails. SQLite rolls
back a transaction whose ``COMMIT`` fails: nobody sees it, and the next one takes its place in the
WAL. Only if the process ends before that may it be there after all, wholly: where it was written
but not synced.
"""

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from domain.chain import Head, Row
from domain.errors import LogUnavailable
from domain.events import Recorded
from domain.log_errors import LogError
from infra.log.sqlite_log import SqliteLog
from tests.faults.failing import FAILURES, FailingDisk
from tests.faults.histories import ROUNDS, check_calls, checkpoint_every, record, rows_of
from tests.faults.vfs import Operation, Proceed, needs_vfs, watched, without_syncs
from tests.faults.whole import check_whole

pytestmark = needs_vfs

SOAK: Final = os.environ.get("SOAK") == "1"
ROUNDS_MADE: Final = len(ROUNDS) if SOAK else 3
CHECKPOINT_PAGES: Final = 20
NOTICED_BY_NOBODY: Final = {"a truncation that fails once"}
"""Only checkpoints truncate: what they could not do, the next one does."""


@pytest.fixture
async def empty(tmp_path: Path) -> Path:
    """A log that has nothing in it yet, but its tables."""
    async with await SqliteLog.open(tmp_path / "empty.db"):
        return tmp_path / "empty.db"


class Trial:
    """The history, made on a disk that fails; whatever is refused is sent again."""

    def __init__(self, path: Path, disk: FailingDisk) -> None:
        self._path = path
        self._disk = disk
        self._armed = False
        self._at_work = threading.Lock()
        self.acknowledged: list[Row] = []
        self.refused = 0

    async def run(self) -> None:
        """Make it and hold it against what was acknowledged, also after it is closed."""
        with watched(self._do):
            async with await SqliteLog.open(self._path, connections=1) as self._log:
                checkpoint_every(self._log, CHECKPOINT_PAGES)
                self._armed = True
                await record(self._log, self._acknowledge, self._refuse, ROUNDS_MADE)
                self._disk.repair()
                assert set(await self._log.rows()) == set(self.acknowledged)
        newest = max(self.acknowledged, key=lambda row: row.position)
        assert check_whole(self._path) == Head(newest.position, newest.hash)

    def _do(self, operation: Operation, proceed: Proceed) -> int:
        with self._at_work:
            return (
                self._disk(operation, proceed) if self._armed else without_syncs(operation, proceed)
            )

    def _acknowledge(self, events: Sequence[Recorded]) -> None:
        self.acknowledged += [event.row for event in events]

    async def _refuse(self, key: str, error: LogUnavailable) -> None:
        """Nothing of it is there, and all else is; after a crash it might be, but wholly."""
        self.refused += 1
        acknowledged = tuple(self.acknowledged)
        assert "nothing was recorded" in str(error)
        rows, after_a_crash = await self._log.rows(), await rows_of(self._as_it_lies())
        assert key not in {row.request_id for row in rows}
        check_calls(rows, acknowledged)
        check_calls(after_a_crash, acknowledged)
        self._disk.repair()

    def _as_it_lies(self) -> Path:
        """A copy of what is on the disk between two operations."""
        folder = Path(tempfile.mkdtemp(dir=self._path.parent))
        with self._at_work:
            for name in (self._path.name, f"{self._path.name}-wal"):
                shutil.copy(self._path.parent / name, folder / name)
        return folder / self._path.name


@pytest.mark.parametrize("name", FAILURES)
async def test_a_log_outlives_a_disk_that_fails_at_any_moment(
    name: str, empty: Path, tmp_path: Path
) -> None:
    refused = failed = 0
    for at in itertools.count(1):
        path = tmp_path / str(at) / "log.db"
        path.parent.mkdir()
        shutil.copy(empty, path)
        disk = FailingDisk(FAILURES[name], at)
        trial = Trial(path, disk)
        await trial.run()
        refused, failed = refused + trial.refused, failed + bool(disk.failed)
        if not disk.failed:
            break
    assert failed == at - 1 >= 3
    assert bool(refused) == (name not in NOTICED_BY_NOBODY)


@pytest.mark.parametrize("name", ["full", "syncs that fail"])
async def test_a_log_that_could_not_be_made_is_made_once_the_disk_works(
    name: str, tmp_path: Path
) -> None:
    refused = 0
    for at in itertools.count(1):
        path, disk = tmp_path / f"{at}.db", FailingDisk(FAILURES[name], at)
        with watched(disk):
            try:
                assert await rows_of(path) == []
            except LogError:
                refused += 1
        with watched(without_syncs):
            async with await SqliteLog.open(path) as log:
                await record(log, rounds=1)
        assert check_whole(path).position == 1
        if not disk.failed:
            break
    assert refused > 3
