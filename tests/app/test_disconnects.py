"""Clients that leave: their place and their memory are free at once, and the others go on."""

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from app import bootstrap
from app.service import Call, Service
from app.settings import Settings
from domain.config import ConfigChanges
from domain.events import ConfigChanged
from infra.engine.engine import Engine
from tests import builders
from tests.app.api import (
    LONG_TEXT,
    OPENING,
    Json,
    assert_verified,
    create,
    events,
    eventually,
    generate,
    is_idle,
    metric,
    multi,
    nothing_recorded,
    read,
    read_sent,
    tokens_of,
)
from tests.app.held import asked, held_after, serving
from tests.builders import append, created
from tests.infra.engine.bench import Gate

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

TOKEN, MULTI, BEAM = "/v1/generate/token", "/v1/generate/multi", "/v1/generate/beam"
HOT: Json = {"temperature": 1.5, "top_p": 1.0, "ignore_eos": True}
LONG: Json = {"max_tokens": 200, **HOT}


class Held(NamedTuple):
    """A server whose engine can be held."""

    client: httpx.Client
    engine: Engine


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    with serving(tmp_path_factory.mktemp("left") / "cacher.db", max_batch=8) as running:
        yield Held(*running)


@contextmanager
def streaming(client: httpx.Client, path: str = TOKEN, **body: Any) -> Iterator[Any]:
    """The events of a stream as they come."""
    with client.stream("POST", path, json={"stream": True, **body}) as answer:
        yield read_sent(answer)


def in_use(client: httpx.Client) -> tuple[float, float]:
    """Texts that run or wait, and blocks that they hold."""
    return metric(client, "kv_sequences"), metric(client, "kv_blocks_held")


@pytest.mark.parametrize(
    ("path", "wish", "places"), [(TOKEN, {}, 1), (MULTI, {"n": 6, "max_tokens": 100}, 6)]
)
def test_a_stream_that_is_left_draws_no_further_token_and_holds_nothing(
    held: Held, path: str, wish: Json, places: int
) -> None:
    client = held.client
    state = create(client, text=OPENING + LONG_TEXT)
    body = {"state_id": state["state_id"], **LONG, **wish}
    with held_after(held.engine, 4) as pause:
        with streaming(client, path, **body) as stream:
            received = list(islice(stream, 4))
            assert in_use(client)[0] == places
            assert in_use(client)[1] > 0
            assert metric(client, "requests_in_line") == places
        eventually(lambda: metric(client, "requests_in_line") == 0)
        recorded = events(client, state["state_id"])[-1]
        with Gate(held.engine) as behind:
            pause.goes_on.set()
            behind.reach()  # the engine has done what it was told, and made no further step
            assert in_use(client) == (0, 0)
    runs = recorded["payload"].get("continuations", [recorded["payload"]])
    tokens = [run["content"]["tokens"] for run in runs]
    assert recorded["version"] == 2
    assert len(tokens) == places
    assert {run["finish_reason"] for run in runs} == {"cancelled"}
    assert 4 <= sum(map(len, tokens)) < places * body["max_tokens"]
    for one in received:
        data = one.data
        assert tokens[data.get("branch", 0)][data["index"]] == data["token_id"]
    moved = 0 if path == MULTI else len(tokens[0])
    assert read(client, state["state_id"])["head_position"] == state["head_position"] + moved


@pytest.mark.parametrize(
    ("path", "wish", "places"),
    [
        (TOKEN, LONG, 1),
        (MULTI, {"n": 3, **LONG}, 3),
        (BEAM, {"num_beams": 4, "max_length": 200}, 4),
        (TOKEN, {"stream": True, **LONG}, 1),
        (MULTI, {"stream": True, "n": 3, **LONG}, 3),
    ],
    ids=["token", "multi", "beam", "token streamed", "multi streamed"],
)
def test_a_client_that_leaves_before_anything_was_sent_leaves_nothing_behind(
    held: Held, path: str, wish: Json, places: int
) -> None:
    client = held.client
    state = create(client, text=OPENING + LONG_TEXT)
    body = {"state_id": state["state_id"], **wish}
    with nothing_recorded(client), Gate(held.engine) as gate:
        gate.reach()
        with asked(client, path, body, in_line=places):
            pass
        eventually(lambda: metric(client, "requests_in_line") == 0)
        with Gate(held.engine) as behind:
            gate.open()
            behind.reach()
            assert in_use(client) == (0, 0)
    assert read(client, state["state_id"]) == state


@pytest.mark.parametrize(
    ("path", "wish", "places"),
    [
        (TOKEN, LONG, 1),
        (MULTI, {"n": 3, **LONG}, 3),
        (BEAM, {"num_beams": 4, "max_length": 200}, 4),
    ],
    ids=["token", "multi", "beam"],
)
def test_a_client_that_leaves_while_its_answer_is_made_leaves_nothing_behind(
    held: Held, path: str, wish: Json, places: int
) -> None:
    client = held.client
    state = create(client)
    body = {"state_id": state["state_id"], **wish}
    with nothing_recorded(client), held_after(held.engine, 4) as pause:
        with asked(client, path, body, in_line=places):
            assert pause.begun.wait(60)
            assert in_use(client) > (0, 0)
        eventually(lambda: metric(client, "requests_in_line") == 0)
        with Gate(held.engine) as behind:
            pause.goes_on.set()
            behind.reach()
            assert in_use(client) == (0, 0)
    assert read(client, state["state_id"]) == state
    assert generate(client, state["state_id"], 2)["version"] == 2


def test_one_who_waits_for_a_state_and_leaves_is_not_waited_for(held: Held) -> None:
    client = held.client
    state_id = create(client)["state_id"]
    with streaming(client, state_id=state_id, **LONG) as stream:
        with held_after(held.engine, 2):
            next(stream)
            with asked(client, TOKEN, {"state_id": state_id, **LONG}, in_line=2):
                pass
            eventually(lambda: metric(client, "requests_in_line") == 1)
        *_, done = stream
    assert done.name == "done"
    assert [event["version"] for event in events(client, state_id)] == [1, 2]
    eventually(lambda: is_idle(client))


def test_a_reader_that_reads_nothing_holds_nobody_up(held: Held) -> None:
    client = held.client
    lazy = create(client)["state_id"]
    with streaming(client, state_id=lazy, **{**LONG, "max_tokens": 900}) as stream:
        for number in range(3):
            assert generate(client, create(client)["state_id"], 8, seed=number)["version"] == 2
        eventually(lambda: read(client, lazy)["version"] == 2)
        eventually(lambda: is_idle(client))
        *tokens, done = stream
    assert (len(tokens), done.name) == (900, "done")


def _read_and_leave(client: httpx.Client, body: Json, path: str, count: int) -> list[Json]:
    """The first ``count`` tokens of a stream, or all that come."""
    with streaming(client, path, **body) as stream:
        return [one.data for one in islice(stream, count) if one.name == "token"]


def test_of_thirty_two_streams_left_at_random_nothing_leaks_and_no_state_is_stuck(
    held: Held,
) -> None:
    client, chance = held.client, random.Random(5)
    left: list[tuple[str, Json, str, int]] = []
    for number in range(32):
        wish: Json = {"max_tokens": 96, "seed": number % 4, **HOT}
        path = chance.choice((TOKEN, TOKEN, MULTI))
        wish |= {"n": 3} if path == MULTI else {}
        left.append((create(client)["state_id"], wish, path, chance.randrange(40)))
    whole = {
        seed: generate(client, create(client)["state_id"], 96, seed=seed, **HOT)["token_ids"]
        for seed in range(4)
    }
    with ThreadPoolExecutor(32) as pool:
        received = list(
            pool.map(
                lambda one: _read_and_leave(client, {"state_id": one[0], **one[1]}, *one[2:]), left
            )
        )
    eventually(lambda: is_idle(client))
    cancelled = 0
    for (state_id, wish, _, _), tokens in zip(left, received, strict=True):
        recorded = events(client, state_id)[1:]
        assert len(recorded) <= 1
        assert recorded or not tokens
        for event in recorded:
            runs = event["payload"].get("continuations", [event["payload"]])
            cancelled += any(run["finish_reason"] == "cancelled" for run in runs)
            first = runs[0]["content"]["tokens"]
            assert first == whole[wish["seed"]][: len(first)]
            for one in tokens:
                run = runs[one.get("branch", 0)]["content"]
                assert run["tokens"][one["index"]] == one["token_id"]
        held_before = tokens_of(client, state_id)
        went_on = generate(client, state_id, 2, seed=1)
        assert tokens_of(client, state_id) == held_before + went_on["token_ids"]
    assert cancelled
    assert is_idle(client)
    assert_verified(client, *(state_id for state_id, *_ in left[:8]))


def test_a_stream_that_was_left_and_one_that_was_not_draw_the_same_from_then_on(
    held: Held,
) -> None:
    client = held.client
    cut, never = (create(client)["state_id"] for _ in range(2))
    _read_and_leave(client, {"state_id": cut, "seed": 2, **LONG}, TOKEN, 5)
    eventually(lambda: read(client, cut)["version"] == 2)
    count = len(events(client, cut)[-1]["payload"]["content"]["tokens"])
    generate(client, never, count, seed=2, **HOT)
    for state_id in (cut, never):
        multi(client, state_id, 2, 2, seed=1, **HOT)
    drawn = [generate(client, one, 6, seed=2, **HOT)["token_ids"] for one in (cut, never)]
    assert drawn[0] == drawn[1]


# left as the answer is written


async def test_who_leaves_while_an_event_is_written_leaves_a_state_that_goes_on_from_it(
    database: Path,
) -> None:
    settings = Settings(model_name="cacher-tiny", database=str(database))
    bootstrap.migrate(settings)
    call = Call(actor="client", request_id="request")
    change = ConfigChanged(changes=ConfigChanges(top_k=3))
    async with bootstrap.open_service(settings) as service:
        await service.append(call, [append(created())])
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # the log's writer waits for it
            leaving = asyncio.create_task(service.append(call, [append(change, 1)]))
            await _until_waiting(service, 1)
            leaving.cancel()
            await asyncio.sleep(0)
            other.execute("ROLLBACK")
            await asyncio.wait((leaving,))
        await _until_waiting(service, 0)
        assert leaving.cancelled()
        assert len(await service.log.state_rows(builders.state_id())) == 2
        assert (await service.live(builders.state_id())).version == 2
        (after,) = await service.append(call, [append(change, 2)])
        assert after.version == 3


async def _until_waiting(service: Service, count: int) -> None:
    """Wait until so many appends are not answered yet."""
    writer = service.log._writer  # type: ignore[attr-defined]
    await asyncio.to_thread(eventually, lambda: writer._unanswered == count)
