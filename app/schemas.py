"""What travels over HTTP, where it differs from the domain."""

from typing import Annotated, Any, Literal

from litestar.params import Parameter
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from domain.chain import Row
from domain.config import ConfigChanges, Metadata, ModelType, StateConfig
from domain.decide import GenerationWish
from domain.events import Alternative, FinishReason, Origin
from domain.ids import ModelId, Position, StateId, TokenId, Version
from domain.ports import Numerics, Tier

Tokens = tuple[TokenId, ...]
Count = Annotated[int, Meta(ge=1, le=128)]
After = Annotated[int, Parameter(ge=0, le=2**53 - 1)]


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
    """Begin ``n`` states with the tokens of another, as it was at a version or up to a position."""

    state_id: StateId
    version: Version | None = None
    position: int | None = None
    n: Count = 1
    config: ConfigChanges = ConfigChanges()
    metadata: Metadata | None = None


class RewindState(Body, frozen=True, kw_only=True):
    """Cut a state back to a position, or to what it held at a version."""

    state_id: StateId
    position: int | None = None
    version: Version | None = None


class Forward(Body, frozen=True, kw_only=True):
    """Append text or tokens without generating."""

    state_id: StateId
    text: str | None = None
    tokens: Tokens | None = None


class GenerateTokens(GenerationWish, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continue a state; what is left out comes from the state's config."""

    state_id: StateId
    stream: bool = False


class Verify(Body, frozen=True, kw_only=True):
    """Verify one state or the whole log, against a remembered head if given."""

    state_id: StateId | None = None
    all: Literal[True] | None = None
    head: str | None = None


class StateView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A state. ``head_position`` is the number of tokens it holds."""

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
    tokens: Tokens | UnsetType = UNSET
    cache: "CacheView | UnsetType" = UNSET


class CacheView(Struct, frozen=True, kw_only=True):
    """How much of a state is in the KV cache, and where the slowest part of that is."""

    tier: Tier
    tokens_hot: int


class StateList(Struct, frozen=True, kw_only=True):
    """A page of states, newest first; ``next_cursor`` is null on the last page."""

    states: list[StateView]
    next_cursor: str | None


class Forked(Struct, frozen=True, kw_only=True):
    """The states a fork began."""

    states: list[StateView]


class Deleted(Struct, frozen=True, kw_only=True):
    """A state that was deleted."""

    state_id: StateId
    message: str


class ConfigView(Struct, frozen=True, kw_only=True):
    """A state's settings after a change."""

    state_id: StateId
    config: StateConfig
    version: Version


class ForwardedToken(Struct, frozen=True, kw_only=True):
    """A token that was appended; ``logprob`` is what the model gave it."""

    token_id: TokenId
    text: str
    logprob: float


class Forwarded(Struct, frozen=True, kw_only=True):
    """What was appended."""

    state_id: StateId
    head_position: int
    version: Version
    tokens: list[ForwardedToken]


class Generated(Struct, frozen=True, kw_only=True):
    """What was generated. ``finish_reason`` null: ``max_tokens`` was reached, it could go on.

    ``probabilities`` and ``logprobs`` are the model's own, before temperature and filters;
    ``sampling_probabilities`` (on ``include=sampling``) those the tokens were drawn with.
    """

    state_id: StateId
    text: str
    new_tokens: list[str]
    token_ids: Tokens
    probabilities: list[float]
    logprobs: list[float]
    finished: bool
    finish_reason: FinishReason | None
    seed: int
    version: Version
    head_position: int
    top_logprobs: tuple[tuple[Alternative, ...], ...] | UnsetType = UNSET
    sampling_probabilities: list[float] | UnsetType = UNSET


class StreamedToken(Struct, frozen=True, kw_only=True):
    """One token of a stream; provisional until ``done``."""

    index: int
    position: int
    token_id: TokenId
    text: str
    probability: float
    logprob: float


class EventView(Struct, frozen=True, kw_only=True):
    """One row of the log; ``payload`` is exactly what is stored."""

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

    @classmethod
    def of(cls, row: Row) -> "EventView":
        """The view of a row."""
        return cls(
            position=row.position,
            state_id=row.state_id,
            version=row.version,
            at_version=row.at_version,
            type=row.type,
            schema=row.schema,
            payload=Raw(row.payload.encode()),
            fingerprint=row.fingerprint,
            recorded_at=row.recorded_at,
            actor=row.actor,
            request_id=row.request_id,
            previous_hash=row.previous_hash.hex(),
            hash=row.hash.hex(),
        )


class EventList(Struct, frozen=True, kw_only=True):
    """Events in order; ``next_after`` continues the list and is null at its end."""

    events: list[EventView]
    next_after: int | None


class HeadView(Struct, frozen=True, kw_only=True):
    """The newest position of the log and its hash.

    Whoever keeps the pair can tell later if anything before it was altered.
    """

    position: Position
    hash: str


class ModelView(Struct, frozen=True, kw_only=True):
    """A model with its ``config.json`` and what it claims about its bits once loaded."""

    model_id: ModelId
    description: str
    model_type: ModelType | None
    loaded: bool
    embedded: bool
    config: dict[str, Any]
    numerics: Numerics | None


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
