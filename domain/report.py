"""What verifying a log finds, and the mark of how far it was found equal."""

from typing import Any, Literal, Protocol

from msgspec import Struct

from domain.content import Alternative
from domain.events import Recorded
from domain.ids import ModelId, Position, StateId, Version

Differences = dict[str, tuple[Any, Any]]
"""The facts in which two fingerprints differ, as recorded and as they are now."""


class Divergence(Struct, frozen=True, kw_only=True):
    """Something about an event that is not as recorded.

    ``position`` is the event's place in the log, ``version`` that which it led to, or which an
    analysis saw, ``token_position`` the absolute position in the
    state's text, ``field`` what differs. ``first`` says that nothing before it in its state was
    found to differ; of that one ``differences`` are those between the fingerprints, if any. The
    first that has a token position has ``alternatives``, the likeliest tokens there now.
    """

    position: Position
    state_id: StateId | None
    version: Version | None
    field: str
    expected: Any
    actual: Any
    token_position: int | None = None
    first: bool = False
    alternatives: tuple[Alternative, ...] = ()
    differences: Differences = {}


class Drift(Struct, frozen=True, kw_only=True):
    """How far an event is from its re-execution under another fingerprint.

    ``max_logprob_delta`` is the largest |difference| of a logprob (nats); ``first_changed`` the
    first position in the text where another token would be drawn, or another beam be chosen, now.
    """

    position: Position
    state_id: StateId
    version: Version
    recorded_fingerprint: str | None
    max_logprob_delta: float
    first_changed: int | None
    differences: Differences


class Range(Struct, frozen=True, kw_only=True):
    """Events after one position, up to and with another."""

    after: Position
    until: Position


class Report(Struct, frozen=True, kw_only=True):
    """What verifying a log found.

    ``equal``: every event of the ``range``, or of the states that were asked for, was re-executed
    and is equal bit for bit; what came before the range is taken as it is recorded. ``divergent``:
    something is not as recorded. ``unverified``: no divergence, but some events could not be held
    to the bit, because they were made under another fingerprint or without the contract, or cannot
    be read here.

    ``head`` is the newest row of the ``range``. ``analyses`` are counted among the events, too. Of
    all ``divergences_found`` the first of each state and as many more as a list may hold are in
    ``divergences``, likewise with the drifts.
    ``imported`` events came from other logs, those that ``imported_from`` names. Of ``erased``
    states, which ``erased_states`` names, only the chain was followed. Both lists are bounded.
    """

    result: Literal["equal", "divergent", "unverified"]
    head: dict[str, Any]
    range: Range
    events_checked: int
    analyses: int
    states_checked: int
    imported: int
    imported_from: tuple[str, ...] = ()
    erased: int
    erased_states: tuple[StateId, ...] = ()
    tokens_recomputed: int
    tokens_reused: int
    divergences_found: int
    divergences: tuple[Divergence, ...]
    drifts_found: int
    drifts: tuple[Drift, ...]
    notes: tuple[str, ...]


class Progress(Struct, frozen=True, kw_only=True):
    """How far a verification is: events done, events in all, tokens recomputed so far."""

    events_done: int
    events_total: int
    tokens: int


class Mark(Struct, frozen=True, kw_only=True):
    """Up to where a log was found equal bit for bit: the row at ``position``, and its hash.

    ``fingerprints`` are the numerics that it was re-executed under, by model.
    """

    log_id: str
    position: Position
    hash: str
    fingerprints: dict[ModelId, str]


class Marks(Protocol):
    """Where the mark of a log is kept: beside it, never in it."""

    async def load(self) -> Mark | None:
        """The mark, if one is kept that can be read."""

    async def save(self, mark: Mark) -> None:
        """Keep a mark in place of the one before; on disk before this returns.

        Raises:
            OSError: it could not be written.
        """

    async def forget(self) -> None:
        """Keep none any more.

        Raises:
            OSError: it could not be removed.
        """


class Listed(Struct, frozen=True, kw_only=True):
    """What the list of states, which is made of the events, says of one."""

    model_id: ModelId
    created_position: Position
    version: Version
    deleted: bool
    erased: bool


class Kinship(Struct, frozen=True, kw_only=True, order=True):
    """That a state, whose beginning is at ``position``, began with what another held."""

    position: Position
    child: StateId
    parent: StateId


class Standing(Struct, frozen=True, kw_only=True):
    """Where a state stands: by its events, and by the list of states, if it is there.

    ``first`` is its first event after the position asked about; ``version`` and ``type`` are those
    of its newest event, null where no event has a version.
    """

    first: Position
    version: Version | None
    type: str | None
    listed: Listed | None


def divergence(
    recorded: Recorded, field: str, expected: Any, actual: Any, index: int | None = None
) -> Divergence:
    """A difference in one field of an event; ``index`` counts the tokens from its start."""
    start = getattr(recorded.event, "start", 0)
    return Divergence(
        position=recorded.position,
        state_id=recorded.state_id,
        version=recorded.version,
        field=field,
        expected=expected,
        actual=actual,
        token_position=None if index is None else start + index,
    )
