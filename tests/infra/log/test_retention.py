"""Stored logits go oldest first, within bounds, and nothing else with them."""

import asyncio
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.log_errors import LogError, LogIsLocked
from infra.log import retention
from infra.log.backup import check
from infra.log.prune import prune
from infra.log.retention import Retention
from infra.log.sqlite_log import SqliteLog
from tests.builders import append, created, forwarded, provenance
from tests.infra.log.following import verified

DAY = 86_400


def at(seconds: float) -> str:
    """A moment so long after the beginning of 2026."""
    day, rest = divmod(int(seconds), DAY)
    hours, minutes = divmod(rest // 60, 60)
    return f"2026-01-{day + 1:02d}T{hours:02d}:{minutes:02d}:00.000000Z"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


async def write(log: SqliteLog, number: int, *sizes: int, day: float = 0.0) -> int:
    """Record an event with blobs of these sizes on a day; its position."""
    blobs = tuple(b"x" * size for size in sizes)
    by = provenance(recorded_at=at(day * DAY))
    (recorded,) = await log.append([append(created(), state=number, logits=blobs)], provenance=by)
    return recorded.position


def kept(path: Path) -> dict[int, int]:
    """Positions that have logits, and their bytes."""
    sql = "SELECT position, sum(length(data)) FROM logits GROUP BY position ORDER BY position"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return dict(connection.execute(sql).fetchall())


def counted(path: Path) -> tuple[int, int]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        found: tuple[int, int] = connection.execute(
            "SELECT bytes, released_until FROM logits_kept"
        ).fetchone()
    return found


async def test_without_limits_all_are_kept_and_counted(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        for number in range(100):
            await write(log, number, 10, 20, day=number / 4)
    assert kept(path) == dict.fromkeys(range(1, 101), 30)
    assert counted(path) == (3000, 0)


async def test_the_newest_are_kept_up_to_the_limit_and_events_stay(path: Path) -> None:
    async with await SqliteLog.open(path, retention=Retention(max_bytes=100)) as log:
        for number in range(10):
            await write(log, number, 15, 15)
            assert counted(path)[0] == sum(kept(path).values()) <= 100
        assert kept(path) == {8: 30, 9: 30, 10: 30}
        assert counted(path) == (90, 7)
        assert await log.logits(7) == ()
        assert await log.logits(8) == (b"x" * 15, b"x" * 15)
        assert await log.released_until() == 7
        assert await verified(log) == 10
    assert check(path).problems == ()


async def test_what_is_too_old_goes_with_the_next_write_whatever_it_is(path: Path) -> None:
    async with await SqliteLog.open(path, retention=Retention(max_days=3)) as log:
        for day in range(6):
            await write(log, day, 10, day=day)
        assert list(kept(path)) == [3, 4, 5, 6]  # of days 2 to 5
        later = provenance(recorded_at=at(8 * DAY + 60))
        await log.append([append(forwarded(3), 1)], provenance=later)
        assert (list(kept(path)), counted(path)) == ([], (0, 6))


async def test_the_limit_that_keeps_less_holds(path: Path) -> None:
    both = Retention(max_days=3, max_bytes=20)
    async with await SqliteLog.open(path, retention=both) as log:
        for day in range(6):
            await write(log, day, 10, day=day)
        assert list(kept(path)) == [5, 6]
        await write(log, 9, 10, day=9)
        assert list(kept(path)) == [7]


# the clock


async def test_a_clock_that_is_set_back_lets_nothing_go_early(path: Path) -> None:
    async with await SqliteLog.open(path, retention=Retention(max_days=3)) as log:
        first = await write(log, 0, 10, day=20)
        behind = [await write(log, number, 10, day=1) for number in (1, 2)]
        again = await write(log, 3, 10, day=20)
        assert list(kept(path)) == [first, *behind, again]
        # They go together with the event that was recorded before them.
        await write(log, 4, 10, day=22)
        assert min(kept(path)) == first
        await write(log, 5, 10, day=23.5)
        assert counted(path)[1] == again


async def test_a_clock_that_was_ahead_keeps_what_came_after(path: Path) -> None:
    async with await SqliteLog.open(path, retention=Retention(max_days=3)) as log:
        ahead = await write(log, 0, 10, day=25)
        for number in range(1, 5):
            await write(log, number, 10, day=number)
        assert list(kept(path)) == [ahead, 2, 3, 4, 5]


# in bounds


async def test_a_lowered_limit_is_reached_bit_by_bit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP_EVENTS", 4)
    async with await SqliteLog.open(path) as log:
        for number in range(30):
            await write(log, number, 10)
    left = []
    async with await SqliteLog.open(path, retention=Retention(max_bytes=50)) as log:
        while len(left) < 3 or left[-1] > 5:
            await write(log, 30 + len(left), 10)
            left.append(len(kept(path)))
    assert left == [27, 24, 21, 18, 15, 12, 9, 6, 5]


async def test_a_step_is_bounded_in_bytes_too_and_catches_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP_BYTES", 25)
    async with await SqliteLog.open(path) as log:
        for number in range(9):
            await write(log, number, 10)
    async with await SqliteLog.open(path, retention=Retention(max_bytes=1)) as log:
        await write(log, 20, 1)
        assert list(kept(path)) == [4, 5, 6, 7, 8, 9, 10]  # 30 bytes went
        await write(log, 21, 30)
        assert list(kept(path)) == [10, 11]  # twice the 30 bytes that came


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    written=st.lists(
        st.tuples(st.integers(0, 27), st.lists(st.integers(0, 40), max_size=3)), max_size=20
    ),
    limits=st.builds(Retention, max_days=st.integers(0, 5), max_bytes=st.integers(0, 120)),
)
def test_what_is_left_is_always_the_newest_part_and_counted(
    tmp_path: Path, written: list[tuple[int, list[int]]], limits: Retention
) -> None:
    path = tmp_path / f"{next(numbers)}.db"

    async def scenario() -> None:
        events: dict[int, tuple[int, int]] = {}
        async with await SqliteLog.open(path, retention=limits) as log:
            for number, (day, sizes) in enumerate(written):
                position = await write(log, number, *sizes, day=day)
                if sizes:
                    events[position] = (day, sum(sizes))
                left, (size, until) = kept(path), counted(path)
                assert left == {p: size for p, (_, size) in events.items() if p > until}
                assert size == sum(left.values())
                if limits.max_bytes:
                    assert size <= limits.max_bytes
                oldest = min(left, default=None)
                if limits.max_days and oldest is not None:
                    assert day - events[oldest][0] <= limits.max_days
            assert await verified(log) == len(written)

    asyncio.run(scenario())


numbers = count()


# at once


async def test_prune_lets_go_of_everything_beyond_the_limits_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP_EVENTS", 4)
    async with await SqliteLog.open(path) as log:
        for day in range(20):
            await write(log, day, 10, 10, day=day)
        head = await log.head()
    assert prune(path, Retention(), at(19 * DAY)).events == 0
    found = prune(path, Retention(max_days=10), at(19 * DAY))
    assert (found.events, found.bytes) == (9, 180)
    assert list(kept(path)) == list(range(10, 21))
    found = prune(path, Retention(max_bytes=100), at(0))
    assert (found.events, found.bytes) == (6, 120)
    assert counted(path) == (100, 15)
    assert prune(path, Retention(max_bytes=100), at(0)).events == 0
    assert (check(path).head, check(path).problems) == (head, ())


async def test_prune_does_not_work_beside_a_writer(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await write(log, 0, 10)
        with pytest.raises(LogIsLocked):
            prune(path, Retention(max_bytes=1), at(0))
    assert kept(path) == {1: 10}


def test_prune_makes_no_log(path: Path) -> None:
    with pytest.raises(LogError, match="there is no log at"):
        prune(path, Retention(max_bytes=1), at(0))
    assert list(path.parent.iterdir()) == []
