"""Verification in windows, of a range, and from the mark that earlier ones left."""

import asyncio
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from app.bootstrap import marks as marks_of
from app.bootstrap import open_models, open_service
from app.operations.verification import execution, findings, verify
from app.operations.verification.verify import Request, Verifier
from domain.chain import Head
from domain.config import ConfigChanges
from domain.errors import InvalidInput, StateNotFound
from domain.events import ConfigChanged
from domain.ids import ModelId, Position, StateId, Version
from domain.merkle import TILE
from domain.models import Models
from domain.ports import Append
from domain.report import Mark, Marks, Progress, Report
from domain.transfer import source_of
from infra.log.batch import as_row
from infra.log.marks import FileMarks
from infra.log.queries import ROWS
from infra.log.sqlite_reader import SqliteReader
from tests.builders import BY
from tests.end_to_end.calls import query
from tests.end_to_end.faults import FAULTS, put, remove_state
from tests.end_to_end.tampering import rehash_chain, set_column, tampering
from tests.end_to_end.test_verify import SETTINGS, begin, draw
from tests.end_to_end.written import Log

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("models_kept"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(models_kept: None) -> AsyncIterator[Models]:
    """The model that the log was written with, loaded once for all tests."""
    async with open_models(SETTINGS) as store:
        yield store


@pytest.fixture
def copy(log: Log, tmp_path: Path) -> Path:
    """A log of one's own."""
    shutil.copyfile(log.database, tmp_path / "copy.db")
    return tmp_path / "copy.db"


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of five events."""
    monkeypatch.setattr(verify, "WINDOW_EVENTS", 5)


def nothing(_: Progress) -> None: ...


async def run(
    database: Path,
    models: Models,
    progress: Callable[[Progress], None] = nothing,
    marks: Marks | None = None,
    **request: Any,
) -> Report:
    async with await SqliteReader.open(database) as reader:
        verifier = Verifier(reader, models, marks=marks, progress=progress)
        return await verifier.run(Request(**request))


def firsts(report: Report) -> list[tuple[Any, ...]]:
    """The first divergence of each state."""
    return [
        (one.position, one.field, one.expected, one.actual, one.token_position)
        for one in report.divergences
        if one.first
    ]


def head_of(database: Path, position: int | None = None) -> Head:
    sql = "SELECT position, hash FROM events WHERE position <= ? ORDER BY position DESC LIMIT 1"
    return Head(*query(database, sql, position or 2**62)[0])


# windows


async def test_windows_change_nothing_but_the_way(
    log: Log, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await run(log.database, models)
    for size in (4,):
        monkeypatch.setattr(verify, "WINDOW_EVENTS", size)
        told: list[Progress] = []
        report = await run(log.database, models, told.append)
        assert msgspec.structs.replace(report, tokens_recomputed=whole.tokens_recomputed) == whole
        # What a state held before a window is computed again for it.
        assert report.tokens_recomputed > whole.tokens_recomputed
        done = [one.events_done for one in told]
        assert sorted(done) == done
        assert set(range(0, len(log.positions), size)) <= set(done)
        assert told[-1].events_done == told[-1].events_total == len(log.positions)
        assert told[-1].tokens == report.tokens_recomputed


@pytest.mark.usefixtures("small_windows")
async def test_folds_that_are_not_kept_are_folded_again(
    log: Log, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = await run(log.database, models)
    monkeypatch.setattr("app.operations.verification.courses.KEPT_TOKENS", 0)
    assert await run(log.database, models) == kept
    assert kept.result == "equal"


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", list(FAULTS)[::9])
async def test_in_small_windows_the_same_is_found_first(
    name: str, log: Log, models: Models, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    with closing(sqlite3.connect(copy)) as connection:
        fault.plant(connection, log.positions[fault.event])
        rehash_chain(connection)
        connection.commit()
    parted = await run(copy, models)
    monkeypatch.setattr(verify, "WINDOW_EVENTS", 1000)
    assert firsts(parted) == firsts(await run(copy, models))
    assert parted.result == "divergent"


async def test_passages_of_all_states_are_computed_together(
    log: Log, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = await models.get(ModelId("cacher-tiny"))
    calls: list[int] = []
    score = type(model).score

    async def counted(self: Any, requests: Any, **options: Any) -> Any:
        calls.append(len(requests))
        return await score(self, requests, **options)

    monkeypatch.setattr(type(model), "score", counted)
    report = await run(log.database, models)
    assert len(calls) == 1
    monkeypatch.setattr(execution, "PASSAGES", 4)
    apart = await run(log.database, models)
    assert sum(calls[1:]) == calls[0]
    assert len(calls) > 4
    assert apart.result == report.result == "equal"
    assert apart.tokens_recomputed > report.tokens_recomputed  # less in common
    monkeypatch.setattr(execution, "KEPT_BYTES", 1)
    assert (await run(log.database, models)).result == "equal"


# ranges


async def test_only_the_events_of_a_range_are_executed(log: Log, models: Models) -> None:
    begin_, end = log.positions["forwarded"], log.positions["kept in full"]
    report = await run(log.database, models, after=Position(begin_), until=Position(end))
    assert report.result == "equal"
    assert (report.range.after, report.range.until) == (begin_, end)
    assert (report.events_checked, report.states_checked) == (end - begin_, 1)
    assert report.head == {"position": end, "hash": head_of(log.database, end).hash.hex()}
    assert 0 < report.tokens_recomputed < (await run(log.database, models)).tokens_recomputed


async def test_a_fault_is_found_in_its_range_alone(log: Log, models: Models, copy: Path) -> None:
    at = log.positions["generated"]
    with closing(sqlite3.connect(copy)) as connection:
        FAULTS["a changed digest"].plant(connection, at)
        rehash_chain(connection)
        connection.commit()
    for after, until, result in [(0, at, "divergent"), (at - 1, None, "divergent")]:
        found = await run(copy, models, after=Position(after), until=until)
        assert (found.result, [one.position for one in found.divergences]) == (result, [at])
    for after, until in [(0, at - 1), (at, None)]:
        assert (await run(copy, models, after=Position(after), until=until)).result == "equal"


async def test_a_range_past_the_end_holds_nothing(log: Log, models: Models) -> None:
    last = len(log.positions)
    requests: list[dict[str, Any]] = [
        {"after": last},
        {"after": 5, "until": 5},
    ]
    for request in requests:
        report = await run(log.database, models, **request)
        assert (report.result, report.events_checked, report.states_checked) == ("equal", 0, 0)
    assert report.head == {"position": 5, "hash": head_of(log.database, 5).hash.hex()}
    past = await run(log.database, models, after=last - 1, until=last + 99)
    assert (past.events_checked, past.range.until) == (1, last)
    with pytest.raises(InvalidInput, match=f"ends at {last}"):
        await run(log.database, models, after=last + 1)


async def test_some_states_are_verified_and_one_that_is_not_there_is_refused(
    log: Log, models: Models
) -> None:
    chosen = tuple(StateId(log.place(name)[1]) for name in ("created", "greedy"))
    report = await run(log.database, models, state_ids=chosen)
    ours = "SELECT count(*) FROM events WHERE state_id IN (?, ?)"
    assert [(report.events_checked,)] == query(log.database, ours, *chosen)
    assert (report.result, report.states_checked) == ("equal", 2)
    with pytest.raises(StateNotFound):
        await run(log.database, models, state_ids=(*chosen, StateId("state-none")))


async def test_a_broken_link_at_the_beginning_of_a_range_is_found(
    log: Log, models: Models, copy: Path
) -> None:
    at = log.positions["generated"]
    with closing(sqlite3.connect(copy)) as connection:
        set_column(connection, at, "previous_hash", bytes(32))
        connection.commit()
    found = await run(copy, models, state_ids=(), after=Position(at - 1))
    assert [(one.position, one.field) for one in found.divergences] == [(at, "hash")]


# the mark


def content(path: Path) -> bytes:
    return path.read_bytes()


def put_content(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def marks_in(folder: Path) -> list[str]:
    """Files of marks, also of unfinished ones."""
    return [file.name for file in folder.iterdir() if ".verified" in file.name]


def mark_in(database: Path) -> dict[str, Any]:
    mark: dict[str, Any] = json.loads(Path(f"{database}.verified").read_text())
    return mark


async def test_what_was_found_equal_is_marked_beside_the_log(
    log: Log, models: Models, copy: Path
) -> None:
    before = content(copy)
    report = await run(copy, models, marks=FileMarks(copy))
    mark = mark_in(copy)
    model = await models.get(ModelId("cacher-tiny"))
    assert mark.pop("verified_at").endswith("Z")
    assert mark == {
        "log_id": query(copy, "SELECT log_id FROM log")[0][0],
        **report.head,
        "fingerprints": {"cacher-tiny": model.fingerprint.id},
    }
    assert content(copy) == before
    assert marks_in(copy.parent) == ["copy.db.verified"]


async def test_from_the_mark_on_only_what_is_new_is_computed(
    models: Models, tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(SETTINGS, database=str(tmp_path / "growing.db"))
    marks = marks_of(settings)
    async with open_service(settings) as service:
        state_id = await begin(service, "Once upon a time there was a little bear.")
        await draw(service, state_id)
        first = await Verifier(service.log, service.models, marks=marks).run(Request())
        await draw(service, state_id)
        verifier = Verifier(service.log, service.models, marks=marks)
        then = await verifier.run(Request(since_verified=True))
        last = Verifier(service.log, service.models, marks=marks)
        nothing_new = await last.run(Request(since_verified=True))
    assert (first.result, then.result) == ("equal", "equal")
    assert (then.range.after, then.range.until) == (2, 3)
    assert (then.events_checked, then.states_checked) == (1, 1)
    trusted = "events up to 2 were not re-executed: the mark says they were equal"
    assert (then.notes, first.notes) == ((trusted,), ())
    assert mark_in(tmp_path / "growing.db")["position"] == 3
    assert (nothing_new.events_checked, nothing_new.tokens_recomputed) == (0, 0)
    assert nothing_new.head == then.head


@pytest.mark.usefixtures("small_windows")
async def test_an_interrupted_verification_goes_on_at_the_mark(
    log: Log, models: Models, copy: Path
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.events_done >= 15:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run(copy, models, interrupt, FileMarks(copy), since_verified=True)
    assert mark_in(copy)["position"] == 15
    rest = await run(copy, models, marks=FileMarks(copy), since_verified=True)
    assert (rest.result, rest.range.after) == ("equal", 15)
    assert rest.events_checked == len(log.positions) - 15
    assert mark_in(copy)["position"] == len(log.positions)


async def test_a_verification_of_a_part_moves_no_mark(log: Log, models: Models, copy: Path) -> None:
    state_id = StateId(log.place("created")[1])
    for request in ({"state_ids": (state_id,)}, {"after": 3}, {"state_ids": ()}):
        assert (await run(copy, models, marks=FileMarks(copy), **request)).result == "equal"
        assert await FileMarks(copy).load() is None
    await run(copy, models, marks=FileMarks(copy), until=Position(9))
    assert mark_in(copy)["position"] == 9
    await run(copy, models, marks=FileMarks(copy))
    await run(copy, models, marks=FileMarks(copy), until=Position(9))
    assert mark_in(copy)["position"] == len(log.positions)  # it does not go back


async def put_mark(database: Path, models: Models, **changes: Any) -> None:
    await run(database, models, marks=FileMarks(database))
    mark = mark_in(database) | changes
    put_content(Path(f"{database}.verified"), json.dumps(mark).encode())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"log_id": "another"}, "there is none"),
        ({"fingerprints": {"cacher-tiny": "ab"}}, "another fingerprint of cacher-tiny"),
        ({"fingerprints": {"none": "ab"}}, "'none' is not served here"),
        ({"position": "x"}, "there is none"),
    ],
)
async def test_a_mark_that_says_nothing_any_more_is_not_used(
    changes: dict[str, Any], reason: str, log: Log, models: Models, copy: Path
) -> None:
    await put_mark(copy, models, **changes)
    report = await run(copy, models, marks=FileMarks(copy), since_verified=True)
    assert (report.result, report.events_checked) == ("equal", len(log.positions))
    (note,) = report.notes
    assert reason in note
    assert mark_in(copy)["hash"] == report.head["hash"]


@pytest.mark.parametrize(
    "changes", [{"hash": "00" * 32}, {"position": 41}, {"position": 2**70}, {"position": -1}]
)
async def test_a_mark_whose_row_is_not_in_the_log_is_a_head_that_was_remembered(
    changes: dict[str, Any], log: Log, models: Models, copy: Path
) -> None:
    await put_mark(copy, models, **changes)
    kept = mark_in(copy)
    for request in ({"since_verified": True}, {}, {"state_ids": ()}):
        report = await run(copy, models, marks=FileMarks(copy), **request)
        (found,) = report.divergences
        assert (found.position, found.field) == (kept["position"], "head")
        assert found.expected == kept["hash"]
        assert mark_in(copy) == kept
        told = [note for note in report.notes if "is not in the log as it was then" in note]
        assert len(told) == ("since_verified" in request)


async def test_a_tail_that_was_cut_is_missed_by_the_mark(models: Models, copy: Path) -> None:
    marks = FileMarks(copy)
    await run(copy, models, marks=marks)
    with closing(sqlite3.connect(copy)) as connection:
        remove_state(connection, head_of(copy).position)
        rehash_chain(connection)
        connection.commit()
    report = await run(copy, models, marks=marks)
    assert [one.field for one in report.divergences] == ["head"]
    assert (await run(copy, models)).result == "equal"  # without the mark nothing shows it


@pytest.mark.usefixtures("small_windows")
async def test_no_mark_is_moved_past_a_divergence_and_one_behind_it_is_taken_away(
    log: Log, models: Models, copy: Path
) -> None:
    at = log.positions["streamed"]
    original = content(copy)
    with closing(sqlite3.connect(copy)) as connection:
        FAULTS["a changed last token"].plant(connection, at)
        rehash_chain(connection)
        connection.commit()
    for _ in range(2):
        report = await run(copy, models, marks=FileMarks(copy), since_verified=True)
        assert (report.result, mark_in(copy)["position"]) == ("divergent", 5)
    put_content(copy, original)
    await run(copy, models, marks=FileMarks(copy))
    assert mark_in(copy)["position"] == len(log.positions)
    with closing(sqlite3.connect(copy)) as connection:
        FAULTS["a changed last token"].plant(connection, at)
        connection.commit()
    state_id = StateId(log.place("streamed")[1])
    await run(copy, models, marks=FileMarks(copy), state_ids=(state_id,))
    assert await FileMarks(copy).load() is None


async def test_a_drift_moves_no_mark_and_takes_none_away(models: Models, copy: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, dtype="bfloat16")
    async with open_models(settings) as elsewhere:
        report = await run(copy, elsewhere, marks=FileMarks(copy))
        assert report.result == "unverified"
        assert await FileMarks(copy).load() is None
        await run(copy, models, marks=FileMarks(copy))
        mark = mark_in(copy)
        await run(copy, elsewhere, marks=FileMarks(copy))
    assert mark_in(copy) == mark


async def test_a_mark_that_cannot_be_kept_is_said_and_nothing_else_changes(
    models: Models, copy: Path, tmp_path: Path
) -> None:
    marks = FileMarks(tmp_path / "no such folder" / "copy.db")
    report = await run(copy, models, marks=marks)
    assert report.result == "equal"
    assert report.notes[0].startswith("no verified mark could be kept: ")


async def test_a_remembered_head_before_the_mark_is_looked_up(
    log: Log, models: Models, copy: Path
) -> None:
    marks = FileMarks(copy)
    await run(copy, models, marks=marks)
    head = head_of(copy, 7)
    report = await run(copy, models, marks=marks, since_verified=True, head=head)
    assert (report.result, report.events_checked) == ("equal", 0)
    wrong = Head(head.position, bytes(32))
    report = await run(copy, models, marks=marks, since_verified=True, head=wrong)
    assert [one.field for one in report.divergences] == ["head"]
    assert await marks.load() is None
    far = Head(Position(2**80), head.hash)
    assert (await run(copy, models, state_ids=(), head=far)).result == "divergent"


async def test_a_mark_is_replaced_as_a_whole(tmp_path: Path) -> None:
    marks = FileMarks(tmp_path / "a.db")
    assert await marks.load() is None
    await marks.forget()
    for position in (1, 2):
        mark = Mark(log_id="a", position=Position(position), hash="00", fingerprints={})
        await marks.save(mark)
        assert await marks.load() == mark
    assert marks_in(tmp_path) == ["a.db.verified"]
    put_content(tmp_path / "a.db.verified", b"\xff{")
    assert await marks.load() is None
    await marks.forget()
    assert marks_in(tmp_path) == []


# what a divergence says


async def test_the_first_divergence_of_a_state_says_what_is_likely_there_now(
    log: Log, models: Models, copy: Path
) -> None:
    at = log.positions["continued"]
    with closing(sqlite3.connect(copy)) as connection:
        FAULTS["a changed digest of a continuation"].plant(connection, at)
        put("seed", value=9)(connection, log.positions["penalised"])
        rehash_chain(connection)
        connection.commit()
    report = await run(copy, models)
    first, *others = [one for one in report.divergences if one.state_id == log.place("several")[1]]
    assert (first.position, first.first, first.differences) == (at, True, {})
    assert len(first.alternatives) == 5
    logprobs = [one.logprob for one in first.alternatives]
    assert logprobs == sorted(logprobs, reverse=True)
    # The same as are recorded of an event that asked for them at that place.
    sql = "SELECT payload FROM events WHERE position = ?"
    payload = json.loads(query(log.database, sql, at)[0][0])
    (recorded,) = payload["continuations"][2]["alternatives"][4]
    assert msgspec.to_builtins(first.alternatives[0]) == recorded
    assert others
    assert not any(one.first or one.alternatives for one in others)


async def test_under_another_fingerprint_a_divergence_says_what_differs(
    log: Log, copy: Path
) -> None:
    with closing(sqlite3.connect(copy)) as connection:
        FAULTS["a changed text"].plant(connection, log.positions["generated"])
        rehash_chain(connection)
        connection.commit()
    async with open_models(msgspec.structs.replace(SETTINGS, dtype="bfloat16")) as elsewhere:
        report = await run(copy, elsewhere)
    found = report.divergences[0]
    assert (found.position, found.field) == (log.positions["generated"], "content.text")
    assert (report.result, found.first) == ("divergent", True)
    assert found.differences["dtype"] == ("float32", "bfloat16")


async def test_a_list_too_long_keeps_the_first_of_each_state(
    log: Log, models: Models, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("DELETE FROM fingerprints")
        rehash_chain(connection)
        connection.commit()
    whole = await run(copy, models)
    monkeypatch.setattr(findings, "MAX_LISTED", 0)
    short = await run(copy, models)
    assert short.divergences_found == whole.divergences_found == len(whole.divergences)
    assert list(short.divergences) == [one for one in whole.divergences if one.first]
    states = [one.state_id for one in whole.divergences]
    assert [one.state_id for one in short.divergences] == list(dict.fromkeys(states))
    assert len(short.divergences) < len(whole.divergences)


# what lies beside the events


Told = Callable[[sqlite3.Connection, str], None]

LISTED: dict[str, tuple[str, str]] = {
    "another version": ("version = version - 1", "states.version"),
    "deleted": ("deleted = 1 - deleted", "states.deleted"),
    "erased": ("erased = 1", "states.erased"),
}


@pytest.mark.parametrize("name", LISTED)
async def test_a_list_of_states_that_says_otherwise_is_found(
    name: str, log: Log, models: Models, copy: Path
) -> None:
    change, field = LISTED[name]
    _, state_id, _ = log.place("deleted")
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute(f"UPDATE states SET {change} WHERE state_id = ?", (state_id,))
        connection.commit()
    (found,) = (await run(copy, models)).divergences
    assert (found.position, found.state_id, found.field) == (
        log.positions["deleted"],
        state_id,
        field,
    )


async def test_logits_that_were_let_go_of_are_counted_and_some_of_an_event_are_missed(
    log: Log, models: Models, copy: Path
) -> None:
    at = log.positions["generated"]
    release = "UPDATE logits_kept SET released_until = ?"
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("DELETE FROM logits WHERE position = ?", (at,))
        connection.commit()
        assert [one.field for one in (await run(copy, models)).divergences] == ["logits"]
        connection.execute(release, (at - 1,))
        connection.commit()
        assert (await run(copy, models)).result == "divergent"
        connection.execute(release, (at,))
        connection.commit()
        report = await run(copy, models)
        assert (report.result, report.divergences) == ("equal", ())
        assert report.notes == ("the stored logits of 1 events are not there any more",)
        last = log.positions["kept in full"]
        connection.execute(release, (last,))
        connection.execute("DELETE FROM logits WHERE position = ? AND step = 0", (last,))
        connection.commit()
        (found,) = (await run(copy, models)).divergences
    assert (found.position, found.field) == (last, "logits")


async def tiled(path: Path) -> None:
    """A log of two full tiles and some more."""
    settings = msgspec.structs.replace(SETTINGS, database=str(path))
    async with open_service(settings) as service:
        state_id = await begin(service, "The end.")
        changes = ConfigChanged(changes=ConfigChanges(top_k=3))
        appends = [
            Append(state_id=state_id, expected_version=Version(version), event=changes)
            for version in range(1, 2 * TILE + 9)
        ]
        await service.log.append(appends, provenance=BY)


async def test_a_tile_that_is_not_that_of_its_events_is_found(
    models: Models, tmp_path: Path
) -> None:
    await tiled(tmp_path / "tiled.db")
    assert (await run(tmp_path / "tiled.db", models)).result == "equal"
    for change in ("hash = zeroblob(32)", "last_position = last_position - 1"):
        with tampering(tmp_path / "tiled.db", tmp_path / "copy.db", rehash=False) as connection:
            connection.execute(f"UPDATE tiles SET {change} WHERE number = 1")
        for after in (0, 9, TILE):
            report = await run(tmp_path / "copy.db", models, after=after)
            assert [(one.position, one.field) for one in report.divergences] == (
                [(2 * TILE, "tiles[1]")]
            )
            assert report.divergences[0].first
        beyond = await run(tmp_path / "copy.db", models, after=TILE + 1)
        assert beyond.result == "equal"  # its first event is not in the range


def import_all(connection: sqlite3.Connection, change: Callable[[Any], None]) -> None:
    """Let a log be one that was imported, but for what ``change`` makes of its fifth source."""
    rows = [as_row(columns) for columns in connection.execute(ROWS, (0, 2**62, -1)).fetchall()]
    for row in rows:
        source = source_of(row, "another log")
        told = msgspec.to_builtins(source)
        if row.position == 5:
            change(told)
        set_column(connection, row.position, "source", json.dumps(told))
    rehash_chain(connection)
    connection.commit()


SOURCES: dict[str, Callable[[Any], None]] = {
    "another hash": lambda told: told.update(hash="00" * 32),
    "another time": lambda told: told.update(recorded_at="2020-01-02T03:04:05.000006Z"),
    "another actor": lambda told: told.update(actor="someone"),
    "no hexadecimal": lambda told: told.update(previous_hash="xyz"),
    "something else": lambda told: told.clear(),
}


async def test_an_imported_log_is_equal_to_what_it_was(
    log: Log, models: Models, copy: Path
) -> None:
    with closing(sqlite3.connect(copy)) as connection:
        import_all(connection, lambda told: None)
    report = await run(copy, models)
    assert (report.result, report.imported) == ("equal", len(log.positions))
    assert report.imported_from == ("another log",)
    original = await run(log.database, models)
    assert (original.imported, original.imported_from) == (0, ())


@pytest.mark.parametrize("name", SOURCES)
async def test_a_source_that_is_not_that_of_the_event_is_found(
    name: str, models: Models, copy: Path
) -> None:
    with closing(sqlite3.connect(copy)) as connection:
        import_all(connection, SOURCES[name])
    found = (await run(copy, models)).divergences
    assert (found[0].position, found[0].field) == (5, "source")
    assert {one.position for one in found} == {5}


# erasure


async def test_what_was_erased_is_said_to_be_and_what_lost_its_key_diverges(
    models: Models, tmp_path: Path
) -> None:
    database = tmp_path / "erasable.db"
    settings = msgspec.structs.replace(SETTINGS, database=str(database), erasable=True)
    async with open_service(settings) as service:
        kept, lost = [await begin(service, text) for text in ("Once upon a time", "The end.")]
        for state_id in (kept, lost):
            await draw(service, state_id)
        before = await Verifier(service.log, service.models).run(Request())
        await service.log.erase([lost], provenance=BY)
        report = await Verifier(service.log, service.models).run(Request())
    assert (before.result, before.erased, before.states_checked) == ("equal", 0, 2)
    assert (report.result, report.divergences) == ("equal", ())
    assert (report.erased, report.states_checked, report.events_checked) == (1, 2, 5)
    assert (report.erased_states, before.erased_states) == ((lost,), ())
    assert 0 < report.tokens_recomputed < before.tokens_recomputed
    with closing(sqlite3.connect(f"{database}.keys")) as connection:
        connection.execute("UPDATE keys SET key = zeroblob(32) WHERE state_id = ?", (kept,))
        connection.commit()
    report = await run(database, models)
    (found,) = report.divergences
    assert (found.state_id, found.field, report.erased) == (kept, "event", 1)
    assert "sealed, key missing" in found.actual
