"""The facts that make up a log: the storage contract.

An event is past tense and never changed. It is stored under an explicit tag (``type``) and a
schema number; a new field needs a default, a changed meaning needs a new tag. Events carry token
ids, never text alone, and everything an answer to the client was made of.
"""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from domain.analysis.parameters import CompareParameters, NextParameters, Parameters
from domain.analysis.result import FORM
from domain.canonical import as_json
from domain.chain import Row
from domain.config import (
    BeamParameters,
    ConfigChanges,
    GenerationParameters,
    Metadata,
    ModelType,
    StateConfig,
)
from domain.content import Alternative, Fragment, Scores, StoredLogits
from domain.ids import ModelId, Position, Seed, StateId, TokenId, Version
from domain.log_errors import EventErased, UnknownEvent
from domain.origin import Origin

SCHEMA: Final = 4
"""Number of the payload schema that this release writes; it reads this one and all before."""

FinishReason = Literal[
    "stop_sequence", "stop_token", "eos", "constraint", "context_full", "cancelled"
]
"""Why a text ended; ``constraint``: its constraint is fulfilled and allows nothing after it."""


class StateCreated(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="state_created",
):
    """A state began.

    ``model_revision`` is the commit that a model of the hub was pinned to; null for other models,
    and for a fork or a merge, whose parents say it. ``dropped`` tokens came before its first one
    and are not held any more: they count in absolute positions.
    """

    origin: Origin
    model_id: ModelId
    model_type: ModelType
    model_revision: str | None = None
    config: StateConfig
    metadata: Metadata
    content: Fragment
    dropped: int = 0


class TextForwarded(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="text_forwarded",
):
    """Text was appended without generating, from the absolute position ``start`` on.

    The state had let go of ``dropped`` tokens by then.
    """

    start: int
    dropped: int = 0
    content: Fragment
    scores: Scores


class TokensGenerated(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="tokens_generated",
):
    """The model continued the state.

    ``start`` is the absolute position of the first new token: with the seed it fixes every
    random number drawn. ``sampling_probabilities`` are those under the processed distribution.
    ``finish_reason`` null means ``max_tokens`` was reached and the text could go on.

    The state had let go of ``dropped`` tokens by then. The call had drawn ``resumes`` tokens
    before ``start``: those of the events that this one goes on from.
    """

    parameters: GenerationParameters
    seed: Seed
    start: int
    dropped: int = 0
    resumes: int = 0
    content: Fragment
    scores: Scores
    sampling_probabilities: tuple[float, ...]
    alternatives: tuple[tuple[Alternative, ...], ...]
    stored_logits: StoredLogits | None
    finish_reason: FinishReason | None


class Continuation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way in which a text could go on; fields as in :class:`TokensGenerated`."""

    content: Fragment
    scores: Scores
    sampling_probabilities: tuple[float, ...]
    alternatives: tuple[tuple[Alternative, ...], ...]
    finish_reason: FinishReason | None


class ContinuationsGenerated(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="continuations_generated",
):
    """The model continued the state in several ways; the state holds what it held.

    Continuation ``i`` was drawn with branch ``i`` of the seed's random numbers. Blobs of
    ``stored_logits`` come continuation after continuation.
    """

    parameters: GenerationParameters
    seed: Seed
    start: int
    dropped: int = 0
    continuations: tuple[Continuation, ...]
    stored_logits: StoredLogits | None


class BeamStep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The running beams after one step: the token of each, and the beam before it went on from."""

    parents: tuple[int, ...]
    tokens: tuple[TokenId, ...]


class Beam(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sequence that a beam search found; ``score`` is what it was ranked by.

    ``finished`` says that it ended with an end-of-sequence or stop token.
    """

    content: Fragment
    scores: Scores
    score: float
    finished: bool


class BeamsGenerated(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="beams_generated",
):
    """Beam search continued the state; the state holds what it held.

    ``steps`` are the whole search, so that it can be re-executed in one pass; ``beams`` what it
    found, best first.
    """

    parameters: BeamParameters
    start: int
    dropped: int = 0
    steps: tuple[BeamStep, ...]
    beams: tuple[Beam, ...]


class ContextSlid(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="context_slid",
):
    """The state was full and let go of its first ``dropped`` tokens."""

    dropped: int


class ConfigChanged(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="config_changed",
):
    """Settings of the state changed from here on."""

    changes: ConfigChanges


class HeadRewound(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="head_rewound",
):
    """The state was cut back to its first ``to_position`` tokens."""

    to_position: int


class StateAnalyzed(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="state_analyzed",
):
    """Somebody looked inside the state, as it was at the row's ``at_version``; it stays as it is.

    ``result_digest`` is that of what was found, as :func:`domain.analysis.result.digest` says, in
    the ``form`` that results had then.
    """

    parameters: Parameters
    form: Annotated[int, Meta(ge=1)]
    result_digest: str


class StateDeleted(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="state_deleted",
):
    """The state takes no more operations."""


class StateErased(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="state_erased",
):
    """What the state held can never be read again: the key to its events was destroyed.

    This event itself is not sealed.
    """


Event = (
    StateCreated
    | TextForwarded
    | TokensGenerated
    | ContinuationsGenerated
    | BeamsGenerated
    | ContextSlid
    | ConfigChanged
    | HeadRewound
    | StateAnalyzed
    | StateDeleted
    | StateErased
)


class Recorded(Struct, frozen=True):
    """An event and the row that holds it."""

    row: Row
    event: Event

    @property
    def position(self) -> Position:
        """Place in the log."""
        return self.row.position

    @property
    def state_id(self) -> StateId:
        """The state it happened to."""
        return self.row.state_id

    @property
    def version(self) -> Version:
        """The state's version after it, for one that an analysis looked at the version it saw."""
        version = self.row.at_version if self.row.version is None else self.row.version
        assert version is not None
        return version


def needs(analysis: Recorded) -> Version | None:
    """The latest version of its state that an analysis is of; null if it is of another one, too."""
    event = analysis.event
    if isinstance(event, StateAnalyzed) and isinstance(event.parameters, CompareParameters):
        other = event.parameters
        alone = other.other_state_id == analysis.state_id
        return max(analysis.version, other.other_version) if alone else None
    return analysis.version


_decoder: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)


def encode(event: Event) -> str:
    """The payload as it is stored: JSON with sorted keys, readable without this program."""
    return as_json(event)


def event_type(event: Event) -> str:
    """The tag an event is stored under."""
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


DELETED: Final = event_type(StateDeleted())
ERASED: Final = event_type(StateErased())
"""The types of the events that end a state; the latter is never sealed."""

ANALYZED: Final = event_type(
    StateAnalyzed(parameters=NextParameters(), form=FORM, result_digest="")
)
"""The type of the events that leave their state as it was."""


def misnumbered(row: Row) -> Iterator[tuple[str, str]]:
    """Which of a row's two versions are not as they must be, each with what it must be.

    An analysis names the version that it saw, any other event the one that it led to.
    """
    names = ("version", "at_version")
    own, other = names[::-1] if row.type == ANALYZED else names
    if (getattr(row, own) or 0) < 1:
        yield own, "from 1 on"
    if getattr(row, other) is not None:
        yield other, f"none beside {own}"


def decode(row: Row) -> Recorded:
    """The event in a row.

    Raises:
        UnknownEvent: an unknown schema or tag, or a payload that is not that event.
        EventErased: it is sealed and there is no key.
    """
    payload = row.opened if row.sealed else row.payload
    if payload is None:
        raise EventErased(row.position)
    if not 1 <= row.schema <= SCHEMA:
        raise UnknownEvent(row.position, f"schema {row.schema} is newer than {SCHEMA}, or none")
    try:
        event = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise UnknownEvent(row.position, f"not a known event: {error}") from error
    if event_type(event) != row.type:
        raise UnknownEvent(row.position, f"stored as {row.type!r}, holds {event_type(event)!r}")
    return Recorded(row, event)
