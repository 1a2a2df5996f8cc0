"""What travels over HTTP, where it differs from the domain."""

from typing import Annotated, Any, Literal

import msgspec
from litestar.params import Parameter
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from domain.chain import Row, legible_row
from domain.config import ConfigChanges, Metadata, ModelType, StateConfig
from domain.content import Alternative
from domain.events import FinishReason
from domain.ids import ModelId, Position, StateId, TokenId, Version
from domain.merkle import Consistency, Inclusion
from domain.models import Numerics, Tier
from domain.origin import ContinuationId, Origin
from domain.plan import BeamWish, GenerationWish

Tokens = tuple[TokenId, ...]
Count = Annotated[int, Meta(ge=1, le=128)]
Size = Annotated[int, Parameter(ge=0, le=2**53 - 1)]


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body: unknown fields are refused."""


class CreateState(Body, frozen=True, kw_only=True):
    """Begin a state with a text, with tokens, or with the model's opening token."""

    model_id: ModelId | None = None
    text: str | None = None
    tokens: Tokens | None = None
    model_type: Literal["auto", "causal_lm", "sequence_classification"] = "auto"
    config: ConfigChanges = ConfigChanges()
    metadata: Metadata = {}


class ChangeConfig(Body, frozen=True, kw_only=True):
    """Change some settings of a state."""

    state_id: StateId
    config: ConfigChanges


class ForkState(Body, frozen=True, kw_only=True):
    """Begin ``n`` states with the tokens of another, as it was at a version or up to a position.

    With a ``continuation``: as it was at that version, and the tokens of one of the continuations
    or beams that were generated then.
    """

    state_id: StateId
    version: Version | None = None
    position: int | None = None
    continuation: ContinuationId | None = None
    n: Count = 1
    config: ConfigChanges = ConfigChanges()
    metadata: Metadata | None = None


class RewindState(Body, frozen=True, kw_only=True):
    """Cut a state back to a position, or to what it held at a version."""

    state_id: StateId
    position: int | None = None
    version: Version | None = None


class MergeState(Body, frozen=True, kw_only=True):
    """Begin a state with the tokens that states begin with, then each one's own, in order.

    Settings and metadata are those of the first state where they are not given.
    """

    state_ids: Annotated[tuple[StateId, ...], Meta(min_length=2, max_length=64)]
    strategy: Literal["concatenate"] = "concatenate"
    config: ConfigChanges = ConfigChanges()
    metadata: Metadata | None = None


class Forward(Body, frozen=True, kw_only=True):
    """Append text or tokens without generating."""

    state_id: StateId
    text: str | None = None
    tokens: Tokens | None = None


class GenerateTokens(GenerationWish, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continue a state; what is left out comes from the state's config."""

    state_id: StateId
    stream: bool = False


class GenerateMulti(GenerationWish, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continue a state in ``n`` ways, drawn independently; the state stays as it is."""

    state_id: StateId
    n: Count
    stream: bool = False


class GenerateBeams(BeamWish, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continue a state by beam search, by ``max_length`` tokens at most; it stays as it is."""

    state_id: StateId


class StateView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A state. ``head_position`` is the number of tokens it holds.

    ``dropped``, where it is not 0, is the number of tokens that it held before them and slid away
    from; random numbers are drawn by the sum of the two.
    """

    state_id: StateId
    model_id: ModelId
    model_type: ModelType
    head_position: int
    version: Version
    text: str
    config: StateConfig
    metadata: Metadata
    origin: Origin
    created_at: str
    modified_at: str
    dropped: int = 0
    tokens: Tokens | UnsetType = UNSET
    cache: "CacheView | UnsetType" = UNSET


class CacheView(Struct, frozen=True, kw_only=True):
    """How much of a state is in the KV cache, and where the slowest part of that is."""

    tier: Tier
    tokens_hot: int


class ImportedView(Struct, frozen=True, kw_only=True):
    """What was imported: ``imported`` are all states that were, those that others come from too."""

    state: StateView | None
    imported: list[StateId]
    events: int


class StateList(Struct, frozen=True, kw_only=True):
    """A page of states, newest first; ``next_cursor`` is null on the last page.

    ``unreadable`` are those whose events do not open for lack of their key, or are damaged.
    """

    states: list[StateView]
    unreadable: list[StateId] | UnsetType = UNSET
    next_cursor: str | None


class Forked(Struct, frozen=True, kw_only=True):
    """The states a fork began."""

    states: list[StateView]


class Deleted(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A state that was deleted; ``erased`` are all states that were erased, if they were."""

    state_id: StateId
    message: str
    erased: list[StateId] | UnsetType = UNSET


class ConfigView(Struct, frozen=True, kw_only=True):
    """A state's settings after a change."""

    state_id: StateId
    config: StateConfig
    version: Version


class ForwardedToken(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token that was appended; ``logprob`` is what the model gave it, null of a classifier.

    ``bytes`` is there if the token is not whole characters by itself.
    """

    token_id: TokenId
    text: str
    logprob: float | None
    bytes: tuple[int, ...] | UnsetType = UNSET


class Forwarded(Struct, frozen=True, kw_only=True):
    """What was appended."""

    state_id: StateId
    head_position: int
    version: Version
    tokens: list[ForwardedToken]


class ContinuationView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A generated text. ``finish_reason`` null: ``max_tokens`` was reached, it could go on.

    ``probabilities`` and ``logprobs`` are the model's own, before temperature and filters;
    ``sampling_probabilities`` (on ``include=sampling``) those the tokens were drawn with.
    ``bytes`` is there if some token is not whole characters by itself: the bytes of each that is
    not, null for the others.
    """

    text: str
    new_tokens: list[str]
    token_ids: Tokens
    probabilities: list[float]
    logprobs: list[float]
    finished: bool
    finish_reason: FinishReason | None
    top_logprobs: list[tuple[Alternative, ...]] | UnsetType = UNSET
    sampling_probabilities: list[float] | UnsetType = UNSET
    bytes: list[tuple[int, ...] | None] | UnsetType = UNSET


class Generated(ContinuationView, frozen=True, kw_only=True, omit_defaults=True):
    """What was generated, and where the state stands now."""

    state_id: StateId
    seed: int
    version: Version
    head_position: int


class GeneratedMulti(Struct, frozen=True, kw_only=True):
    """Several ways in which a state could go on; ``POST /v1/states/fork`` adopts one."""

    state_id: StateId
    version: Version
    seed: int
    continuations: list[ContinuationView]


class SequenceView(Struct, frozen=True, kw_only=True):
    """A text that beam search found; ``score`` is what it was ranked by."""

    text: str
    token_ids: Tokens
    logprobs: list[float]
    score: float
    finished: bool


class GeneratedBeams(Struct, frozen=True, kw_only=True):
    """What beam search found, best first: the texts, their scores, and all about them."""

    state_id: StateId
    version: Version
    beams: list[str]
    scores: list[float]
    sequences: list[SequenceView]


class StreamedToken(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One token of a stream; provisional until ``done``.

    ``index`` counts the tokens of its branch, ``position`` is its place in the state.
    """

    branch: int | UnsetType = UNSET
    index: int
    position: int
    token_id: TokenId
    text: str
    probability: float
    logprob: float
    bytes: tuple[int, ...] | UnsetType = UNSET


class EventView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of the log; ``payload`` is exactly what is stored.

    Where that is sealed, ``content`` is what it holds, unless the state was erased.
    """

    position: Position
    state_id: StateId
    version: Version | None
    at_version: Version | None
    type: str
    schema: int
    payload: Raw
    fingerprint: str | None
    recorded_at: str
    actor: str
    request_id: str
    previous_hash: str
    hash: str
    source: Raw | UnsetType = UNSET
    content: Raw | UnsetType = UNSET

    @classmethod
    def of(cls, row: Row) -> "EventView":
        """The view of a row; of a damaged one as much as can be shown."""
        row = legible_row(row)
        return cls(
            position=row.position,
            state_id=row.state_id,
            version=row.version,
            at_version=row.at_version,
            type=row.type,
            schema=row.schema,
            payload=_json(row.payload),
            fingerprint=row.fingerprint,
            recorded_at=row.recorded_at,
            actor=row.actor,
            request_id=row.request_id,
            previous_hash=row.previous_hash.hex(),
            hash=row.hash.hex(),
            source=UNSET if row.source is None else _json(row.source),
            content=UNSET if row.opened is None else _json(row.opened),
        )


def _json(text: str) -> Raw:
    """A stored JSON text as it is; one that cannot be read, or not any more, as a string."""
    try:
        msgspec.json.decode(text, type=Raw)
    except (msgspec.DecodeError, RecursionError):  # none, or one that nobody could read
        return Raw(msgspec.json.encode(text))
    return Raw(text.encode())


class EventList(Struct, frozen=True, kw_only=True):
    """Events in order; ``next_after`` continues the list and is null at its end."""

    events: list[EventView]
    next_after: int | None


class HeadView(Struct, frozen=True, kw_only=True):
    """The log as it stands, or stood at a size: its newest position and hash, and the root.

    Whoever keeps these can tell later if anything before them was altered. ``checkpoint`` is all
    of it as a text to keep, signed if there is a ``public_key``.
    """

    position: Position
    hash: str
    log_id: str
    size: int
    root: str
    checkpoint: str
    public_key: str | None


class InclusionView(Struct, frozen=True, kw_only=True):
    """A proof that the event whose row has ``hash`` is in the log that ``checkpoint`` names."""

    inclusion: Inclusion
    hash: str
    root: str
    checkpoint: str


class ConsistencyView(Struct, frozen=True, kw_only=True):
    """A proof that the log of ``checkpoint`` begins with what the log was at an earlier size."""

    consistency: Consistency
    first_root: str
    second_root: str
    checkpoint: str


class ModelView(Struct, frozen=True, kw_only=True):
    """A model with its ``config.json`` and what it claims about its bits once loaded."""

    model_id: ModelId
    description: str
    model_type: ModelType | None
    loaded: bool
    embedded: bool
    config: dict[str, Any]
    numerics: Numerics


class Health(Struct, frozen=True, kw_only=True):
    """The server is up."""

    status: Literal["ok"]
    version: str


class Problem(Struct, frozen=True, kw_only=True):
    """RFC 9457 problem details; more members say more, such as ``field`` or ``state_id``."""

    type: str
    title: str
    status: int
    detail: str
