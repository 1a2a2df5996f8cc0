"""``/v1/states`` and ``/v1/forward``."""

from typing import Annotated, Any

from litestar import Request, Response, Router
from litestar.params import Parameter
from msgspec import UNSET

from app import answers
from app.calls import call_of, etag
from app.operations import erasure
from app.operations import states as operations
from app.operations.states import Content
from app.routes import feed
from app.routes.handlers import deleting, following, reading, writing
from app.schemas import (
    CacheView,
    ChangeConfig,
    ConfigView,
    CreateState,
    Deleted,
    EventList,
    EventView,
    Forked,
    ForkState,
    Forward,
    Forwarded,
    MergeState,
    RewindState,
    StateList,
    StateView,
)
from app.service import Service
from domain import decide
from domain.errors import StateNotFound, VersionNotFound, invalid
from domain.events import Recorded
from domain.ids import ModelId, Position, StateId, Version
from domain.log_errors import LogError
from domain.state import Live, State

AnyRequest = Request[Any, Any, Any]
Limit = Annotated[int, Parameter(ge=1, le=100)]
EventLimit = Annotated[int, Parameter(ge=1, le=1000)]
AfterPosition = Annotated[int, Parameter(ge=0, lt=10**15)]


async def _after(service: Service, recorded: Recorded) -> Live:
    """The state right after an event: what the answer to it was made of."""
    return await _as_it_was(service, recorded.state_id, recorded.version)


async def _as_it_was(service: Service, state_id: StateId, version: Version) -> Live:
    return decide.live(await service.state(state_id, version), state_id)


def _view(state: Live, status: int = 200) -> Response[StateView]:
    headers = {**etag(state.version)}
    if status == 201:
        headers["Location"] = f"/v1/states/{state.state_id}"
    return Response(answers.state(state), status_code=status, headers=headers)


@writing("/states", CreateState, status=201)
async def create_state(
    data: CreateState, request: AnyRequest, service: Service
) -> Response[StateView]:
    """Begin a state."""
    recorded = await operations.create(
        service,
        await call_of(request),
        model_id=service.default_model if data.model_id is None else data.model_id,
        content=Content(data.text, data.tokens),
        changes=data.config,
        metadata=data.metadata,
        model_type=None if data.model_type == "auto" else data.model_type,
    )
    return _view(await _after(service, recorded[0]), 201)


@reading("/states")
async def list_states(
    service: Service,
    limit: Limit = 20,
    cursor: str | None = None,
    model_id: str | None = None,
) -> StateList:
    """Live states, newest first; those that cannot be read are named."""
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise invalid("cursor", "must be a next_cursor of an earlier page")
    page = await service.log.live_states(
        limit=limit,
        cursor=None if cursor is None else Position(int(cursor)),
        model_id=None if model_id is None else ModelId(model_id),
    )
    found = [await _readable(service, state_id) for state_id in page.state_ids]
    lost = [state_id for state_id, state in zip(page.state_ids, found, strict=True) if not state]
    return StateList(
        states=[answers.state(state) for state in found if isinstance(state, Live)],
        unreadable=lost or UNSET,
        next_cursor=None if page.next_cursor is None else str(page.next_cursor),
    )


async def _readable(service: Service, state_id: StateId) -> State | None:
    try:
        return await service.state(state_id)
    except (LogError, StateNotFound):  # one does not stand in the way of the others
        return None


@reading("/states/{state_id:str}")
async def get_state(
    state_id: str, service: Service, version: int | None = None, include: str | None = None
) -> Response[StateView]:
    """A state, as it is or as it was at a version; of a deleted one only the latter."""
    wanted = _include(include, {"tokens", "cache"})
    key = StateId(state_id)
    state = await service.as_it_was(key, None if version is None else Version(version))
    cache = await _cache(service, state) if "cache" in wanted else UNSET
    view = answers.state(state, include_tokens="tokens" in wanted, cache=cache)
    return Response(view, headers=etag(state.version))


async def _cache(service: Service, state: Live) -> CacheView:
    """What of a state is hot. A model is not loaded to be told that nothing is."""
    cold = CacheView(tier="none", tokens_hot=0)
    if not service.models.info(state.model_id).loaded:
        return cold
    model = await service.models.get(state.model_id)
    if model.model_type == "sequence_classification":
        return cold
    tokens = state.content.tokens
    return CacheView(tier=model.tier(tokens), tokens_hot=model.tokens_hot(tokens))


def _include(include: str | None, allowed: set[str]) -> set[str]:
    wanted = {part.strip() for part in (include or "").split(",") if part.strip()}
    if wanted - allowed:
        raise invalid("include", f"may name {', '.join(sorted(allowed))}")
    return wanted


@deleting("/states/{state_id:str}")
async def delete_state(
    state_id: str, request: AnyRequest, service: Service, erase: bool = False, forks: bool = False
) -> Deleted:
    """End a state; its events stay readable.

    With ``erase`` what it held is destroyed for good, also of a state that was deleted before;
    with ``forks`` what the states held that began with it, too.
    """
    if erase:
        erased = await erasure.erase(
            service, await call_of(request), StateId(state_id), forks=forks
        )
        return Deleted(
            state_id=StateId(state_id),
            message="erased; what it held cannot be read again",
            erased=[one.state_id for one in erased],
        )
    if forks:
        raise invalid("forks", "goes with erase=true")
    await operations.delete(service, await call_of(request), StateId(state_id))
    return Deleted(state_id=StateId(state_id), message="deleted; its events stay readable")


@writing("/states/config", ChangeConfig)
async def change_config(
    data: ChangeConfig, request: AnyRequest, service: Service
) -> Response[ConfigView]:
    """Change some settings of a state."""
    recorded = await operations.change_config(
        service, await call_of(request), data.state_id, data.config
    )
    state = await _after(service, recorded[0])
    view = ConfigView(state_id=state.state_id, config=state.config, version=state.version)
    return Response(view, headers=etag(state.version))


@writing("/states/fork", ForkState, status=201)
async def fork_state(data: ForkState, request: AnyRequest, service: Service) -> Forked:
    """Begin states with the tokens of another, or with one of its continuations."""
    recorded = await operations.fork(
        service,
        await call_of(request),
        data.state_id,
        position=data.position,
        version=data.version,
        continuation=data.continuation,
        count=data.n,
        changes=data.config,
        metadata=data.metadata,
    )
    return Forked(states=[answers.state(await _after(service, event)) for event in recorded])


@writing("/states/merge", MergeState, status=201)
async def merge_states(
    data: MergeState, request: AnyRequest, service: Service
) -> Response[StateView]:
    """Begin a state with what states have in common, then each one's own part, in order.

    ``If-Match`` is refused: it names one version, and each of the states has its own.
    """
    recorded = await operations.merge(
        service,
        await call_of(request),
        data.state_ids,
        changes=data.config,
        metadata=data.metadata,
    )
    return _view(await _after(service, recorded[0]), 201)


@writing("/states/rewind", RewindState)
async def rewind_state(
    data: RewindState, request: AnyRequest, service: Service
) -> Response[StateView]:
    """Cut a state back."""
    recorded = await operations.rewind(
        service,
        await call_of(request),
        data.state_id,
        position=data.position,
        version=data.version,
    )
    return _view(await _after(service, recorded[0]))


@writing("/forward", Forward)
async def forward(data: Forward, request: AnyRequest, service: Service) -> Response[Forwarded]:
    """Append text or tokens without generating.

    A full state with ``on_full: "slide"`` lets go of its first tokens to make room for them.
    """
    recorded = await operations.forward(
        service, await call_of(request), data.state_id, Content(data.text, data.tokens)
    )
    answer = answers.forwarded(recorded[-1])
    return Response(answer, headers=etag(answer.version))


@following("/states/{state_id:str}/events", answer=EventList)
async def list_state_events(
    state_id: str,
    request: AnyRequest,
    service: Service,
    after: feed.After = "0",
    limit: feed.Limit = None,
    version: int | None = None,
) -> Response[Any]:
    """Events of a state, deleted or not, to the latest or to a version.

    ``after`` is a version, or ``head``. Analyses, which have no version, are listed beside them.
    With ``Accept: text/event-stream`` as server-sent events: all those there are, analyses among
    them, in the order of the log, then each one as it comes, until the state ends.
    """
    key = StateId(state_id)
    latest = await _latest(service, key)
    begin = Version(feed.number(after, latest))
    if feed.is_wanted(request):
        position = await _position(service, key, begin, latest)
        return await feed.respond(
            service, request, position, state_id=key, limit=limit, version=version
        )
    until = latest if version is None else _existing(key, version, latest)
    limit = feed.DEFAULT_LIMIT if limit is None else limit
    rows = await service.log.state_rows(key, after=begin, until=until, limit=limit + 1)
    page = rows[:limit]
    return Response(
        EventList(
            events=[EventView.of(row) for row in page],
            next_after=page[-1].version if len(rows) > limit else None,
        )
    )


@reading("/states/{state_id:str}/analyses")
async def list_analyses(
    state_id: str, service: Service, after: AfterPosition = 0, limit: EventLimit = 100
) -> EventList:
    """What was asked about the inside of a state, deleted or not; ``after`` is a position."""
    key = StateId(state_id)
    await _latest(service, key)
    rows = await service.log.analyses(key, after=Position(after), limit=limit + 1)
    page = rows[:limit]
    return EventList(
        events=[EventView.of(row) for row in page],
        next_after=page[-1].position if len(rows) > limit else None,
    )


async def _latest(service: Service, state_id: StateId) -> Version:
    """The latest version of a state, whatever became of it: its events need not be readable."""
    newest = await service.log.newest(state_id)
    if newest is None:
        raise StateNotFound(state_id)
    return newest.version or Version(0)


def _existing(state_id: StateId, version: int, latest: Version) -> Version:
    if not 1 <= version <= latest:
        raise VersionNotFound(state_id, Version(version), latest)
    return Version(version)


async def _position(
    service: Service, state_id: StateId, version: Version, latest: Version
) -> Position:
    """The position of the event that led to a version; before all of them there is version 0."""
    if version == 0:
        return Position(0)
    until = _existing(state_id, version, latest)
    (row,) = await service.log.state_rows(state_id, after=Version(version - 1), until=until)
    return row.position


router = Router(
    "/v1",
    tags=["states"],
    route_handlers=[
        create_state,
        list_states,
        get_state,
        delete_state,
        change_config,
        fork_state,
        merge_states,
        rewind_state,
        forward,
        list_state_events,
        list_analyses,
    ],
)
