"""Verification asks anew what was asked about the inside of states, and finds what was changed.

Each fault is planted twice: raw, and with the whole chain hashed anew behind it.
"""

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import pytest
import pytest_asyncio

from app.bootstrap import marks, open_models, open_service
from app.operations import states
from app.operations.analysis.analyze import analyze
from app.operations.analysis.compare import settled
from app.operations.verification.verify import Request, Verifier
from app.representations.forms import Wanted
from app.representations.negotiation import ranges
from app.service import Call, Service
from domain.analysis.parameters import CompareWish, NextParameters, Parameters
from domain.analysis.result import FORM, Result, ResultChanged
from domain.fingerprint import Fingerprint
from domain.ids import Position, StateId, Version
from domain.models import Models
from domain.report import Report
from infra.log.sqlite_reader import SqliteReader
from tests.builders import idempotency
from tests.end_to_end import result_digests
from tests.end_to_end.calls import query
from tests.end_to_end.faults import Plant, column, other_hex, put
from tests.end_to_end.tampering import set_column, tampering
from tests.end_to_end.test_verify import SETTINGS, begin, call, draw

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("models_kept"),
]


class Looked(NamedTuple):
    """A log of three states and what was asked about them, by position.

    1 the first begins, 2 is generated; 3 what comes next is asked; 4 the second begins; 5 what
    comes next is asked; 6 it is generated; 7 the first is asked as it was at first; 8 the third
    begins, 9 is asked, 10 is deleted.
    """

    database: Path
    states: tuple[StateId, StateId, StateId]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(models_kept: None) -> AsyncIterator[Models]:
    async with open_models(SETTINGS) as store:
        yield store


async def ask(
    service: Service,
    state_id: StateId,
    parameters: Parameters,
    version: int | None = None,
    *,
    by: Call | None = None,
) -> Result:
    at = None if version is None else Version(version)
    form = Wanted(parameters, ranges(""), None, service.results)
    found = await analyze(service, by or call(), state_id, at, parameters, form=form)
    return found.result


async def write(database: Path, *, erasable: bool) -> Looked:
    settings = msgspec.structs.replace(SETTINGS, database=str(database), erasable=erasable)
    async with open_service(settings) as service:
        first = await begin(service, "Once upon a time")
        await draw(service, first)
        await ask(service, first, NextParameters())
        second = await begin(service, "The end.")
        await ask(service, second, NextParameters(top_k=3))
        await draw(service, second)
        await ask(service, first, NextParameters(), version=1)
        third = await begin(service, "Now and then")
        await ask(service, third, NextParameters())
        await states.delete(service, call(), third)
    return Looked(database, (first, second, third))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def looked(tmp_path_factory: pytest.TempPathFactory) -> Looked:
    return await write(tmp_path_factory.mktemp("looked") / "cacher.db", erasable=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sealed(tmp_path_factory: pytest.TempPathFactory) -> Looked:
    return await write(tmp_path_factory.mktemp("sealed") / "cacher.db", erasable=True)


async def verify(database: Path, models: Models, **request: Any) -> Report:
    async with await SqliteReader.open(database) as reader:
        return await Verifier(reader, models).run(Request(**request))


def of_state(number: int) -> Plant:
    """Let an analysis be one of the state that begins at a position."""

    def plant(connection: sqlite3.Connection, position: int) -> None:
        sql = "SELECT state_id FROM events WHERE position = ?"
        (state_id,) = connection.execute(sql, (number,)).fetchone()
        set_column(connection, position, "state_id", state_id)

    return plant


def with_a_version(connection: sqlite3.Connection, position: int) -> None:
    set_column(connection, position, "version", 3)
    set_column(connection, position, "at_version", None)


NOWHERE = {"kind": "embedding", "token_index": 5000}

FAULTS: dict[str, tuple[int, Plant, str]] = {
    "another digest": (3, put("result_digest", value=other_hex), "result_digest"),
    "another question": (3, put("parameters", "top_k", value=4), "result_digest"),
    "another version": (3, column("at_version", 1), "result_digest"),
    "another state": (7, of_state(4), "result_digest"),
    "another state that was not there yet": (3, of_state(4), "at_version"),
    "a version that never was": (3, column("at_version", 3), "at_version"),
    "a version that came later": (5, column("at_version", 2), "at_version"),
    "no version": (3, column("at_version", None), "at_version"),
    "a version of its own": (3, with_a_version, "version"),
    "both versions": (3, column("version", 3), "version"),
    "after its state had ended": (9, column("position", 11), "at_version"),
    "no numerics": (3, column("fingerprint", None), "fingerprint"),
    "a question without an answer": (3, put("parameters", value=NOWHERE), "parameters"),
    "no analysis": (3, put("parameters", value={"kind": "x"}), "event"),
    "a form that never was": (3, put("form", value=0), "event"),
}


async def test_analyses_are_made_again_and_counted(looked: Looked, models: Models) -> None:
    report = await verify(looked.database, models)
    assert (report.result, report.divergences, report.notes) == ("equal", (), ())
    assert (report.events_checked, report.analyses, report.tokens_reused) == (10, 4, 0)


@pytest.mark.parametrize("name", FAULTS)
async def test_behind_a_whole_chain_re_execution_finds(
    name: str, looked: Looked, models: Models, tmp_path: Path
) -> None:
    position, plant, field = FAULTS[name]
    with tampering(looked.database, tmp_path / "copy.db", rehash=True) as connection:
        plant(connection, position)
    report = await verify(tmp_path / "copy.db", models)
    assert report.result == "divergent"
    at = 11 if name == "after its state had ended" else position
    found = [(one.position, one.field) for one in report.divergences]
    assert (at, field) in found
    assert {position for position, _ in found} == {at}
    assert "hash" not in {field for _, field in found}


@pytest.mark.parametrize("name", FAULTS)
async def test_in_a_chain_left_as_it_was_the_chain_finds(
    name: str, looked: Looked, models: Models, tmp_path: Path
) -> None:
    position, plant, _ = FAULTS[name]
    with tampering(looked.database, tmp_path / "copy.db", rehash=False) as connection:
        plant(connection, position)
    report = await verify(tmp_path / "copy.db", models, state_ids=())
    broken = [one.position for one in report.divergences if one.field == "hash"]
    assert broken == ([10, 11] if name == "after its state had ended" else [position])


async def test_one_state_is_verified_with_its_analyses_and_so_are_parts_of_the_log(
    looked: Looked, models: Models
) -> None:
    first, _, third = looked.states
    alone = await verify(looked.database, models, state_ids=(first,))
    assert (alone.result, alone.events_checked, alone.analyses) == ("equal", 4, 2)
    gone = await verify(looked.database, models, state_ids=(third,))
    assert (gone.result, gone.events_checked, gone.analyses) == ("equal", 3, 1)
    for after, analyses in enumerate([4, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]):
        part = await verify(looked.database, models, after=Position(after))
        assert (after, part.result, part.analyses) == (after, "equal", analyses)
    begun = await verify(looked.database, models, until=Position(5))
    assert (begun.result, begun.analyses) == ("equal", 2)


async def test_what_was_asked_under_other_numerics_is_named_as_not_held(
    looked: Looked, models: Models, tmp_path: Path
) -> None:
    (model_fingerprint,) = query(looked.database, "SELECT document FROM fingerprints")[0]
    other = Fingerprint.of({**msgspec.json.decode(model_fingerprint), "torch": "another"})
    with tampering(looked.database, tmp_path / "copy.db", rehash=True) as connection:
        columns = msgspec.structs.astuple(other)
        connection.execute("INSERT INTO fingerprints VALUES (?, ?, ?)", columns)
        set_column(connection, 3, "fingerprint", other.id)
        put("result_digest", value=other_hex)(connection, 3)
    report = await verify(tmp_path / "copy.db", models)
    assert (report.result, report.divergences, report.drifts) == ("unverified", (), ())
    assert report.notes == (
        "some analyses were made under other numerics: there is no measure of how far what they"
        " found is from what would be found now",
    )


# what results look like


async def test_what_is_found_is_digested_to_the_same_as_ever(models: Models) -> None:
    written, found = result_digests.written(), await result_digests.found_by(models)
    changed = sorted(name for name in written if found.get(name) != written[name])
    assert not changed, f"{', '.join(changed)}: {result_digests.WHAT_TO_DO}"
    assert found.keys() == written.keys(), (
        "a question is new: python -m tests.end_to_end.result_digests"
    )
    assert len(set(written.values())) == len(written)
    assert {type(one) for one in result_digests.ASKED.values()} == set(get_args(Parameters))


async def test_digests_of_another_form_are_named_as_not_held_and_never_called_wrong(
    looked: Looked, models: Models, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.db"
    with tampering(looked.database, copy, rehash=True) as connection:
        put("form", value=FORM + 1)(connection, 7)
        put("form", value=FORM + 2)(connection, 3)
        put("result_digest", value=other_hex)(connection, 3)
    mark = marks(msgspec.structs.replace(SETTINGS, database=str(copy)))
    async with await SqliteReader.open(copy) as reader:
        report = await Verifier(reader, models, marks=mark).run(Request())
    assert (report.result, report.divergences, report.analyses) == ("unverified", (), 4)
    assert report.notes == (
        f"analyses recorded in another form than {FORM}, that of this release, were not asked"
        " again: 2, at positions 3, 7; nothing says whether their digests are right",
    )
    assert await mark.load() is None
    async with await SqliteReader.open(looked.database) as reader:  # the same, as it was recorded
        assert (await Verifier(reader, models, marks=mark).run(Request())).result == "equal"
    assert await mark.load() is not None


async def test_another_form_hides_nothing_else(
    looked: Looked, models: Models, tmp_path: Path
) -> None:
    for plant, field in ((column("fingerprint", None), "fingerprint"), FAULTS["no version"][1:]):
        with tampering(looked.database, tmp_path / "copy.db", rehash=True) as connection:
            put("form", value=FORM + 1)(connection, 3)
            plant(connection, 3)
        report = await verify(tmp_path / "copy.db", models)
        assert [(one.position, one.field) for one in report.divergences] == [(3, field)]


async def test_a_retry_is_told_what_was_found_at_first_or_that_it_is_something_else_now(
    tmp_path: Path,
) -> None:
    database = tmp_path / "cacher.db"
    by = Call(actor="tester", request_id="request", idempotency=idempotency())
    async with open_service(msgspec.structs.replace(SETTINGS, database=str(database))) as service:
        state_id = await begin(service, "Once upon a time")
        first = await ask(service, state_id, NextParameters(), by=by)
        with closing(sqlite3.connect(database)) as connection, connection:
            put("form", value=FORM + 1)(connection, 2)
        assert await ask(service, state_id, NextParameters(), by=by) == first
        with closing(sqlite3.connect(database)) as connection, connection:
            put("result_digest", value=other_hex)(connection, 2)
        with pytest.raises(ResultChanged, match=state_id):
            await ask(service, state_id, NextParameters(), by=by)
        assert (await service.log.head()).position == 2


# what is sealed


async def erase(looked: Looked, folder: Path, *erased: StateId) -> Path:
    """A copy of an erasable log in which states are erased."""
    copy = folder / "copy.db"
    for suffix in ("", ".keys"):
        shutil.copyfile(f"{looked.database}{suffix}", f"{copy}{suffix}")
    settings = msgspec.structs.replace(SETTINGS, database=str(copy), erasable=True)
    async with open_service(settings) as service:
        for state_id in erased:
            await service.erase(call(), [state_id])
    return copy


async def test_sealed_analyses_are_verified_and_those_of_erased_states_are_followed(
    sealed: Looked, models: Models, tmp_path: Path
) -> None:
    report = await verify(sealed.database, models)
    assert (report.result, report.analyses, report.erased) == ("equal", 4, 0)
    first, _, third = sealed.states
    copy = await erase(sealed, tmp_path, first, third)
    report = await verify(copy, models)
    assert (report.result, report.analyses, report.erased) == ("equal", 4, 2)
    alone = await verify(copy, models, after=Position(6), until=Position(7))
    assert (alone.result, alone.erased, alone.erased_states) == ("equal", 1, (first,))
    for position, at in ((7, 3), (9, 2)):
        with tampering(copy, tmp_path / "again.db", rehash=True) as connection:
            set_column(connection, position, "at_version", at)
        found = (await verify(tmp_path / "again.db", models)).divergences
        assert (position, "at_version") in [(one.position, one.field) for one in found]


async def test_a_sealed_analysis_that_was_moved_does_not_open(
    sealed: Looked, models: Models, tmp_path: Path
) -> None:
    copy = await erase(sealed, tmp_path)
    with tampering(copy, tmp_path / "moved.db", rehash=True) as connection:
        of_state(4)(connection, 7)
    shutil.copyfile(f"{copy}.keys", tmp_path / "moved.db.keys")
    report = await verify(tmp_path / "moved.db", models)
    assert [(one.position, one.field) for one in report.divergences] == [(7, "event")]


async def test_without_keys_sealed_analyses_are_followed(
    sealed: Looked, models: Models, tmp_path: Path
) -> None:
    shutil.copyfile(sealed.database, tmp_path / "copy.db")
    report = await verify(tmp_path / "copy.db", models)
    assert (report.result, report.divergences, report.analyses) == ("unverified", (), 4)


# what is held against another state


async def write_compared(database: Path, *, erasable: bool) -> Looked:
    """1 the first begins, 2 the second; 3 they are compared; 4 the second is generated."""
    settings = msgspec.structs.replace(SETTINGS, database=str(database), erasable=erasable)
    async with open_service(settings) as service:
        first = await begin(service, "Once upon a time")
        second = await begin(service, "Once upon a bear")
        question = await settled(service, CompareWish(other_state_id=second))
        await ask(service, first, question)
        await draw(service, second)
    return Looked(database, (first, second, second))


COMPARED: dict[str, tuple[Plant, str]] = {
    "another digest": (put("result_digest", value=other_hex), "result_digest"),
    "a part of it": (put("parameters", "end", value=2), "result_digest"),
    "a version that came later": (put("parameters", "other_version", value=2), "parameters"),
    "no version": (put("parameters", "other_version", value=2**70), "parameters"),
    "no state": (put("parameters", "other_state_id", value="state-none"), "parameters"),
    "other numerics": (put("parameters", "other_fingerprint", value=other_hex), "parameters"),
}


async def test_what_is_planted_in_a_comparison_is_found(models: Models, tmp_path: Path) -> None:
    compared = await write_compared(tmp_path / "cacher.db", erasable=False)
    report = await verify(compared.database, models)
    assert (report.result, report.analyses, report.notes) == ("equal", 1, ())
    for name, (plant, field) in COMPARED.items():
        with tampering(compared.database, tmp_path / "copy.db", rehash=True) as connection:
            plant(connection, 3)
        report = await verify(tmp_path / "copy.db", models)
        found = [(one.position, one.field) for one in report.divergences]
        assert (name, found) == (name, [(3, field)])


async def test_a_comparison_with_what_was_erased_is_named_and_cannot_be_made_again(
    models: Models, tmp_path: Path
) -> None:
    compared = await write_compared(tmp_path / "cacher.db", erasable=True)
    assert (await verify(compared.database, models)).notes == ()
    copy = await erase(compared, tmp_path, compared.states[1])
    report = await verify(copy, models)
    assert (report.result, report.erased, report.analyses) == ("equal", 1, 1)
    assert report.notes == (
        "some analyses compare with what cannot be read any more: they were not re-executed",
    )
