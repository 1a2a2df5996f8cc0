"""What every event log promises."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from domain.chain import Row
from domain.config import ConfigChanges
from domain.errors import IdempotencyKeyReused, VersionConflict
from domain.events import ConfigChanged, HeadRewound, StateDeleted, decode
from domain.ids import ModelId, Position
from domain.log_errors import UnknownEvent
from domain.ports import EventLog, Remembered, StatePage
from domain.state import Live, fold
from infra.log.sqlite_log import SqliteLog
from tests.builders import (
    BY,
    FINGERPRINT,
    append,
    created,
    forwarded,
    generated,
    idempotency,
    provenance,
    scores,
    started,
    state_id,
)
from tests.infra.log.following import verified


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[EventLog]:
    async with await SqliteLog.open(tmp_path / "log.db") as opened:
        yield opened


async def test_an_empty_log_stands_at_its_genesis(log: EventLog) -> None:
    assert await log.head() == await log.genesis()
    assert await log.rows() == []
    assert await log.state_ids() == []
    assert await log.live_states(limit=5) == StatePage((), None)


async def test_what_append_returns_is_what_is_read(log: EventLog) -> None:
    (first,) = await log.append([append(created("añ"))], provenance=BY)
    (second,) = await log.append(
        [append(forwarded(2), 1, fingerprint=FINGERPRINT)],
        provenance=provenance(request_id="request-2", actor="another"),
    )
    rows = await log.rows()
    assert [decode(row) for row in rows] == [first, second]
    assert (first.position, first.version, second.position, second.version) == (1, 1, 2, 2)
    assert (second.row.actor, second.row.request_id) == ("another", "request-2")
    assert second.row.recorded_at == BY.recorded_at
    assert second.row.fingerprint == FINGERPRINT.id
    assert await verified(log) == 2


async def test_every_kind_of_event_comes_back(log: EventLog) -> None:
    events = [
        created(),
        forwarded(3),
        generated(4, "xyz"),
        ConfigChanged(changes=ConfigChanges(temperature=0.5, seed=None)),
        HeadRewound(to_position=2),
        StateDeleted(),
    ]
    for version, event in enumerate(events):
        await log.append([append(event, version)], provenance=BY)
    rows = await log.state_rows(state_id())
    assert [decode(row).event for row in rows] == events
    assert await verified(log) == len(events)


async def test_rows_can_be_read_in_parts(log: EventLog) -> None:
    await log.append([append(created(), state=n) for n in range(5)], provenance=BY)
    rows = await log.rows()
    assert await log.rows(after=rows[1].position) == rows[2:]
    assert await log.rows(after=rows[1].position, limit=2) == rows[2:4]
    assert await log.rows(after=rows[4].position) == []
    assert await log.rows(limit=0) == []


async def test_rows_of_a_state_can_be_read_in_parts(log: EventLog) -> None:
    await log.append([append(created()), append(created(), state=1)], provenance=BY)
    for version in range(1, 5):
        await log.append([append(forwarded(2 + version), version)], provenance=BY)
    rows = await log.state_rows(state_id())
    assert [row.version for row in rows] == [1, 2, 3, 4, 5]
    assert await log.state_rows(state_id(), after=2) == rows[2:]
    assert await log.state_rows(state_id(), until=3) == rows[:3]
    assert await log.state_rows(state_id(), after=1, until=4, limit=2) == rows[1:3]
    assert await log.state_rows(state_id(), after=9) == []
    assert await log.state_rows(state_id(), until=0) == []


async def test_a_page_of_rows_is_bounded_in_number_and_in_bytes(log: EventLog) -> None:
    await log.append([append(created("x" * 5000), state=n) for n in range(12)], provenance=BY)
    rows = await log.rows()
    size = len(rows[0].payload)

    async def page(after: int, **bounds: int) -> list[Row]:
        given = {"limit": 100, "max_bytes": 1 << 30, **bounds}
        return await log.page(after=Position(after), **given)

    assert await page(0) == rows
    assert await page(rows[3].position) == rows[4:]
    assert await page(rows[3].position, limit=5) == rows[4:9]
    assert await page(rows[-1].position) == []
    for max_bytes in (1, size + 1, 5 * size):
        found = await page(0, max_bytes=max_bytes)
        assert found == rows[: len(found)]
        assert max_bytes / size <= len(found) <= max_bytes / size + 4


async def test_a_page_of_one_state_goes_by_positions(log: EventLog) -> None:
    await log.append([append(created()), append(created(), state=1)], provenance=BY)
    for version in range(1, 4):
        await log.append([append(forwarded(2 + version), version)], provenance=BY)
    rows = await log.state_rows(state_id())
    assert [row.position for row in rows] == [1, 3, 4, 5]
    found = await log.page(after=Position(2), limit=2, max_bytes=1 << 20, state_id=state_id())
    assert found == rows[1:3]
    assert not await log.page(after=Position(0), limit=2, max_bytes=9, state_id=state_id(9))


async def test_the_newest_row_of_a_state_is_that_of_its_latest_version(log: EventLog) -> None:
    assert await log.newest(state_id()) is None
    await log.append([append(created()), append(forwarded(3), 1)], provenance=BY)
    await log.append([append(created(), state=1)], provenance=BY)
    assert await log.newest(state_id()) == (await log.state_rows(state_id()))[-1]


async def test_an_unknown_state_has_no_rows(log: EventLog) -> None:
    assert await log.state_rows(state_id(9)) == []
    with pytest.raises(VersionConflict) as conflict:
        await log.append([append(forwarded(3), 1, state=9)], provenance=BY)
    assert conflict.value.facts["current_version"] == 0


async def test_a_conflict_names_the_current_version_and_records_nothing(log: EventLog) -> None:
    await log.append([append(created()), append(forwarded(3), 1)], provenance=BY)
    for stale in (append(forwarded(3), 1), append(created()), append(forwarded(4), 3)):
        with pytest.raises(VersionConflict) as conflict:
            await log.append([stale], provenance=BY)
        assert conflict.value.facts["current_version"] == 2
        assert conflict.value.facts["expected_version"] == stale.expected_version
    assert await verified(log) == 2


async def test_the_events_of_one_call_are_recorded_all_or_none(log: EventLog) -> None:
    await log.append([append(created())], provenance=BY)
    with pytest.raises(VersionConflict):
        await log.append(
            [append(forwarded(3), 1), append(created(), state=1), append(forwarded(9), 7)],
            provenance=BY,
        )
    assert await verified(log) == 1
    both = await log.append([append(created(), state=1), append(forwarded(3), 1)], provenance=BY)
    assert [(one.state_id, one.version) for one in both] == [(state_id(1), 1), (state_id(0), 2)]


async def test_one_call_may_add_several_events_to_one_state(log: EventLog) -> None:
    await log.append(
        [append(created()), append(forwarded(3), 1), append(forwarded(4), 2)], provenance=BY
    )
    state = fold(map(decode, await log.state_rows(state_id())))
    assert isinstance(state, Live)
    assert (state.version, state.content.text) == (3, "abcdd")


async def test_of_many_writers_that_expect_one_version_exactly_one_wins(log: EventLog) -> None:
    await log.append([append(created())], provenance=BY)
    results = await asyncio.gather(
        *(log.append([append(forwarded(3, str(n)), 1)], provenance=BY) for n in range(10, 60)),
        return_exceptions=True,
    )
    won = [result for result in results if not isinstance(result, BaseException)]
    lost = [result for result in results if isinstance(result, VersionConflict)]
    assert (len(won), len(lost)) == (1, 49)
    assert results[0] is won[0]
    assert {conflict.facts["current_version"] for conflict in lost} == {2}
    assert await verified(log) == 2


async def test_appends_are_recorded_in_the_order_they_were_made(log: EventLog) -> None:
    results = await asyncio.gather(
        *(log.append([append(created(), state=n)], provenance=BY) for n in range(40))
    )
    assert [recorded.position for (recorded,) in results] == list(range(1, 41))
    assert await log.state_ids() == [state_id(n) for n in range(40)]
    assert await verified(log) == 40


async def test_a_conflict_leaves_the_appends_around_it_alone(log: EventLog) -> None:
    results = await asyncio.gather(
        *(log.append([append(created(), state=n % 30)], provenance=BY) for n in range(60)),
        return_exceptions=True,
    )
    assert not any(isinstance(result, BaseException) for result in results[:30])
    assert all(isinstance(result, VersionConflict) for result in results[30:])
    assert await verified(log) == 30


async def test_a_key_recalls_what_it_did(log: EventLog) -> None:
    key = idempotency()
    assert await log.recall(key) is None
    await log.append([append(created(), state=1)], provenance=BY)
    events = await log.append(
        [append(created()), append(forwarded(3), 1)], provenance=BY, idempotency=key
    )
    await log.append([append(created(), state=2)], provenance=BY)
    assert await log.recall(key) == Remembered(key.request_digest, events)
    assert await log.recall(idempotency(body=b"other")) == Remembered(key.request_digest, events)


@pytest.mark.parametrize("field", ["actor", "method", "path", "key"])
async def test_a_key_counts_only_in_its_scope(log: EventLog, field: str) -> None:
    await log.append([append(created())], provenance=BY, idempotency=idempotency())
    assert await log.recall(idempotency(**{field: "another"})) is None


async def test_a_duplicate_gets_the_first_events_and_records_nothing(log: EventLog) -> None:
    first = await log.append([append(created())], provenance=BY, idempotency=idempotency())
    again = await log.append([append(created(), state=1)], provenance=BY, idempotency=idempotency())
    assert again == first
    assert await verified(log) == 1


async def test_duplicates_at_the_same_moment_record_once(log: EventLog) -> None:
    results = await asyncio.gather(
        *(
            log.append([append(created(), state=n)], provenance=BY, idempotency=idempotency())
            for n in range(10)
        )
    )
    assert all(result == results[0] for result in results)
    assert await verified(log) == 1


async def test_a_key_with_another_body_is_refused(log: EventLog) -> None:
    await log.append([append(created())], provenance=BY, idempotency=idempotency())
    with pytest.raises(IdempotencyKeyReused):
        await log.append(
            [append(created(), state=1)], provenance=BY, idempotency=idempotency(body=b"other")
        )
    assert await verified(log) == 1


async def test_the_key_of_a_refused_request_is_free(log: EventLog) -> None:
    key = idempotency()
    with pytest.raises(VersionConflict):
        await log.append([append(forwarded(3), 1)], provenance=BY, idempotency=key)
    assert await log.recall(key) is None
    assert await log.append([append(created())], provenance=BY, idempotency=key)


async def test_lists_show_live_states_newest_first_in_pages(log: EventLog) -> None:
    await log.append([append(created(), state=n) for n in range(7)], provenance=BY)
    await log.append([append(StateDeleted(), 1, state=3)], provenance=BY)
    await log.append([append(forwarded(3), 1, state=0)], provenance=BY)
    seen, cursor = [], None
    while True:
        page = await log.live_states(limit=2, cursor=cursor)
        seen.append(page.state_ids)
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
    pages = [(6, 5), (4, 2), (1, 0)]
    assert seen == [tuple(state_id(n) for n in page) for page in pages]
    assert len(await log.state_ids()) == 7


async def test_lists_can_show_one_model(log: EventLog) -> None:
    other = ModelId("other")
    for n in range(6):
        model = {"model_id": other} if n % 2 else {}
        await log.append([append(created(**model), state=n)], provenance=BY)
    page = await log.live_states(limit=2, model_id=other)
    assert page.state_ids == (state_id(5), state_id(3))
    assert page.next_cursor is not None
    rest = await log.live_states(limit=2, model_id=other, cursor=page.next_cursor)
    assert rest == StatePage((state_id(1),), None)
    assert await log.live_states(limit=2, model_id=ModelId("none")) == StatePage((), None)


async def test_a_state_created_and_deleted_in_one_call_is_not_listed(log: EventLog) -> None:
    await log.append([append(created()), append(StateDeleted(), 1)], provenance=BY)
    assert await log.live_states(limit=2) == StatePage((), None)
    assert await log.state_ids() == [state_id()]


async def test_fingerprints_are_kept(log: EventLog) -> None:
    assert await log.fingerprint(FINGERPRINT.id) is None
    for n in range(2):
        await log.append([append(created(), state=n, fingerprint=FINGERPRINT)], provenance=BY)
    assert await log.fingerprint(FINGERPRINT.id) == FINGERPRINT


async def test_logits_are_kept_in_order(log: EventLog) -> None:
    blobs = tuple(bytes([n]) * n for n in range(12))
    one, other = await log.append(
        [append(created(), logits=blobs), append(created(), state=1)], provenance=BY
    )
    assert await log.logits(one.position) == blobs
    assert await log.logits(other.position) == ()


async def test_an_intent_is_found_by_its_key_and_is_no_event(log: EventLog) -> None:
    await log.append([append(created())], provenance=BY)
    assert await log.begun_generation(idempotency()) is None
    await log.begin_generation(started(seed=3), provenance=BY, idempotency=idempotency())
    await log.begin_generation(started(seed=4), provenance=BY, idempotency=idempotency("key-2"))
    await log.begin_generation(started(seed=5), provenance=BY)
    assert await log.begun_generation(idempotency()) == started(seed=3)
    assert await log.begun_generation(idempotency(path="/elsewhere")) is None
    assert await log.recall(idempotency()) is None
    assert await verified(log) == 1


async def test_the_newest_intent_of_a_key_counts(log: EventLog) -> None:
    for seed in (3, 4):
        await log.begin_generation(started(seed=seed), provenance=BY, idempotency=idempotency())
    assert await log.begun_generation(idempotency()) == started(seed=4)


async def test_the_intent_of_another_body_is_refused(log: EventLog) -> None:
    await log.begin_generation(started(), provenance=BY, idempotency=idempotency())
    with pytest.raises(IdempotencyKeyReused):
        await log.begun_generation(idempotency(body=b"other"))


async def test_an_event_that_could_not_be_read_back_is_not_recorded(log: EventLog) -> None:
    not_a_number = msgspec.structs.replace(scores(1), logprobs=(float("nan"),))
    event = msgspec.structs.replace(forwarded(3), scores=not_a_number)
    await log.append([append(created())], provenance=BY)
    with pytest.raises(UnknownEvent):
        await log.append([append(event, 1)], provenance=BY)
    assert await verified(log) == 1


async def test_a_state_begins_with_its_creation(log: EventLog) -> None:
    await log.append([append(created())], provenance=BY)
    for wrong in (append(forwarded(3), 0, state=1), append(created(), 1)):
        with pytest.raises(ValueError, match="state_created"):
            await log.append([wrong], provenance=BY)
    with pytest.raises(ValueError, match="nothing"):
        await log.append([], provenance=BY)


async def test_logs_have_names_of_their_own(log: EventLog, tmp_path: Path) -> None:
    async with await SqliteLog.open(tmp_path / "another.db") as another:
        assert await log.genesis() != await another.genesis()
        assert log.log_id != another.log_id
