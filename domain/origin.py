"""How a state began."""

from typing import Literal

from msgspec import Struct

from domain.ids import StateId, Version


class New(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="new", tag_field="kind"
):
    """The state began with the text or tokens its client gave."""


class ContinuationId(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the continuations or beams that a state got at a version, counted from 0."""

    version: Version
    index: int


class Fork(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fork", tag_field="kind"
):
    """The state began as the first ``head_position`` tokens of another at ``version``.

    With a ``continuation``, as all its tokens and those of the continuation.
    """

    state_id: StateId
    version: Version
    head_position: int
    continuation: ContinuationId | None = None


class Parent(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A state at a version, when it held ``head_position`` tokens."""

    state_id: StateId
    version: Version
    head_position: int


class Merge(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="merge", tag_field="kind"
):
    """The state began as the tokens that its parents begin with, then each one's own, in order."""

    parents: tuple[Parent, ...]
    strategy: Literal["concatenate"]


Origin = New | Fork | Merge


def parents_of(origin: Origin) -> tuple[tuple[StateId, Version], ...]:
    """The states that a state comes from, each at the version that it had then."""
    match origin:
        case New():
            return ()
        case Fork():
            return ((origin.state_id, origin.version),)
        case Merge():
            return tuple((parent.state_id, parent.version) for parent in origin.parents)
