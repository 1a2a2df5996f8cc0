"""What a state is: the fold of its events. ``fold`` needs no model and no I/O."""

from collections.abc import Iterable
from typing import assert_never

import msgspec
from msgspec import Struct

from domain.config import Metadata, ModelType, StateConfig
from domain.errors import UnknownEvent
from domain.events import (
    ConfigChanged,
    Fragment,
    HeadRewound,
    Origin,
    Recorded,
    StateCreated,
    StateDeleted,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import ModelId, StateId, Version


class Live(Struct, frozen=True, kw_only=True):
    """A state that takes operations. ``content`` holds all its tokens and their text."""

    state_id: StateId
    version: Version
    model_id: ModelId
    model_type: ModelType
    config: StateConfig
    metadata: Metadata
    origin: Origin
    content: Fragment
    created_at: str
    modified_at: str

    @property
    def head_position(self) -> int:
        """Number of tokens the state holds."""
        return len(self.content.tokens)

    @property
    def room(self) -> int:
        """Number of tokens that may still be added."""
        return max(0, self.config.context_size - self.head_position)


class Deleted(Struct, frozen=True, kw_only=True):
    """A state that was deleted: only its history remains."""

    state_id: StateId
    version: Version
    model_id: ModelId
    deleted_at: str


State = Live | Deleted


def join(first: Fragment, second: Fragment) -> Fragment:
    """One fragment after the other."""
    offset = len(first.text)
    return Fragment(
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        ends=first.ends + tuple(offset + end for end in second.ends),
    )


def take(content: Fragment, count: int) -> Fragment:
    """The first ``count`` tokens of a fragment."""
    ends = content.ends[:count]
    return Fragment(
        tokens=content.tokens[:count], text=content.text[: ends[-1] if ends else 0], ends=ends
    )


def evolve(state: State | None, recorded: Recorded) -> State:
    """The state after one more event.

    Raises:
        UnknownEvent: the event cannot follow: a gap in the versions, or a state that does not
            exist (any more).
    """
    row, event = recorded.row, recorded.event
    expected = Version(1 if state is None else state.version + 1)
    if row.version != expected:
        raise UnknownEvent(row.position, f"version {row.version} where {expected} must come")
    match state, event:
        case None, StateCreated():
            return Live(
                state_id=row.state_id,
                version=recorded.version,
                model_id=event.model_id,
                model_type=event.model_type,
                config=event.config,
                metadata=event.metadata,
                origin=event.origin,
                content=event.content,
                created_at=row.recorded_at,
                modified_at=row.recorded_at,
            )
        case Live(), _:
            return _advance(state, recorded)
        case _:
            raise UnknownEvent(row.position, f"{row.type} cannot happen to this state")


def _advance(state: Live, recorded: Recorded) -> State:
    row, event = recorded.row, recorded.event
    content, config = state.content, state.config
    match event:
        case TextForwarded() | TokensGenerated():
            if event.start != state.head_position:
                raise UnknownEvent(
                    row.position, f"starts at {event.start}, the head is at {state.head_position}"
                )
            content = join(content, event.content)
        case ConfigChanged():
            config = event.changes.apply(config)
        case HeadRewound():
            if not 1 <= event.to_position <= state.head_position:
                raise UnknownEvent(
                    row.position, f"to {event.to_position}, the head is at {state.head_position}"
                )
            content = take(content, event.to_position)
        case StateDeleted():
            return Deleted(
                state_id=state.state_id,
                version=recorded.version,
                model_id=state.model_id,
                deleted_at=row.recorded_at,
            )
        case StateCreated():
            raise UnknownEvent(row.position, "the state exists already")
        case _:
            assert_never(event)
    return msgspec.structs.replace(
        state,
        version=recorded.version,
        content=content,
        config=config,
        modified_at=row.recorded_at,
    )


def fold(events: Iterable[Recorded], start: State | None = None) -> State | None:
    """The state that a run of events leads to, from ``start`` on; none if there are no events."""
    state = start
    for recorded in events:
        state = evolve(state, recorded)
    return state
