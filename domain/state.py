"""What a state is: the fold of its events. ``fold`` needs no model and no I/O."""

from collections.abc import Iterable, Sequence
from typing import assert_never

import msgspec
from msgspec import Struct

from domain.chain import Row
from domain.config import Metadata, ModelType, StateConfig
from domain.content import Fragment
from domain.events import (
    ERASED,
    BeamsGenerated,
    ConfigChanged,
    ContextSlid,
    ContinuationsGenerated,
    Event,
    HeadRewound,
    Recorded,
    StateAnalyzed,
    StateCreated,
    StateDeleted,
    StateErased,
    TextForwarded,
    TokensGenerated,
    decode,
)
from domain.ids import ModelId, StateId, Version
from domain.log_errors import UnknownEvent
from domain.origin import Origin
from domain.transfer import happened_at


class Live(Struct, frozen=True, kw_only=True):
    """A state that takes operations. ``content`` holds all its tokens and their text.

    ``dropped`` tokens came before them and were let go of; they count in absolute positions.
    """

    state_id: StateId
    version: Version
    model_id: ModelId
    model_type: ModelType
    config: StateConfig
    metadata: Metadata
    origin: Origin
    content: Fragment
    dropped: int
    created_at: str
    modified_at: str

    @property
    def head_position(self) -> int:
        """Number of tokens the state holds."""
        return len(self.content.tokens)

    @property
    def absolute_position(self) -> int:
        """Number of tokens the state has had before its next one: what the next draw counts by."""
        return self.dropped + self.head_position

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


class Erased(Struct, frozen=True, kw_only=True):
    """A state whose texts were destroyed: that it existed is all that is known of it."""

    state_id: StateId
    version: Version
    erased_at: str


State = Live | Deleted | Erased


def join(first: Fragment, second: Fragment) -> Fragment:
    """One fragment after the other."""
    offset = len(first.text)
    return Fragment(
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        ends=first.ends + tuple(offset + end for end in second.ends),
        partial=first.partial | {len(first.tokens) + at: raw for at, raw in second.partial.items()},
    )


def take(content: Fragment, count: int) -> Fragment:
    """The first ``count`` tokens of a fragment."""
    ends = content.ends[:count]
    return Fragment(
        tokens=content.tokens[:count],
        text=content.text[: ends[-1] if ends else 0],
        ends=ends,
        partial={at: raw for at, raw in content.partial.items() if at < count},
    )


def drop(content: Fragment, count: int) -> Fragment:
    """A fragment without its first ``count`` tokens and what they added to the text."""
    begin = content.ends[count - 1] if count else 0
    return Fragment(
        tokens=content.tokens[count:],
        text=content.text[begin:],
        ends=tuple(end - begin for end in content.ends[count:]),
        partial={at - count: raw for at, raw in content.partial.items() if at >= count},
    )


class CannotFollow(ValueError):
    """An event that cannot happen to the state as it is."""


def apply(state: Live, event: Event) -> Live:
    """A state after an event that it outlives, in all but the time of its modification.

    Raises:
        CannotFollow: the event cannot happen to this state.
    """
    content, config, dropped = state.content, state.config, state.dropped
    match event:
        case TextForwarded() | TokensGenerated():
            _check_start(state, event.start, event.dropped)
            content = join(content, event.content)
        case ContinuationsGenerated() | BeamsGenerated():
            _check_start(state, event.start, event.dropped)
        case ContextSlid():
            _check_count(state, event.dropped, state.head_position - 1)
            content, dropped = drop(content, event.dropped), dropped + event.dropped
        case ConfigChanged():
            config = event.changes.apply(config)
        case HeadRewound():
            _check_count(state, event.to_position, state.head_position)
            content = take(content, event.to_position)
        case StateAnalyzed():
            raise CannotFollow("leaves the state as it is, and has no version")
        case StateCreated() | StateDeleted() | StateErased():
            raise CannotFollow("it is not an event that the state outlives")
        case _:
            assert_never(event)
    return msgspec.structs.replace(
        state,
        version=Version(state.version + 1),
        content=content,
        dropped=dropped,
        config=config,
    )


def _check_start(state: Live, start: int, dropped: int) -> None:
    if (start, dropped) != (state.absolute_position, state.dropped):
        raise CannotFollow(
            f"starts at {start} with {dropped} tokens dropped, the head is at"
            f" {state.absolute_position} with {state.dropped} dropped"
        )


def _check_count(state: Live, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise CannotFollow(f"names {count} tokens, the head is at {state.head_position}")


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
                dropped=event.dropped,
                created_at=happened_at(row),
                modified_at=happened_at(row),
            )
        case Live(), StateDeleted():
            return Deleted(
                state_id=state.state_id,
                version=recorded.version,
                model_id=state.model_id,
                deleted_at=happened_at(row),
            )
        case Live() | Deleted(), StateErased():
            return Erased(
                state_id=state.state_id, version=recorded.version, erased_at=row.recorded_at
            )
        case Live(), _:
            try:
                return msgspec.structs.replace(apply(state, event), modified_at=happened_at(row))
            except CannotFollow as error:
                raise UnknownEvent(row.position, f"{row.type} {error}") from error
        case _:
            raise UnknownEvent(row.position, f"{row.type} cannot happen to this state")


def fold_rows(rows: Sequence[Row]) -> State | None:
    """The state that the rows of its events, from the first on, lead to.

    Of a state that was erased only the last row is read.

    Raises:
        EventErased: a row is sealed, and there is no key.
        UnknownEvent: an event that cannot be read, or cannot follow.
    """
    if rows and (last := rows[-1]).type == ERASED and last.version is not None:
        return Erased(state_id=last.state_id, version=last.version, erased_at=last.recorded_at)
    return fold(map(decode, rows))


def fold(events: Iterable[Recorded], start: State | None = None) -> State | None:
    """The state that a run of events leads to, from ``start`` on; none if there are no events."""
    state = start
    for recorded in events:
        state = evolve(state, recorded)
    return state
