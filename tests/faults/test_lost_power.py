"""The power is cut at every moment: what was acknowledged is there, and nothing is half there."""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from domain.chain import Row
from domain.errors import LogUnavailable
from domain.events import Recorded
from domain.log_errors import LogError
from infra.log.sqlite_log import SqliteLog
from tests.builders import append, created, idempotency, provenance
from tests.faults.histories import check_calls, checkpoint_every, record, rows_of
from tests.faults.power import Disk
from tests.faults.vfs import Operation, Proceed, needs_vfs, watched, without_syncs
from tests.faults.whole import check_whole

pytestmark = needs_vfs

CHECKPOINT_PAGES: Final = 25
"""A checkpoint in every second transaction or so."""
SEEDS: Final = range(50) if os.environ.get("SOAK") == "1" else range(1)


class Watched(NamedTuple):
    """What was done to the disk while a history was made, and what was known when.

    ``acknowledged[n]`` are the rows acknowledged before operation ``n``.
    """

    operations: list[Operation]
    acknowledged: list[tuple[Row, ...]]
    rows: list[Row]


async def written(path: Path, synchronous: str) -> Watched:
    """Make the history on a disk that is watched."""
    operations: list[Operation] = []
    acknowledged: list[tuple[Row, ...]] = []
    newest: tuple[Row, ...] = ()

    def note(operation: Operation, proceed: Proceed) -> int:
        code = without_syncs(operation, proceed)
        assert code == 0
        operations.append(operation)
        acknowledged.append(newest)
        return code

    def acknowledge(events: Sequence[Recorded]) -> None:
        nonlocal newest
        newest += tuple(event.row for event in events)

    with watched(note):
        async with await SqliteLog.open(path) as log:
            checkpoint_every(log, CHECKPOINT_PAGES)
            log._writer._connection.execute(f"PRAGMA synchronous = {synchronous}")
            await record(log, acknowledge)
    return Watched(operations, acknowledged, await rows_of(path))


def cuts(found: Watched, seed: int) -> Iterator[tuple[dict[str, bytes], tuple[Row, ...]]]:
    """The disk after a cut behind each operation, and what had been acknowledged by then."""
    disk, chance = Disk(), random.Random(seed)
    for operation, acknowledged in zip(found.operations, found.acknowledged, strict=True):
        disk.follow(operation)
        yield disk.lose_power(chance), acknowledged


def restored(images: dict[str, bytes], folder: Path) -> Path:
    """What was left, in a folder of its own."""
    folder.mkdir()
    for path, content in images.items():
        (folder / Path(path).name).write_bytes(content)
    return folder / "log.db"


async def reopened(path: Path) -> list[Row]:
    """What the log holds when it is opened again; it can be written to, and is whole."""
    by, once = provenance(request_id="after"), idempotency("after")
    with watched(without_syncs):
        async with await SqliteLog.open(path, connections=1) as log:
            rows = await log.rows()
            await log.append([append(created(), state=99)], provenance=by, idempotency=once)
    assert check_whole(path).position == len(rows) + 1
    return rows


async def test_the_followed_disk_holds_what_the_real_one_holds(tmp_path: Path) -> None:
    found, disk = await written(tmp_path / "log.db", "FULL"), Disk()
    for operation in found.operations:
        disk.follow(operation)
    assert disk.keep_power() == {str(tmp_path / "log.db"): (tmp_path / "log.db").read_bytes()}
    kinds = {(one.kind, Path(one.path).name) for one in found.operations}
    assert {("sync", "log.db-wal"), ("sync", "log.db"), ("delete", "log.db-wal")} <= kinds


@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_acknowledged_is_lost_wherever_the_power_is_cut(
    seed: int, tmp_path: Path
) -> None:
    found = await written(tmp_path / "log.db", "FULL")
    more = set()
    for number, (images, acknowledged) in enumerate(cuts(found, seed)):
        rows = await reopened(restored(images, tmp_path / str(number)))
        check_calls(rows, acknowledged)
        assert rows == found.rows[: len(rows)]
        more.add(len(rows) > len(acknowledged))
    assert set(found.acknowledged[-1]) == set(found.rows)
    assert more == {True, False}  # what was not acknowledged is there after some cuts only


async def test_without_syncs_acknowledged_events_are_lost(tmp_path: Path) -> None:
    found = await written(tmp_path / "log.db", "OFF")
    for number, (images, acknowledged) in enumerate(cuts(found, seed=1)):
        path = restored(images, tmp_path / str(number))
        with suppress(LogError, LogUnavailable), watched(without_syncs):
            if not set(acknowledged) <= set(await rows_of(path)):
                return
    pytest.fail("nothing was lost")
