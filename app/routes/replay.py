"""``/v1/replay``: the history, re-executed."""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal

from litestar import Request as HttpRequest
from litestar import Response, Router
from msgspec import Meta, Struct

from app.calls import disconnected
from app.jobs import Job, Status
from app.operations.verification.verify import Request, Verifier, remembered_head
from app.problems import problem_of
from app.routes.handlers import deleting, reading, writing
from app.schemas import Body
from app.service import Service
from domain.errors import ReplayNotFound, Unavailable, invalid
from domain.ids import Position, StateId
from domain.report import Progress, Report

WAIT_S: Final = 20
"""How long an answer waits for the report where the client does not say."""

MAX_WAIT_S: Final = 60
RETRY_AFTER_S: Final = 2
CLIENT_LEFT: Final = 499
"""Nobody reads this status: the client has gone."""

AnyRequest = HttpRequest[Any, Any, Any]
Place = Annotated[Position, Meta(ge=0, le=2**53 - 1)]
StateIds = Annotated[tuple[StateId, ...], Meta(min_length=1, max_length=1000)]


class Verify(Body, frozen=True, kw_only=True):
    """Verify one state, some, or the whole log, against a remembered head if given.

    Only events ``after`` a position, ``until`` another; or those since the verified mark.
    """

    state_id: StateId | None = None
    state_ids: StateIds | None = None
    all: Literal[True] | None = None
    after: Place | None = None
    until: Place | None = None
    since_verified: bool = False
    head: str | None = None


class Replay(Struct, frozen=True, kw_only=True):
    """A verification that goes on, or has ended: with a report, or with a problem if it failed."""

    replay_id: str
    status: Status
    progress: Progress | None
    report: Report | None
    problem: dict[str, Any] | None
    created_at: str
    started_at: str | None
    ended_at: str | None

    @classmethod
    def of(cls, job: Job[Progress, Report]) -> "Replay":
        """The view of a job."""
        return cls(
            replay_id=job.id,
            status=job.status,
            progress=job.progress,
            report=job.result,
            problem=None if job.problem is None else problem_of(job.problem),
            created_at=job.created_at,
            started_at=job.started_at,
            ended_at=job.ended_at,
        )


@writing("/replay/verify", Verify, answer=Report, later=Replay)
async def verify(data: Verify, request: AnyRequest, service: Service) -> Response[Any]:
    """Re-execute states or the whole log and hold what comes out against what is recorded.

    What takes longer than ``Prefer: wait`` (RFC 7240; 20 seconds) is answered 202: the report
    comes at ``GET /v1/replay/{replay_id}``. ``Prefer: respond-async`` does not wait at all.
    """
    wanted = _wanted(data)
    wait_s, applied = preferred_wait(request.headers.getall("prefer", []))
    headers = {} if applied is None else {"Preference-Applied": applied}
    await Verifier(service.log, service.models).check(wanted)

    async def work(tell: Callable[[Progress], None]) -> Report:
        verifier = Verifier(service.log, service.models, marks=service.marks, progress=tell)
        return await verifier.run(wanted)

    job = service.replays.start(work)
    known = False
    try:
        left = await _wait(request, job, wait_s)
        if left:
            return Response(None, status_code=CLIENT_LEFT)
        if job.status not in ("waiting", "running"):
            return Response(report_of(job), headers=headers)
        known = True
    finally:
        if not known:  # nobody could ever ask for it
            await service.replays.cancel(job)
            service.replays.forget(job)
    headers |= {"Location": f"/v1/replay/{job.id}", "Retry-After": str(RETRY_AFTER_S)}
    return Response(Replay.of(job), status_code=202, headers=headers)


@reading("/replay/{replay_id:str}")
async def get_replay(replay_id: str, service: Service) -> Replay:
    """How far a verification is, and its report once it is done."""
    return Replay.of(_find(service, replay_id))


@deleting("/replay/{replay_id:str}")
async def cancel_replay(replay_id: str, service: Service) -> Replay:
    """End a verification; what it found equal stays marked. One that has ended stays as it is."""
    job = _find(service, replay_id)
    await service.replays.cancel(job)
    return Replay.of(job)


def _find(service: Service, replay_id: str) -> Job[Progress, Report]:
    job = service.replays.find(replay_id)
    if job is None:
        raise ReplayNotFound(replay_id)
    return job


def _wanted(data: Verify) -> Request:
    named = [data.state_id is not None, data.state_ids is not None, data.all is not None]
    if sum(named) != 1:
        raise invalid("state_id", "one of state_id, state_ids or all: true is required, no two")
    if data.since_verified and (data.all is None or data.after is not None):
        raise invalid("since_verified", "goes with all: true, and without after")
    if data.after is not None and data.until is not None and data.after > data.until:
        raise invalid("until", "must not be before after")
    try:
        head = None if data.head is None else remembered_head(data.head)
    except ValueError as error:
        raise invalid("head", "must be position:hash, as /v1/audit/head gives them") from error
    one = None if data.state_id is None else (data.state_id,)
    return Request(
        state_ids=data.state_ids or one,
        after=data.after or Position(0),
        until=data.until,
        since_verified=data.since_verified,
        head=head,
    )


def preferred_wait(fields: Sequence[str]) -> tuple[int, str | None]:
    """How many seconds to wait, by ``Prefer`` header fields, and what of them was applied.

    Of a preference given twice the first counts; what is not understood is ignored (RFC 7240).
    """
    preferences: dict[str, str] = {}
    for preference in ",".join(fields).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        preferences.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = preferences.get("wait", "")
    if re.fullmatch(r"[0-9]{1,9}", wait):
        wait_s = min(int(wait), MAX_WAIT_S)
        return wait_s, f"wait={wait_s}"
    if "respond-async" in preferences:
        return 0, "respond-async"
    return WAIT_S, None


async def _wait(request: AnyRequest, job: Job[Progress, Report], wait_s: int) -> bool:
    """Wait until a job has ended, for some time at most; whether the client left before."""
    ended = asyncio.ensure_future(job.ended())
    leaving = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait((ended, leaving), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        return leaving.done() and not ended.done()
    finally:
        ended.cancel()
        leaving.cancel()


def report_of(job: Job[Progress, Report]) -> Report:
    """The report of a verification that has ended.

    Raises:
        Unavailable: it was ended before it was done; else whatever it failed with.
    """
    if job.problem is not None:
        raise job.problem
    if job.result is None:
        raise Unavailable("the verification was ended before it was done; ask for it again")
    return job.result


router = Router("/v1", tags=["audit"], route_handlers=[verify, get_replay, cancel_replay])
