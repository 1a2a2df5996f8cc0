"""Verification finds every fault planted in a log, and names its place.

Each fault is planted twice: raw, and with the whole chain hashed anew behind it, so that only
re-execution can find it.
"""

import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import pytest
import pytest_asyncio
import torch

from app.bootstrap import open_models, open_service
from app.operations import states
from app.operations.generation import Wish, generate, generate_multi
from app.operations.verification.verify import Request, Verifier
from app.service import Call, Service
from app.settings import Settings
from domain.chain import Head
from domain.config import ConfigChanges
from domain.events import Event, decode
from domain.ids import Position, StateId, TokenId, Version
from domain.models import Models
from domain.plan import GenerationWish
from domain.report import Divergence, Report
from domain.state import Live, fold
from domain.work import ScoreRequest
from infra.engine.blocks import BLOCK_TOKENS, block_keys
from infra.log.sqlite_reader import SqliteReader
from tests.end_to_end.calls import LONG, query
from tests.end_to_end.faults import FAULTS, Fault, other_token, put, remove_state, retell
from tests.end_to_end.tampering import (
    edit,
    edit_blob,
    read,
    remove,
    set_column,
    swap,
    tampering,
)
from tests.end_to_end.written import Log

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("models_kept"),
]

SETTINGS = Settings(model_name="cacher-tiny", threads=1, hot_cache_bytes=32 << 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(models_kept: None) -> AsyncIterator[Models]:
    """The model that the log was written with, loaded once for all tests."""
    async with open_models(SETTINGS) as store:
        yield store


async def chain_of(database: Path, models: Models) -> list[int]:
    """The positions at which the chain alone, of all that is verified, is broken."""
    async with await SqliteReader.open(database) as reader:
        report = await Verifier(reader, models).run(Request(state_ids=()))
    assert report.tokens_recomputed == 0
    return [one.position for one in report.divergences if one.field == "hash"]


async def verify(database: Path, models: Models, head: Head | None = None) -> Report:
    async with await SqliteReader.open(database) as reader:
        return await Verifier(reader, models).run(Request(head=head))


# a clean log


async def test_a_clean_log_is_equal_and_wholly_recomputed(log: Log, models: Models) -> None:
    report = await verify(log.database, models)
    assert (report.result, report.divergences, report.drifts, report.notes) == ("equal", (), (), ())
    assert report.events_checked == len(log.positions) == report.head["position"]
    assert [(report.states_checked,)] == query(
        log.database, "SELECT count(*) FROM events WHERE type = 'state_created'"
    )
    assert report.tokens_reused == 0
    sql = "SELECT sum(json_array_length(payload, '$.content.tokens')) FROM events"
    claimed = query(log.database, f"{sql} WHERE type != 'state_created'")[0][0]
    assert report.tokens_recomputed > claimed > 0


async def test_a_second_verification_recomputes_as_much(log: Log, models: Models) -> None:
    first, second = await verify(log.database, models), await verify(log.database, models)
    assert first == second
    assert second.tokens_reused == 0


async def test_the_log_holds_what_the_faults_are_planted_in(log: Log) -> None:
    types = query(log.database, "SELECT DISTINCT type FROM events")
    tags = {kind.__struct_config__.tag for kind in get_args(Event)}
    assert {type_ for (type_,) in types} == tags - {"state_erased"}  # nothing here can be erased
    origins = "SELECT DISTINCT json_extract(payload, '$.origin.kind') FROM events"
    assert {("new",), ("fork",), ("merge",)} <= set(query(log.database, origins))
    reasons = "SELECT DISTINCT json_extract(payload, '$.finish_reason') FROM events"
    found = query(log.database, f"{reasons} WHERE type = 'tokens_generated'")
    ends = {"stop_token", "stop_sequence", "context_full", "constraint"}
    assert set(found) == {(None,), *((end,) for end in ends)}
    resumed = "SELECT max(json_extract(payload, '$.resumes')) FROM events"
    assert query(log.database, resumed)[0][0] > 0
    kinds = "SELECT DISTINCT json_extract(payload, '$.stored_logits.kind') FROM events"
    assert {("top_k",), ("full",)} <= set(query(log.database, kinds))


async def test_what_texts_begin_with_in_common_is_computed_once(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, database=str(tmp_path / "shared.db"))
    async with open_service(settings) as service:
        state_id = await begin(service, 2 * LONG)
        held = (await service.live(state_id)).head_position
        asked = GenerationWish(max_tokens=4)
        wish = Wish(state_id=state_id, generation=asked, streamed=False, resuming=False)
        _ = [item async for item in generate_multi(service, call(), wish, 8)]
        report = await Verifier(service.log, service.models).run(Request())
    assert (report.result, report.tokens_reused) == ("equal", 0)
    assert held >= 3 * BLOCK_TOKENS
    assert report.tokens_recomputed < held + 8 * (BLOCK_TOKENS + 4)


# faults


def shown_at(log: Log, fault: Fault) -> tuple[Any, ...]:
    """Position, state, version, field and token position that a report must name."""
    name = fault.found_in or fault.event
    token = None if fault.token is None else log.start(name) + fault.token
    return (*log.place(name), fault.field, token)


def named(divergence: Divergence, *, with_token: bool) -> tuple[Any, ...]:
    token = divergence.token_position if with_token else None
    return (
        divergence.position,
        divergence.state_id,
        divergence.version,
        divergence.field,
        token,
    )


@pytest.mark.parametrize("name", FAULTS)
async def test_behind_a_whole_chain_re_execution_finds(
    name: str, log: Log, models: Models, tmp_path: Path
) -> None:
    fault = FAULTS[name]
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        fault.plant(connection, log.positions[fault.event])
    report = await verify(tmp_path / "copy.db", models)
    assert report.result == "divergent"
    assert "hash" not in {divergence.field for divergence in report.divergences}
    with_token = fault.token is not None
    found = [named(divergence, with_token=with_token) for divergence in report.divergences]
    place = query(
        tmp_path / "copy.db",
        "SELECT position, state_id, coalesce(version, at_version) FROM events WHERE position = ?",
        log.positions[fault.found_in or fault.event],
    )[0]
    assert (*place, *shown_at(log, fault)[3:]) in found
    earlier = {field for position, *_, field, _ in found if position < place[0]}
    # The list of states says more of one that lost its last event to another.
    assert earlier <= ({"states.version", "states.deleted"} if fault.field == "event" else set())


@pytest.mark.parametrize("name", FAULTS)
async def test_in_a_chain_left_as_it_was_the_chain_finds(
    name: str, log: Log, models: Models, tmp_path: Path
) -> None:
    fault = FAULTS[name]
    with tampering(log.database, tmp_path / "copy.db", rehash=False) as connection:
        fault.plant(connection, log.positions[fault.event])
    assert await chain_of(tmp_path / "copy.db", models) == [log.positions[fault.event]]


# events that are gone or not in their order


class Rearranged(NamedTuple):
    """A change of several events; re-execution finds it at one, the raw chain at some."""

    plant: Callable[[sqlite3.Connection, dict[str, int]], None]
    found_in: str
    broken: list[str]


def removed(name: str, *, found_in: str, broken: str) -> Rearranged:
    return Rearranged(lambda connection, at: remove(connection, at[name]), found_in, [broken])


def move(connection: sqlite3.Connection, first: int, second: int) -> None:
    """Exchange two events of one state, versions and all."""
    swap(connection, first, second)
    sql = "SELECT version FROM events WHERE position IN (?, ?) ORDER BY position = ?"
    versions = [version for (version,) in connection.execute(sql, (first, second, second))]
    set_column(connection, second, "version", None)
    set_column(connection, first, "version", versions[1])
    set_column(connection, second, "version", versions[0])


REARRANGED: dict[str, Rearranged] = {
    "a pair in the order of its versions alone": Rearranged(
        lambda connection, at: move(connection, at["forwarded"], at["generated"]),
        "forwarded",
        ["forwarded", "generated"],
    ),
    "a removed beginning": removed("created", found_in="forwarded", broken="forwarded"),
    "a removed forward": removed("forwarded", found_in="generated", broken="generated"),
    "a removed generation": removed("generated", found_in="kept in full", broken="configured"),
    "a removed rewind": removed("rewound", found_in="streamed", broken="streamed"),
    "a swapped pair": Rearranged(
        lambda connection, at: swap(connection, at["forwarded"], at["generated"]),
        "forwarded",
        ["forwarded", "generated"],
    ),
    "a swapped pair that claims nothing of each other": Rearranged(
        lambda connection, at: swap(connection, at["kept in full"], at["rewound"]),
        "streamed",
        ["kept in full", "rewound"],
    ),
}


@pytest.mark.parametrize("name", REARRANGED)
async def test_behind_a_whole_chain_re_execution_finds_too(
    name: str, log: Log, models: Models, tmp_path: Path
) -> None:
    fault = REARRANGED[name]
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        fault.plant(connection, log.positions)
    report = await verify(tmp_path / "copy.db", models)
    first = report.divergences[0]
    assert (first.field, first.position) == ("event", log.positions[fault.found_in])


@pytest.mark.parametrize("name", REARRANGED)
async def test_in_a_chain_left_as_it_was_the_chain_finds_too(
    name: str, log: Log, models: Models, tmp_path: Path
) -> None:
    fault = REARRANGED[name]
    with tampering(log.database, tmp_path / "copy.db", rehash=False) as connection:
        fault.plant(connection, log.positions)
    broken = await chain_of(tmp_path / "copy.db", models)
    assert [log.positions[event] for event in fault.broken] == broken[: len(fault.broken)]


# what lies beside the events


@pytest.mark.parametrize("event", ["generated", "kept in full"])
async def test_changed_stored_logits_are_found_by_the_digest_in_their_event(
    event: str, log: Log, models: Models, tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        edit_blob(connection, log.positions[event], step=2)
    (found,) = (await verify(tmp_path / "copy.db", models)).divergences
    assert named(found, with_token=True) == (*log.place(event), "logits", None)


@pytest.mark.parametrize("sql", ["DELETE FROM logits WHERE position = ? AND step = 3"])
async def test_missing_stored_logits_are_found(
    sql: str, log: Log, models: Models, tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        connection.execute(sql, (log.positions["generated"],))
    (found,) = (await verify(tmp_path / "copy.db", models)).divergences
    assert named(found, with_token=True) == (*log.place("generated"), "logits", None)


FINGERPRINTS = {
    "another document": "UPDATE fingerprints SET document = json_set(document, '$.torch', '9')",
    "another claim": "UPDATE fingerprints SET deterministic = 1 - deterministic",
    "a document that names nothing": "UPDATE fingerprints SET document = '[]'",
    "no document": "DELETE FROM fingerprints",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
async def test_a_changed_fingerprint_is_found_in_every_event_that_names_it(
    name: str, log: Log, models: Models, tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        connection.execute(FINGERPRINTS[name])
    report = await verify(tmp_path / "copy.db", models)
    assert report.result == "divergent"
    assert {one.field for one in report.divergences} == {"fingerprint"}
    assert log.positions["streamed"] in {one.position for one in report.divergences}


async def test_a_state_that_the_list_does_not_show_is_verified_all_the_same(
    log: Log, models: Models, tmp_path: Path
) -> None:
    position, state_id, _ = log.place("generated")
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        FAULTS["a changed token"].plant(connection, position)
        connection.execute("DELETE FROM states WHERE state_id = ?", (state_id,))
    report = await verify(tmp_path / "copy.db", models)
    fields = {(one.position, one.field) for one in report.divergences}
    assert (position, "content.tokens") in fields
    assert (log.positions["created"], "states") in fields
    assert report.events_checked == len(log.positions)


# what only a remembered head can show

FREE: dict[str, Callable[[sqlite3.Connection, dict[str, int]], None]] = {
    "a removed tail": lambda c, at: remove_state(c, at["opened"]),
    "a removed deletion": lambda c, at: remove(c, at["deleted"]),
    "another actor": lambda c, at: set_column(c, at["generated"], "actor", "someone"),
    "another time": lambda c, at: set_column(
        c, at["rewound"], "recorded_at", "2020-01-02T03:04:05.000006Z"
    ),
    "other metadata": lambda c, at: put("metadata", value={"a": 1})(c, at["created"]),
    "another prompt of a state that claims nothing": lambda c, at: retell(c, at["opened"]),
    "another seed of a greedy draw": lambda c, at: put("seed", value=1)(c, at["all tokens"]),
}


def remembered(log: Log) -> Head:
    sql = "SELECT position, hash FROM events ORDER BY position DESC LIMIT 1"
    return Head(*query(log.database, sql)[0])


@pytest.mark.parametrize("name", FREE)
async def test_behind_a_whole_chain_only_a_remembered_head_finds(
    name: str, log: Log, models: Models, tmp_path: Path
) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        FREE[name](connection, log.positions)
    assert (await verify(tmp_path / "copy.db", models)).result == "equal"
    head = remembered(log)
    report = await verify(tmp_path / "copy.db", models, head)
    (found,) = report.divergences
    assert (report.result, found.field, found.position) == ("divergent", "head", head.position)
    assert found.expected == head.hash.hex()


async def test_a_log_that_has_grown_still_holds_its_remembered_heads(
    log: Log, models: Models
) -> None:
    for position, digest in query(log.database, "SELECT position, hash FROM events"):
        assert (await chain_only(log, models, Head(position, digest))).result == "equal"
    wrong = Head(Position(2), remembered(log).hash)
    assert (await chain_only(log, models, wrong)).result == "divergent"


async def chain_only(log: Log, models: Models, head: Head) -> Report:
    """Verify the chain, and of the states only one that is cheap."""
    state_id = StateId(log.place("opened")[1])
    async with await SqliteReader.open(log.database) as reader:
        return await Verifier(reader, models).run(Request(state_ids=(state_id,), head=head))


# a forger who knows the model


async def test_a_token_that_was_not_drawn_is_found_although_all_its_scores_are_right(
    log: Log, models: Models, tmp_path: Path
) -> None:
    position, state_id, version = log.place("streamed")
    tokens = await forged_tokens(log, state_id, version)
    model = await models.get(models.known()[0].model_id)
    start = log.start("streamed")
    (scored,) = await model.score([ScoreRequest(tokens=tokens, start=start)])
    content = model.fragment(tokens[:start], tokens[start:])
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        payload = read(connection, position)
        payload["content"] = msgspec.to_builtins(content, str_keys=True)
        payload["scores"] = msgspec.to_builtins(scored.scores)
        edit(connection, position, lambda old: old.update(payload))
    found = (await verify(tmp_path / "copy.db", models)).divergences
    last = len(tokens) - 1
    assert [named(one, with_token=True) for one in found] == [
        (position, state_id, version, "content.tokens", last)
    ]


async def forged_tokens(log: Log, state_id: str, version: int) -> tuple[Any, ...]:
    """The tokens of a state at a version, the last one exchanged for another."""
    async with await SqliteReader.open(log.database) as reader:
        rows = await reader.state_rows(StateId(state_id), until=Version(version))
    state = fold(map(decode, rows))
    assert isinstance(state, Live)
    *kept, last = state.content.tokens
    return (*kept, other_token(last))


# the KV cache


@pytest.mark.usefixtures("models_of_its_own")
async def test_what_was_computed_from_a_corrupted_hot_block_is_found(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, database=str(tmp_path / "hot.db"))
    async with open_service(settings) as service:
        model: Any = await service.models.get(service.default_model)
        state_id = await begin(service, LONG)
        await draw(service, state_id)
        assert (await Verifier(service.log, service.models).run(Request())).result == "equal"
        held = (await service.live(state_id)).content.tokens
        assert model.tokens_hot(held) == 32 <= len(held)
        hits = model.counters().hits
        corrupt_first_block(model, held)
        await draw(service, state_id)
        assert model.counters().hits > hits
        report = await Verifier(service.log, service.models).run(Request())
    assert report.tokens_reused == 0
    assert {(one.position, one.version) for one in report.divergences} == {(3, 3)}
    first = report.divergences[0]
    assert first.field in ("scores.logprobs", "content.tokens")
    assert first.token_position == len(held)


def call() -> Call:
    return Call(actor="tester", request_id="request")


async def begin(service: Service, text: str) -> StateId:
    (recorded,) = await states.create(
        service,
        call(),
        model_id=service.default_model,
        content=states.Content(text, None),
        changes=ConfigChanges(seed=5, temperature=1.0),
        metadata={},
    )
    return recorded.state_id


async def draw(service: Service, state_id: StateId) -> None:
    asked = GenerationWish(max_tokens=4)
    wish = Wish(state_id=state_id, generation=asked, streamed=False, resuming=False)
    assert len([item async for item in generate(service, call(), wish)]) == 5


def corrupt_first_block(model: Any, tokens: tuple[TokenId, ...]) -> None:
    """Flip the sign of the keys of the first block, which the next generation takes as it is."""
    runner = model._runner
    (block, *_) = runner.pool.match(block_keys(model._root, tokens, limit=len(tokens)))
    runner.pool.release([block])
    before = runner.executor.store.k[:, block].clone()
    runner.executor.store.k[:, block].neg_()
    assert not torch.equal(before, runner.executor.store.k[:, block])


# another machine


async def test_under_another_fingerprint_the_drift_is_reported_and_nothing_is_claimed(
    log: Log, models: Models
) -> None:
    here = (await models.get(models.known()[0].model_id)).numerics
    other = "tile" if here.strategy != "tile" else "plain"
    async with open_models(msgspec.structs.replace(SETTINGS, strategy=other)) as elsewhere:
        report = await verify(log.database, elsewhere)
    assert (report.result, report.divergences) == ("unverified", ())
    drawn = "json_array_length(payload, '$.scores.ranks') > 0"
    several = "type IN ('continuations_generated', 'beams_generated')"
    claims = query(log.database, f"SELECT position FROM events WHERE {drawn} OR {several}")
    assert {drift.position for drift in report.drifts} == {position for (position,) in claims}
    for drift in report.drifts:
        assert drift.recorded_fingerprint == here.fingerprint
        assert drift.differences["strategy"] == (here.strategy, other)
        assert drift.max_logprob_delta < 1e-3


async def test_under_another_dtype_the_drift_is_larger_than_rounding(log: Log) -> None:
    async with open_models(msgspec.structs.replace(SETTINGS, dtype="bfloat16")) as elsewhere:
        report = await verify(log.database, elsewhere)
    assert report.result == "unverified"
    assert max(drift.max_logprob_delta for drift in report.drifts) > 1e-3
    assert report.drifts[0].differences["dtype"] == ("float32", "bfloat16")


async def test_a_changed_text_is_found_under_any_fingerprint(log: Log, tmp_path: Path) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=True) as connection:
        put("content", "text", value=str.upper)(connection, log.positions["fork grown"])
        put("scores", "logprobs", value=[])(connection, log.positions["generated"])
    async with open_models(msgspec.structs.replace(SETTINGS, dtype="bfloat16")) as elsewhere:
        report = await verify(tmp_path / "copy.db", elsewhere)
    assert report.result == "divergent"
    fields = {(one.position, one.field) for one in report.divergences}
    assert (log.positions["fork grown"], "content.text") in fields
    assert (log.positions["generated"], "len(scores.logprobs)") in fields
