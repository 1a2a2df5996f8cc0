"""Creating, changing, forking, merging, rewinding and deleting states, and appending to them."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from app.service import Call, Service
from domain import decide, plan
from domain.config import ConfigChanges, Metadata, ModelType, StateConfig
from domain.content import NO_SCORES
from domain.errors import TooLarge, invalid
from domain.events import Event, Recorded, StateCreated
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, StateId, TokenId, Version
from domain.models import Model
from domain.origin import ContinuationId
from domain.ports import Append
from domain.state import Live, apply
from domain.work import ScoreRequest

MAX_METADATA_BYTES = 16_384
MAX_METADATA_DEPTH = 64


class Content(Struct, frozen=True):
    """What a client gives: a text, or tokens, or neither."""

    text: str | None
    tokens: tuple[TokenId, ...] | None


async def create(
    service: Service,
    call: Call,
    *,
    model_id: ModelId,
    content: Content,
    changes: ConfigChanges,
    metadata: Metadata,
    model_type: ModelType | None = None,
) -> tuple[Recorded, ...]:
    """Begin a state; its model is of ``model_type``, or of any type if none is named."""
    async with service.answering(call) as remembered:
        if remembered:
            return remembered
        check_metadata(metadata)
        model = await service.models.get(model_id)
        if model_type not in (None, model.model_type):
            allowed = f"must be {model.model_type}, which {model_id!r} is, or auto"
            raise invalid("model_type", allowed)
        _check_ids(changes, model)
        config = changes.apply(_clamped(service, model))
        tokens = await _tokens(model, content, beginning=True, room=config.context_size)
        if not tokens:
            raise invalid("text", "has no tokens; this model needs at least one to begin with")
        created = decide.create(
            model_id=model_id,
            model_type=model.model_type,
            model_revision=model.revision,
            model_context=model.context_size,
            config=config,
            metadata=metadata,
            content=model.fragment((), tokens),
        )
        return await _begin(service, call, created, model.fingerprint)


def _clamped(service: Service, model: Model) -> StateConfig:
    """The server's default config; its context is never above the model's own."""
    default = service.default_config
    size = min(default.context_size, model.context_size)
    return msgspec.structs.replace(default, context_size=size)


def _check_ids(changes: ConfigChanges, model: Model) -> None:
    plan.check_tokens(changes, model.vocabulary_size, "config.")


def check_metadata(metadata: Metadata) -> None:
    """Refuse metadata that is nested too deep or too large.

    Raises:
        InvalidInput: says what is allowed.
    """
    if not _nests_at_most(metadata, MAX_METADATA_DEPTH):
        raise invalid("metadata", f"must be nested at most {MAX_METADATA_DEPTH} levels deep")
    if len(msgspec.json.encode(metadata)) > MAX_METADATA_BYTES:
        raise invalid("metadata", f"must be at most {MAX_METADATA_BYTES} bytes of JSON")


def _nests_at_most(value: Any, levels: int) -> bool:
    """Whether objects and arrays lie at most so many levels deep in each other."""
    match value:
        case dict():
            inner = list(value.values())
        case list():
            inner = value
        case _:
            return True
    return levels > 0 and all(_nests_at_most(one, levels - 1) for one in inner)


async def _tokens(
    model: Model, content: Content, *, beginning: bool, room: int
) -> tuple[TokenId, ...]:
    """Tokens of what a client gave, in the vocabulary and at least one."""
    match content:
        case Content(text=None, tokens=None):
            if not beginning:
                raise invalid("text", "is required, or tokens")
            return model.opening()
        case Content(text=str() as text, tokens=None):
            if not text:
                raise invalid("text", "must not be empty")
            return await model.encode(text, beginning=beginning, room=room)
        case Content(text=None, tokens=tuple() as tokens):
            if not tokens:
                raise invalid("tokens", "must not be empty")
            if len(tokens) > room:
                raise TooLarge(
                    f"{len(tokens)} tokens do not fit: there is room for {room}",
                    tokens=len(tokens),
                    room=room,
                )
            decide.check_vocabulary("tokens", tokens, model.vocabulary_size)
            return tokens
        case _:
            raise invalid("tokens", "must not be given together with text")


async def forward(
    service: Service, call: Call, state_id: StateId, content: Content
) -> tuple[Recorded, ...]:
    """Append text or tokens without generating; the model scores them on the way.

    A classifier does not: it says nothing of single tokens. A state that slides makes room for them
    first, in an event before that of the text.
    """
    async with service.answering(call) as remembered, service.turns.turn(state_id):
        if remembered:
            return remembered
        state = await _current(service, call, state_id)
        model = await service.any_model(state)
        tokens = await _tokens(model, content, beginning=False, room=decide.room(state))
        if not tokens:
            raise invalid("text", "has no tokens in this model's vocabulary")
        appends = []
        if slid := decide.make_room(state, len(tokens)):
            appends.append(_next(state, slid))
            state = apply(state, slid)
        held = state.content.tokens
        scores = NO_SCORES
        if model.model_type == "causal_lm":
            asked = ScoreRequest(tokens=held + tokens, start=len(held))
            scores = (await model.score([asked]))[0].scores
        event = decide.forward(state, model.fragment(held, tokens), scores)
        appends.append(_next(state, event, model.fingerprint))
        return await service.append(call, appends)


async def change_config(
    service: Service, call: Call, state_id: StateId, changes: ConfigChanges
) -> tuple[Recorded, ...]:
    """Change settings of a state from here on."""
    async with service.answering(call) as remembered, service.turns.turn(state_id):
        if remembered:
            return remembered
        state = await _current(service, call, state_id)
        model = await service.any_model(state)
        _check_ids(changes, model)
        event = decide.change_config(state, changes, model.context_size)
        return await service.append(call, [_next(state, event)])


async def rewind(
    service: Service,
    call: Call,
    state_id: StateId,
    *,
    position: int | None,
    version: Version | None,
) -> tuple[Recorded, ...]:
    """Cut a state back to an earlier position, or to what it held at an earlier version."""
    async with service.answering(call) as remembered, service.turns.turn(state_id):
        if remembered:
            return remembered
        state = await _current(service, call, state_id)
        match position, version:
            case int(), None:
                event = decide.rewind(state, position)
            case None, int():
                event = decide.rewind_to(state, await service.live(state_id, version))
            case _:
                raise invalid("position", "either position or version is required, not both")
        return await service.append(call, [_next(state, event)])


async def fork(
    service: Service,
    call: Call,
    state_id: StateId,
    *,
    position: int | None,
    version: Version | None,
    continuation: ContinuationId | None,
    count: int,
    changes: ConfigChanges,
    metadata: Metadata | None,
) -> tuple[Recorded, ...]:
    """Begin ``count`` states with the tokens of another. No tensor is copied.

    With a ``continuation``, they hold its tokens too, after all that the other one held then.
    """
    async with service.answering(call) as remembered:
        if remembered:
            return remembered
        decide.check_precondition(await service.live(state_id), call.if_match)
        if continuation is not None:
            if (position, version) != (None, None):
                raise invalid("continuation", "must not be given together with position or version")
            version = continuation.version
        parent = await service.live(state_id, version)
        model = await service.any_model(parent)
        _check_ids(changes, model)
        inherited = parent.metadata if metadata is None else metadata
        check_metadata(inherited)
        if continuation is None:
            event = decide.fork(
                parent,
                position=position,
                changes=changes,
                metadata=inherited,
                model_context=model.context_size,
            )
        else:
            recorded = await service.event(state_id, parent.version)
            event = decide.adopt(
                parent,
                recorded.event,
                continuation.index,
                changes=changes,
                metadata=inherited,
                model_context=model.context_size,
            )
        return await _begin(service, call, event, count=count)


async def merge(
    service: Service,
    call: Call,
    state_ids: Sequence[StateId],
    *,
    changes: ConfigChanges,
    metadata: Metadata | None,
) -> tuple[Recorded, ...]:
    """Begin a state with the concatenated tokens of others, which stay as they are."""
    async with service.answering(call) as remembered:
        if remembered:
            return remembered
        if call.if_match is not None:
            raise invalid("If-Match", "must not be given: each of the states has its own version")
        parents = [await service.live(state_id) for state_id in state_ids]
        decide.check_parents(parents)
        model, *_ = [await service.any_model(parent) for parent in parents]
        _check_ids(changes, model)
        inherited = parents[0].metadata if metadata is None else metadata
        check_metadata(inherited)
        tokens = decide.concatenate([parent.content.tokens for parent in parents])
        size = changes.apply(parents[0].config).context_size
        decide.check_fits(len(tokens), held=0, context_size=size)  # decoding takes time
        event = decide.merge(
            parents,
            model.fragment((), tokens),
            changes=changes,
            metadata=inherited,
            model_context=model.context_size,
        )
        return await _begin(service, call, event, model.fingerprint)


async def delete(service: Service, call: Call, state_id: StateId) -> tuple[Recorded, ...]:
    """End a state; a generation that runs on it is ended first."""
    async with service.answering(call) as remembered:
        if remembered:
            return remembered
        await _current(service, call, state_id)  # a refused deletion ends nothing
        with service.ending((state_id,)):
            async with service.turns.turn(state_id):
                state = await _current(service, call, state_id)
                return await service.append(call, [_next(state, decide.delete(state))])


async def _current(service: Service, call: Call, state_id: StateId) -> Live:
    state = await service.live(state_id)
    decide.check_precondition(state, call.if_match)
    return state


async def _begin(
    service: Service,
    call: Call,
    created: StateCreated,
    fingerprint: Fingerprint | None = None,
    *,
    count: int = 1,
) -> tuple[Recorded, ...]:
    """Record the beginning of ``count`` states that are alike."""
    appends = [
        Append(
            state_id=service.surroundings.new_state_id(),
            expected_version=Version(0),
            event=created,
            fingerprint=fingerprint,
        )
        for _ in range(count)
    ]
    return await service.append(call, appends)


def _next(state: Live, event: Event, fingerprint: Fingerprint | None = None) -> Append:
    """The next event of a state."""
    return Append(
        state_id=state.state_id,
        expected_version=state.version,
        event=event,
        fingerprint=fingerprint,
    )
