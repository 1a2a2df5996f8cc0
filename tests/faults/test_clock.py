"""A clock that is set back and forth: times are what was written down, nothing is decided by them.

The order of events is that of the log. What does go by the time (how long keys and stored logits
are kept) goes by the time of the newest event.
"""

import itertools
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from app.bootstrap import open_service
from app.operations import states
from app.operations.generation import Wish, generate
from app.operations.verification.verify import Request, Verifier
from app.service import Call, Service
from app.settings import Settings
from domain.chain import Row
from domain.config import ConfigChanges
from domain.ids import Position, StateId, Version
from domain.plan import GenerationWish
from domain.state import Live, State
from infra.log.retention import Retention
from infra.log.sqlite_log import SqliteLog
from tests.builders import append, created, idempotency, provenance, state_id
from tests.end_to_end.calls import query
from tests.faults.whole import HALF_THERE

BEGAN: Final = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
DAY: Final = timedelta(days=1)
STEPS: Final = {
    "steady": [timedelta(minutes=1)],
    "back and forth": [timedelta(hours=-9), 30 * DAY, -400 * DAY, timedelta(0), 365 * DAY],
}


def written(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def clock(steps: list[timedelta]) -> Callable[[], str]:
    now = BEGAN
    moves = itertools.cycle(steps)

    def read() -> str:
        nonlocal now
        now += next(moves)
        return written(now)

    return read


async def operate(service: Service) -> StateId:
    """A small history, always the same but for its times; the state that lives on."""
    call = Call(actor="tester", request_id="request")

    async def grow(state_id: StateId, by: int) -> None:
        asked = GenerationWish(max_tokens=by)
        wish = Wish(state_id=state_id, generation=asked, streamed=False, resuming=False)
        _ = [item async for item in generate(service, call, wish)]

    changes = ConfigChanges(seed=5, temperature=1.0, store_logits="top_k")
    (begun,) = await states.create(
        service,
        call,
        model_id=service.default_model,
        content=states.Content("Once upon a time", None),
        changes=changes,
        metadata={},
    )
    first = begun.state_id
    await states.forward(service, call, first, states.Content(" there was", None))
    await grow(first, 5)
    (forked,) = await states.fork(
        service,
        call,
        first,
        position=None,
        version=None,
        continuation=None,
        count=1,
        changes=ConfigChanges(),
        metadata=None,
    )
    await states.delete(service, call, forked.state_id)
    await states.rewind(service, call, first, position=None, version=Version(2))
    await grow(first, 5)
    return first


def untimed(state: State) -> State:
    """The state but for its name, and for when it began and changed last."""
    assert isinstance(state, Live)
    return msgspec.structs.replace(state, state_id=state_id(0), created_at="", modified_at="")


def unnamed(row: Row) -> str:
    """The payload but for the names of states."""
    return re.sub(r"state-\w{32}", "state", row.payload)


async def test_order_folds_and_verification_do_not_look_at_the_clock(tmp_path: Path) -> None:
    settings = Settings(
        model_name="cacher-tiny",
        threads=1,
        hot_cache_bytes=32 << 20,
        database=str(tmp_path / "log.db"),
    )
    async with open_service(settings) as service:
        lived = []
        for steps in STEPS.values():
            surroundings = msgspec.structs.replace(service.surroundings, now=clock(steps))
            service.surroundings = surroundings
            lived.append(await operate(service))
        rows = await service.log.rows()
        listed = (await service.log.live_states(limit=9)).state_ids
        steady, moved = [await service.state(one) for one in lived]
        report = await Verifier(service.log, service.models).run(Request())
    assert [row.position for row in rows] == list(range(1, 15))
    assert [unnamed(row) for row in rows[7:]] == [unnamed(row) for row in rows[:7]]
    assert (untimed(moved), listed) == (untimed(steady), tuple(lived[::-1]))
    assert (report.result, report.divergences, report.events_checked) == ("equal", (), 14)
    times, others = ([row.recorded_at for row in part] for part in (rows[:7], rows[7:]))
    assert times == sorted(times)
    assert others not in (sorted(others), sorted(others, reverse=True))


async def recorded_at(log: SqliteLog, number: int, after: timedelta) -> None:
    """Record a state with a key and a blob of logits, so long after the beginning."""
    by = provenance(recorded_at=written(BEGAN + after), request_id=f"key-{number}")
    call = [append(created(), state=number, logits=(b"logits",))]
    await log.append(call, provenance=by, idempotency=idempotency(f"key-{number}"))


async def test_a_key_is_kept_while_no_event_is_a_day_younger(tmp_path: Path) -> None:
    first = idempotency("key-0")
    async with await SqliteLog.open(tmp_path / "log.db") as log:
        await recorded_at(log, 0, timedelta(0))
        for number, after in enumerate([-400 * DAY, DAY / 2, -DAY, DAY, -9 * DAY, DAY], start=1):
            await recorded_at(log, number, after)
            assert await log.recall(first) is not None
        await recorded_at(log, 8, DAY + timedelta(seconds=1))
        assert await log.recall(first) is None


async def test_logits_are_kept_while_no_event_is_older_than_agreed(tmp_path: Path) -> None:
    week = Retention(max_days=7)
    async with await SqliteLog.open(tmp_path / "log.db", retention=week) as log:
        for number, after in enumerate([timedelta(0), -3 * DAY, 4 * DAY, DAY, 3 * DAY]):
            await recorded_at(log, number, after)
        assert [await log.logits(Position(n)) for n in range(1, 6)] == [(b"logits",)] * 5
        await recorded_at(log, 5, 8 * DAY)
        kept = [bool(await log.logits(Position(n))) for n in range(1, 7)]
        assert kept == [False, False, True, True, True, True]
        await recorded_at(log, 6, -400 * DAY)
        assert await log.released_until() == Position(2)
    bytes_kept = HALF_THERE["bytes of logits that are not theirs"]
    assert query(tmp_path / "log.db", bytes_kept) == []
