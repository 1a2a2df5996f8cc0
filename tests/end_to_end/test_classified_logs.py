"""Verification of states of classifiers and of what was classified."""

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec
import pytest
import pytest_asyncio

from app.bootstrap import open_models, open_service
from app.operations import states
from app.operations.analysis.analyze import analyze
from app.operations.verification.verify import Request, Verifier
from app.representations.forms import Wanted
from app.representations.negotiation import ranges
from app.service import Service
from domain.analysis.parameters import ClassifyParameters
from domain.config import ConfigChanges
from domain.content import Fragment
from domain.events import encode
from domain.ids import ModelId, StateId
from domain.models import Models
from domain.report import Report
from infra.log.sqlite_reader import SqliteReader
from tests.builders import generated
from tests.end_to_end.faults import Plant, put
from tests.end_to_end.tampering import edit, read, rehash_chain, set_column
from tests.end_to_end.test_verify import SETTINGS, call

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("models_kept"),
]

CREATED, FORWARDED, CLASSIFIED, ANOTHER_TEXT, _, LABELLED = range(1, 7)
"""Positions in the log."""

Planted = tuple[int, Plant, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(models_kept: None) -> AsyncIterator[Models]:
    async with open_models(SETTINGS) as store:
        yield store


async def begin(service: Service, model_id: str, text: str) -> StateId:
    (recorded,) = await states.create(
        service,
        call(),
        model_id=ModelId(model_id),
        content=states.Content(text, None),
        changes=ConfigChanges(),
        metadata={},
    )
    return recorded.state_id


async def ask(service: Service, state_id: StateId, parameters: ClassifyParameters) -> None:
    form = Wanted(parameters, ranges(""), None, service.results)
    await analyze(service, call(), state_id, None, parameters, form=form)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("classified") / "cacher.db"
    async with open_service(msgspec.structs.replace(SETTINGS, database=str(database))) as service:
        state_id = await begin(service, "cacher-tiny-sentiment", "Mia was")
        await states.forward(service, call(), state_id, states.Content(" so happy.", None))
        await ask(service, state_id, ClassifyParameters())
        await ask(service, state_id, ClassifyParameters(text="Tom was sad."))
        writer = await begin(service, "cacher-tiny", "Mia was very")
        await ask(service, writer, ClassifyParameters(labels=(" happy", " sad")))
    return database


async def verify(database: Path, models: Models) -> Report:
    async with await SqliteReader.open(database) as reader:
        return await Verifier(reader, models).run(Request())


async def test_what_was_classified_is_found_equal_and_nothing_of_its_tokens_is_computed(
    log: Path, models: Models
) -> None:
    report = await verify(log, models)
    assert (report.result, report.divergences, report.notes) == ("equal", (), ())
    assert (report.events_checked, report.states_checked, report.analyses) == (LABELLED, 2, 3)
    assert report.tokens_reused == 0


def generate_instead(connection: sqlite3.Connection, position: int) -> None:
    """What was appended is said to have been generated."""
    told = read(connection, position)
    content = msgspec.convert(told["content"], Fragment)
    payload = encode(generated(told["start"], content))
    set_column(connection, position, "type", "tokens_generated")
    set_column(connection, position, "payload", payload)


def score(connection: sqlite3.Connection, position: int) -> None:
    def change(payload: dict[str, dict[str, list[float]]]) -> None:
        payload["scores"]["logprobs"] = [-1.0] * len(payload["content"]["tokens"])

    edit(connection, position, change)


FAULTS: Final[dict[str, Planted]] = {
    "scores that no classifier gives": (FORWARDED, score, "len(scores.logprobs)"),
    "a text that a classifier wrote": (FORWARDED, generate_instead, "type"),
    "another text": (FORWARDED, put("content", "text", value="x" * 10), "content.text"),
    "another type of model": (CREATED, put("model_type", value="causal_lm"), "model_type"),
    "another result": (CLASSIFIED, put("result_digest", value="0" * 64), "result_digest"),
    "another text than was classified": (
        ANOTHER_TEXT,
        put("parameters", "text", value="Tom was glad."),
        "result_digest",
    ),
    "another label": (LABELLED, put("parameters", "labels", 0, value=" glad"), "result_digest"),
    "labels of a classifier": (
        CLASSIFIED,
        put("parameters", "labels", value=["a", "b"]),
        "parameters",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_behind_the_chain_is_found(
    log: Path, models: Models, tmp_path: Path, name: str
) -> None:
    position, plant, field = FAULTS[name]
    copy = Path(shutil.copyfile(log, tmp_path / "copy.db"))
    with closing(sqlite3.connect(copy)) as connection:
        plant(connection, position)
        rehash_chain(connection)
        connection.commit()
    report = await verify(copy, models)
    assert report.result == "divergent"
    assert (report.divergences[0].position, report.divergences[0].field) == (position, field)
