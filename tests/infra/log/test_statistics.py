"""The figures of a log, held against the log."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from domain.events import StateDeleted
from domain.log_errors import LogError
from infra.log import statistics as module
from infra.log.migrate import carried, migrate
from infra.log.retention import Retention
from infra.log.sqlite_log import SqliteLog
from infra.log.statistics import statistics
from tests.builders import BY, FINGERPRINT, append, created, forwarded, provenance, state_id

LATER = provenance(recorded_at="2026-02-03T04:05:06.000007Z")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def size(file: Path | str) -> int:
    return Path(file).stat().st_size


async def fill(log: SqliteLog, states: int) -> None:
    """As many states; each is forwarded once with logits, every tenth is deleted."""
    await log.append([append(created(), state=n) for n in range(states)], provenance=BY)
    held = {"fingerprint": FINGERPRINT, "logits": (b"x" * 70, b"y" * 30)}
    await log.append(
        [append(forwarded(3), 1, state=n, **held) for n in range(states)], provenance=BY
    )
    gone = [append(StateDeleted(), 2, state=n) for n in range(0, states, 10)]
    await log.append(gone, provenance=LATER)


async def test_the_figures_of_a_short_log_are_exact(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await fill(log, 50)
        head = await log.head()
        found = statistics(path)
        assert found.bytes.wal == size(f"{path}-wal") > 0
    assert (found.log_id, found.erasable) == (log.log_id, False)
    assert (found.head, found.events) == (f"{head.position}:{head.hash.hex()}", 105)
    assert (found.first_recorded_at, found.last_recorded_at) == (BY.recorded_at, LATER.recorded_at)
    states = found.states
    assert (states.live, states.deleted, states.erased) == (45, 5, 0)
    assert found.exact
    by_type = {"state_created": 50, "text_forwarded": 50, "state_deleted": 5}
    assert found.events_by_type == by_type
    assert found.fingerprints == {FINGERPRINT.id: 50}
    assert (found.bytes.logits, found.released_until) == (5000, 0)
    with closing(sqlite3.connect(path)) as connection:
        ((payloads,),) = connection.execute("SELECT sum(length(payload)) FROM events")
    assert found.bytes.payloads == payloads
    assert [step.number for step in found.migrations] == [one.number for one in carried()]
    assert found.verified is None


async def test_bytes_by_table_are_the_whole_file_but_what_is_free(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await fill(log, 200)
    async with await SqliteLog.open(path, retention=Retention(max_bytes=1)) as log:
        for number in range(8):
            await log.append([append(created(), state=900 + number)], provenance=BY)
    found = statistics(path)
    assert found.bytes.by_table is not None
    assert {"events", "logits", "states", "fingerprints"} <= found.bytes.by_table.keys()
    assert sum(found.bytes.by_table.values()) + found.bytes.free == found.bytes.file
    assert found.bytes.free > 0
    assert found.bytes.file == size(path)
    assert (found.bytes.logits, found.released_until) == (0, 400)


async def test_what_a_long_log_holds_is_estimated_from_a_bounded_sample(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await SqliteLog.open(path) as log:
        await fill(log, 300)
    exact = statistics(path)
    monkeypatch.setattr(module, "SAMPLE", 50)
    found = statistics(path)
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(module._SAMPLED, {"step": 13, "last": 630}).fetchall()
    assert 25 < sum(count for _, _, count, _ in rows) <= 50
    assert (exact.exact, found.exact) == (True, False)
    assert found.events == exact.events == 630
    for kind, number in exact.events_by_type.items():
        assert found.events_by_type[kind] == pytest.approx(number, abs=2 * 630 / 50)
    assert found.fingerprints[FINGERPRINT.id] == pytest.approx(300, abs=2 * 630 / 50)
    assert found.bytes.payloads == pytest.approx(exact.bytes.payloads, rel=0.1)
    assert found.states == exact.states


async def test_a_file_that_is_long_is_not_read_page_by_page(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await SqliteLog.open(path) as log:
        await fill(log, 10)
    monkeypatch.setattr(module, "MOST_BYTES_BY_TABLE", size(path) - 1)
    assert statistics(path).bytes.by_table is None


async def test_an_empty_log_has_figures(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        genesis = await log.genesis()
    found = statistics(path)
    assert (found.events, found.events_by_type, found.fingerprints) == (0, {}, {})
    assert found.head == f"0:{genesis.hash.hex()}"
    assert found.first_recorded_at is None


async def test_an_erased_state_is_counted_as_that_alone(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await fill(log, 20)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE states SET erased = 1 WHERE state_id = ?", (state_id(10),))
        connection.execute("UPDATE states SET erased = 1 WHERE state_id = ?", (state_id(11),))
    states = statistics(path).states
    assert (states.live, states.deleted, states.erased) == (17, 1, 2)


def test_the_mark_of_verification_is_shown(path: Path) -> None:
    migrate(path)
    mark = {"head": {"position": 7, "hash": "00"}}
    Path(f"{path}.verified").write_text(json.dumps(mark))
    assert statistics(path).verified == mark
    Path(f"{path}.verified").write_text("{")
    assert statistics(path).verified is None


def test_there_are_no_figures_of_no_log(path: Path) -> None:
    with pytest.raises(LogError, match="there is no log at"):
        statistics(path)
