"""Verification over HTTP as a job: waited for or not, one at a time, cancelled, bounded."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.bootstrap import open_service
from app.jobs import Job, Jobs
from app.routes.replay import MAX_WAIT_S, WAIT_S, preferred_wait, report_of
from app.settings import Settings
from domain.errors import QueueFull, Unavailable
from domain.report import Progress, Report
from infra.engine.engine import Engine
from tests.app.api import (
    Json,
    assert_problem,
    create,
    eventually,
    generate,
    head,
    metric,
    ok,
    verify,
)
from tests.app.held import serving
from tests.infra.engine.bench import Gate

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

Served = tuple[httpx.Client, Engine]
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    database = tmp_path_factory.mktemp("replays") / "cacher.db"
    with serving(database) as running:
        client, _ = running
        generate(client, create(client)["state_id"])
        yield running


def begin(client: httpx.Client, **body: Any) -> Json:
    """Begin a verification without waiting for it."""
    answer = client.post("/v1/replay/verify", json=body or {"all": True}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    replay: Json = answer.json()
    assert answer.headers["location"] == f"/v1/replay/{replay['replay_id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert int(answer.headers["retry-after"]) >= 1
    return replay


def look(client: httpx.Client, replay: Json) -> Json:
    found: Json = ok(client.get(f"/v1/replay/{replay['replay_id']}"))
    return found


def ended(client: httpx.Client, replay: Json) -> Json:
    eventually(lambda: look(client, replay)["status"] not in ("waiting", "running"))
    return look(client, replay)


# given a log / when its verification is asked for / then


def test_a_short_verification_answers_at_once(served: Served) -> None:
    client, _ = served
    answer = client.post("/v1/replay/verify", json={"all": True})
    assert answer.status_code == 200
    assert "location" not in answer.headers
    assert "preference-applied" not in answer.headers
    waited = client.post("/v1/replay/verify", json={"all": True}, headers={"Prefer": "wait=30"})
    assert (waited.status_code, waited.headers["preference-applied"]) == (200, "wait=30")
    assert waited.json() == answer.json()
    assert answer.json()["result"] == "equal"


def test_one_that_is_not_waited_for_gives_the_same_report_later(served: Served) -> None:
    client, _ = served
    replay = ended(client, begin(client))
    assert (replay["status"], replay["problem"]) == ("done", None)
    assert replay["report"] == verify(client, all=True)
    events = head(client)["position"]
    assert replay["progress"] == {
        "events_done": events,
        "events_total": events,
        "tokens": replay["report"]["tokens_recomputed"],
    }
    assert replay["created_at"] <= replay["started_at"] <= replay["ended_at"]


def test_what_takes_longer_than_the_wait_is_answered_202_and_goes_on(served: Served) -> None:
    client, engine = served
    with Gate(engine) as gate:
        gate.reach()
        answer = client.post("/v1/replay/verify", json={"all": True}, headers={"Prefer": "wait=1"})
        assert answer.status_code == 202
        assert answer.headers["preference-applied"] == "wait=1"
        replay = answer.json()
        assert (replay["status"], replay["report"], replay["ended_at"]) == ("running", None, None)
        assert replay["progress"]["events_done"] < replay["progress"]["events_total"]
        assert look(client, replay)["status"] == "running"
        assert ok(client.get("/health"))["status"] == "ok"
    assert ended(client, replay)["report"]["result"] == "equal"


def test_one_runs_at_a_time_and_any_can_be_cancelled(served: Served) -> None:
    client, engine = served
    with Gate(engine) as gate:
        gate.reach()
        first, second, third = begin(client), begin(client), begin(client)
        eventually(lambda: look(client, first)["status"] == "running")
        for waiting in (second, third):
            shown = look(client, waiting)
            assert (shown["status"], shown["started_at"], shown["progress"]) == (
                "waiting",
                None,
                None,
            )
        for replay in (second, first):
            cancelled = ok(client.delete(f"/v1/replay/{replay['replay_id']}"))
            assert (cancelled["status"], cancelled["report"]) == ("cancelled", None)
            assert cancelled["ended_at"]
        eventually(lambda: look(client, third)["status"] == "running")
    assert ended(client, third)["status"] == "done"
    kept = ok(client.delete(f"/v1/replay/{third['replay_id']}"))
    assert kept == look(client, third)  # what has ended stays as it is
    assert look(client, first)["status"] == "cancelled"
    assert metric(client, "kv_sequences") == 0


def test_too_many_that_wait_are_refused(served: Served) -> None:
    client, engine = served
    with Gate(engine) as gate:
        gate.reach()
        begun = [begin(client) for _ in range(17)]
        answer = client.post("/v1/replay/verify", json={"all": True})
        assert assert_problem(answer, 429, "queue-full")["limit"] == 16
        for replay in begun[::-1]:
            ok(client.delete(f"/v1/replay/{replay['replay_id']}"))
    assert verify(client, all=True)["result"] == "equal"


def test_a_client_that_leaves_ends_what_nobody_else_knows_of(served: Served) -> None:
    client, engine = served
    with Gate(engine) as gate:
        gate.reach()
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/replay/verify", json={"all": True}, timeout=0.5)
        replay = begin(client)
        # The engine is held: the next one runs because the one before it has gone.
        eventually(lambda: look(client, replay)["status"] == "running")
    assert ended(client, replay)["status"] == "done"


def test_generation_goes_on_beside_a_verification(served: Served) -> None:
    client, engine = served
    state_id = create(client)["state_id"]
    with Gate(engine) as gate, ThreadPoolExecutor(1) as pool:
        gate.reach()
        replay = begin(client)
        eventually(lambda: look(client, replay)["status"] == "running")
        generation = pool.submit(generate, client, state_id)
        eventually(lambda: metric(client, "requests_in_line") == 1)
        gate.open()
        assert generation.result()["version"] == 2
    assert ended(client, replay)["report"]["result"] == "equal"


def test_some_states_a_range_and_what_is_new_can_be_asked_for(served: Served) -> None:
    client, _ = served
    states = [create(client)["state_id"] for _ in range(2)]
    report = verify(client, state_ids=states)
    assert (report["states_checked"], report["events_checked"]) == (2, 2)
    last = head(client)["position"]
    report = verify(client, all=True, after=last - 2, until=last - 1)
    assert (report["range"], report["events_checked"]) == (
        {"after": last - 2, "until": last - 1},
        1,
    )
    assert verify(client, all=True)["range"] == {"after": 0, "until": last}
    generate(client, states[0])
    report = verify(client, all=True, since_verified=True)
    assert (report["range"], report["result"]) == ({"after": last, "until": last + 1}, "equal")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "state_id"),
        ({"all": True, "state_ids": ["state-0"]}, "state_id"),
        ({"state_id": "state-0", "state_ids": ["state-0"]}, "state_id"),
        ({"state_ids": []}, "state_ids"),
        ({"state_ids": ["state-0"] * 1001}, "state_ids"),
        ({"all": True, "after": -1}, "after"),
        ({"all": True, "until": 2**53}, "until"),
        ({"all": True, "after": 3, "until": 2}, "until"),
        ({"state_id": "state-0", "since_verified": True}, "since_verified"),
        ({"all": True, "since_verified": True, "after": 1}, "since_verified"),
        ({"all": True, "head": "1:zz"}, "head"),
        ({"all": True, "after": 2**40}, "after"),
    ],
)
def test_a_wrong_request_is_refused_by_its_field(served: Served, body: Json, field: str) -> None:
    client, _ = served
    assert_problem(client.post("/v1/replay/verify", json=body), 400, "invalid-input", field)


def test_what_is_not_there_is_not_found(served: Served) -> None:
    client, _ = served
    for method in ("GET", "DELETE"):
        answer = client.request(method, "/v1/replay/replay-0")
        assert assert_problem(answer, 404, "replay-not-found")["replay_id"] == "replay-0"
    body = {"state_ids": ["state-0"]}
    for headers in ({}, ASYNC):
        answer = client.post("/v1/replay/verify", json=body, headers=headers)
        assert_problem(answer, 404, "state-not-found")


async def test_the_end_of_the_service_ends_its_verifications(database: Path) -> None:
    async with open_service(Settings(model_name="cacher-tiny", database=str(database))) as service:
        started = [service.replays.start(verification) for _ in range(2)]
        await asyncio.sleep(0)
    assert [job.status for job in started] == ["cancelled"] * 2
    with pytest.raises(Unavailable, match="was ended before it was done"):
        report_of(started[0])


async def verification(_: Callable[[Progress], None]) -> Report:
    await asyncio.Event().wait()
    raise AssertionError("it has no end")


# given what a client prefers (RFC 7240) / then


@pytest.mark.parametrize(
    ("fields", "wait_s", "applied"),
    [
        ([], WAIT_S, None),
        (["respond-async"], 0, "respond-async"),
        (["Respond-Async"], 0, "respond-async"),
        (["wait=7"], 7, "wait=7"),
        (['wait="7"'], 7, "wait=7"),
        (["wait = 7 ; x=1"], 7, "wait=7"),
        (["respond-async, wait=5"], 5, "wait=5"),
        (["respond-async", "wait=5"], 5, "wait=5"),
        (["wait=5, wait=9"], 5, "wait=5"),
        (["wait=99999"], MAX_WAIT_S, f"wait={MAX_WAIT_S}"),
        (["wait=0"], 0, "wait=0"),
        (["wait=soon"], WAIT_S, None),
        (["wait=-1, return=minimal"], WAIT_S, None),
        (["handling=lenient; foo, respond-async"], 0, "respond-async"),
    ],
)
def test_what_a_client_prefers_is_understood(
    fields: list[str], wait_s: int, applied: str | None
) -> None:
    assert preferred_wait(fields) == (wait_s, applied)


# given jobs / when they are started, cancelled, closed / then


class Opened:
    """Work that goes on until it is let go."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self, tell: Callable[[int], None]) -> str:
        tell(1)
        self.begun.set()
        await self.may_end.wait()
        if self.fails:
            raise ValueError("no")
        return "all of it"


@pytest_asyncio.fixture
async def jobs() -> AsyncIterator[Jobs[int, str]]:
    times = iter(f"{number:04}" for number in range(1000))
    made: Jobs[int, str] = Jobs("job", now=lambda: next(times), max_waiting=2, max_kept=2)
    yield made
    await made.close()


async def done(job: Job[int, str], work: Opened) -> None:
    work.may_end.set()
    await job.ended()


async def test_jobs_run_one_after_the_other_in_the_order_they_came(jobs: Jobs[int, str]) -> None:
    works = [Opened(fails=number == 1) for number in range(3)]
    started = [jobs.start(work) for work in works]
    for job, work in zip(started, works, strict=True):
        await work.begun.wait()
        assert (job.status, job.progress) == ("running", 1)
        assert sum(one.status == "running" for one in started) == 1
        await done(job, work)
    assert [job.status for job in started] == ["done", "failed", "done"]
    assert [job.result for job in started] == ["all of it", None, "all of it"]
    assert str(started[1].problem) == "no"
    assert len({job.id for job in started}) == 3


async def test_a_bounded_number_waits_and_of_those_that_ended_is_kept(
    jobs: Jobs[int, str],
) -> None:
    works = [Opened() for _ in range(5)]
    started = [jobs.start(work) for work in works[:3]]
    with pytest.raises(QueueFull):
        jobs.start(works[3])
    await done(started[0], works[0])
    started.append(jobs.start(works[3]))
    for job, work in zip(started, works, strict=False):
        await done(job, work)
    assert [jobs.find(job.id) for job in started] == [None, None, *started[2:]]
    jobs.forget(started[2])
    assert jobs.find(started[2].id) is None


async def test_a_job_is_cancelled_wherever_it_is(jobs: Jobs[int, str]) -> None:
    works = [Opened() for _ in range(3)]
    running, waiting, last = [jobs.start(work) for work in works]
    await jobs.cancel(waiting)  # before it was ever looked at
    await works[0].begun.wait()
    await jobs.cancel(running)
    assert (running.status, waiting.status) == ("cancelled", "cancelled")
    assert waiting.started_at is None
    await done(last, works[2])
    await jobs.cancel(last)
    assert (last.status, last.result) == ("done", "all of it")


async def test_closing_ends_every_job(jobs: Jobs[int, str]) -> None:
    started = [jobs.start(Opened()) for _ in range(3)]
    await jobs.close()
    assert [job.status for job in started] == ["cancelled"] * 3
