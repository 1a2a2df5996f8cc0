"""What a server does while its engine is busy with something else for as long as a test likes."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.service import MAX_LOOKS
from infra.engine.analysis.attention_kernels import Floats, LayerWeights
from infra.engine.engine import Engine
from tests.app.api import (
    Json,
    assert_problem,
    create,
    eventually,
    fork,
    generate,
    is_idle,
    metric,
    nothing_recorded,
    ok,
    read,
)
from tests.app.held import serving
from tests.infra.engine.bench import Gate

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

PLACES = 3


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Engine]]:
    database = tmp_path_factory.mktemp("held") / "cacher.db"
    with serving(database, max_queue=PLACES, max_batch=1) as running:
        yield running


def test_generations_that_wait_for_a_place_in_the_batch_are_counted_and_bounded(
    served: tuple[httpx.Client, Engine],
) -> None:
    client, engine = served
    wishes = [
        {"state_id": create(client)["state_id"], "max_tokens": 4, "stream": stream}
        for stream in (False, True, False, False)
    ]

    def ask(wish: Json) -> httpx.Response:
        return client.post("/v1/generate/token", json=wish)

    with Gate(engine) as gate, ThreadPoolExecutor(PLACES) as pool:
        gate.reach()
        asked = [pool.submit(ask, wish) for wish in wishes[:PLACES]]
        eventually(lambda: engine._commands.qsize() == PLACES)
        with Gate(engine) as behind:
            gate.open()
            behind.reach()  # the engine has taken all of them on, and made no step
            assert metric(client, "sequences_waiting") == PLACES
            assert metric(client, "requests_in_line") == PLACES
            for stream in (False, True):
                answer = ask({**wishes[PLACES], "stream": stream})
                problem = assert_problem(answer, 429, "queue-full")
                assert problem["limit"] == PLACES
                assert int(answer.headers["retry-after"]) >= 1
            assert ok(client.get("/health"))["status"] == "ok"
            assert not any(each.done() for each in asked)
        assert all(each.result().is_success for each in asked)
    eventually(lambda: is_idle(client))
    assert ask(wishes[PLACES]).is_success


def test_a_fork_needs_no_work_of_the_engine_and_no_memory(
    served: tuple[httpx.Client, Engine],
) -> None:
    client, engine = served
    tokens = list(range(2, 2 + 512))
    parent = ok(client.post("/v1/states", json={"tokens": tokens}))["state_id"]
    generate(client, parent, 1)
    names = [f"kv_{name}_bytes" for name in ("cached", "held", "shared", "free")]
    counted = ["kv_misses_total", "kv_evictions_total", *names]
    before = {name: metric(client, name) for name in counted}
    hits = metric(client, "kv_hits_total")
    with Gate(engine) as gate:
        gate.reach()
        forks = [state["state_id"] for state in fork(client, parent, version=1, n=16)]
        for state_id in forks:
            hot = read(client, state_id, include="cache")["cache"]
            assert hot == {"tier": "device", "tokens_hot": 512}
        assert engine._commands.empty()
    for state_id in forks:
        generate(client, state_id, 1)
    assert metric(client, "kv_hits_total") == hits + 16 * 16
    assert {name: metric(client, name) for name in counted} == before


def test_a_model_is_not_loaded_to_say_that_nothing_is_hot(database: Path) -> None:
    with serving(database) as (client, _):
        state_id = create(client)["state_id"]
        assert ok(client.get("/v1/models"))[0]["loaded"]
    with serving(database) as (client, _):
        cache = read(client, state_id, include="cache")["cache"]
        assert cache == {"tier": "none", "tokens_hot": 0}
        assert not ok(client.get("/v1/models"))[0]["loaded"]


def test_continuations_count_as_many_and_come_alone_if_they_are_more_than_the_line_holds(
    served: tuple[httpx.Client, Engine],
) -> None:
    client, engine = served
    first, second, third = (
        {"state_id": create(client)["state_id"], "n": n, "max_tokens": 2} for n in (2, 2, 9)
    )

    def ask(wish: Json) -> httpx.Response:
        return client.post("/v1/generate/multi", json=wish)

    with Gate(engine) as gate, ThreadPoolExecutor(2) as pool:
        gate.reach()
        waiting = pool.submit(ask, first)
        eventually(lambda: metric(client, "requests_in_line") == 2)
        for wish in (second, third):
            assert_problem(ask(wish), 429, "queue-full")
        single = pool.submit(generate, client, create(client)["state_id"], 1)
        eventually(lambda: metric(client, "requests_in_line") == PLACES)
        gate.open()
        assert single.result()["version"] == 2
        assert len(ok(waiting.result())["continuations"]) == 2
    eventually(lambda: is_idle(client))
    assert len(ok(ask(third))["continuations"]) == 9
    assert len(ok(ask(second))["continuations"]) == 2


def test_only_so_many_questions_about_the_inside_of_states_are_worked_on_at_once(
    tmp_path: Path,
) -> None:
    asked = MAX_LOOKS + 2
    with serving(tmp_path / "cacher.db") as (client, engine):
        state_id = create(client)["state_id"]
        question = {"state_id": state_id, "pooling": "mean"}
        ok(client.post("/v1/analyze/hidden", json=question))
        with Gate(engine) as gate, ThreadPoolExecutor(asked) as pool:
            gate.reach()
            answers = [
                pool.submit(client.post, "/v1/analyze/hidden", json=question) for _ in range(asked)
            ]
            eventually(lambda: metric(client, "requests_in_line") == asked)
            eventually(lambda: engine._commands.qsize() == MAX_LOOKS)
            ok(client.get("/v1/states"))  # has its answer, so who was to go on has gone on
            assert engine._commands.qsize() == MAX_LOOKS
            gate.open()
            for answer in answers:
                ok(answer.result())
        assert metric(client, "requests_in_line") == 0


def test_questions_that_wait_take_no_place_of_a_generation(
    served: tuple[httpx.Client, Engine],
) -> None:
    client, engine = served
    state_id = create(client)["state_id"]
    path = f"/v1/analyze/next/{state_id}"
    ok(client.get(path))
    with Gate(engine) as gate, ThreadPoolExecutor(PLACES + 1) as pool:
        gate.reach()
        asked = [pool.submit(client.get, path) for _ in range(PLACES)]
        eventually(lambda: metric(client, "requests_in_line") == PLACES)
        problem = assert_problem(client.get(path), 429, "queue-full")
        assert "questions are waiting" in problem["detail"]
        generation = pool.submit(generate, client, state_id, 1)
        eventually(lambda: metric(client, "requests_in_line") == PLACES + 1)
        gate.open()
        assert generation.result()["version"] == 2
        for answer in asked:
            ok(answer.result())
    eventually(lambda: is_idle(client))


def test_a_question_whose_client_has_left_is_worked_on_no_longer_than_its_thread_takes_to_end(
    served: tuple[httpx.Client, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = served
    state_id = create(client)["state_id"]
    rollout = {"state_id": state_id, "method": "rollout"}
    begun, enough, weighed = threading.Event(), threading.Event(), []
    weigh = LayerWeights.mean

    def mean(layer: LayerWeights, rows: range) -> Floats:
        begun.set()
        assert enough.wait(60)
        weighed.append(rows)
        return weigh(layer, rows)

    monkeypatch.setattr(LayerWeights, "mean", mean)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as leaving:
            asked = asyncio.ensure_future(leaving.post("/v1/analyze/attention", json=rollout))
            await asyncio.to_thread(begun.wait, 60)
            asked.cancel()
            await asyncio.wait((asked,))

    with nothing_recorded(client):
        asyncio.run(leave())
        for _ in range(5):
            assert metric(client, "requests_in_line") == 1, "the thread is still at it"
        enough.set()
        eventually(lambda: metric(client, "requests_in_line") == 0)
    assert len(weighed) == 1
    ok(client.post("/v1/analyze/attention", json=rollout))
    assert len(weighed) > 2, "in all layers"
