"""What the application needs from the outside, as protocols; ``infra`` makes them real."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from msgspec import Struct

from domain.chain import Head, Row
from domain.config import (
    Constraint,
    ModelType,
)
from domain.counters import CacheCounters as CacheCounters
from domain.counters import Tier as Tier
from domain.events import (
    Event,
    Fragment,
    Recorded,
)
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, StateId, TokenId, Version
from domain.intents import GenerationStarted
from domain.merkle import Tile
from domain.report import Standing
from domain.transfer import Imported
from domain.work import BeamRequest, BeamsFound, GenerationRequest, Scored, ScoreRequest, Step


class Provenance(Struct, frozen=True, kw_only=True):
    """Who caused an event, by which request, and when (RFC 3339, UTC, microseconds)."""

    actor: str
    request_id: str
    recorded_at: str


class Idempotency(Struct, frozen=True, kw_only=True):
    """A client's ``Idempotency-Key`` in its scope, and the SHA-256 of the request's body."""

    actor: str
    method: str
    path: str
    key: str
    request_digest: bytes


class Append(Struct, frozen=True, kw_only=True):
    """One event to add to one state.

    ``expected_version`` is the version the state has now (0 for a new state); the event gets the
    next one. ``logits`` are blobs kept beside the event, one per token.
    """

    state_id: StateId
    expected_version: Version
    event: Event
    fingerprint: Fingerprint | None = None
    logits: tuple[bytes, ...] = ()


class Remembered(Struct, frozen=True):
    """What a request with this ``Idempotency-Key`` did: the digest of its body, its events."""

    request_digest: bytes
    events: tuple[Recorded, ...]


class StatePage(Struct, frozen=True):
    """A page of live states, newest first; ``next_cursor`` is null on the last page."""

    state_ids: tuple[StateId, ...]
    next_cursor: Position | None


class LogReader(Protocol):
    """Reads of the log. Nothing here waits for a writer.

    ``log_id`` names the log; what states of an ``erasable`` one hold is sealed.
    """

    log_id: str
    erasable: bool

    async def head(self) -> Head:
        """The newest position and hash (the genesis head of an empty log)."""

    async def genesis(self) -> Head:
        """The head before the first event."""

    async def rows(self, *, after: Position = Position(0), limit: int | None = None) -> list[Row]:
        """Rows of the whole log in order, from the one after position ``after``."""

    async def state_rows(
        self,
        state_id: StateId,
        *,
        after: Version = Version(0),
        until: Version | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """Rows of one state in order: versions above ``after``, up to and with ``until``."""

    async def newest(self, state_id: StateId) -> Row | None:
        """The row of a state's latest version; null if there is no such state."""

    async def page(
        self,
        *,
        after: Position,
        limit: int,
        max_bytes: int,
        state_id: StateId | None = None,
    ) -> list[Row]:
        """Rows in the order of the log, of one state or of all, from the one after a position.

        At most ``limit``, and hardly more of them than have ``max_bytes`` of payload together;
        none only if there are none.
        """

    async def logits(self, position: Position) -> tuple[bytes, ...]:
        """The blobs kept beside an event, in order; one that cannot be opened is empty."""

    async def stored_logits(self, position: Position) -> tuple[bytes, ...]:
        """The same as they are stored: sealed in an erasable log."""

    async def fingerprint(self, fingerprint_id: str) -> Fingerprint | None:
        """A fingerprint that some event refers to."""

    async def live_states(
        self, *, limit: int, cursor: Position | None = None, model_id: ModelId | None = None
    ) -> StatePage:
        """States that are not deleted, newest first, from below ``cursor``."""

    async def state_ids(self) -> list[StateId]:
        """Every state that ever was, oldest first."""

    async def standings(
        self, state_ids: Sequence[StateId], *, after: Position
    ) -> dict[StateId, Standing]:
        """Where states stand that have events after position ``after``."""

    async def size(self) -> int:
        """Number of events."""

    async def tiles(self) -> list[Tile]:
        """The roots over full tiles of events that are kept, in order and without a gap."""

    async def hashes(self, *, after: Position, limit: int) -> list[tuple[Position, bytes]]:
        """Hashes of events in order, from the one after position ``after``."""

    async def descendants(self, state_id: StateId) -> list[StateId]:
        """States that began with what this one held, and theirs, in the order they began."""

    async def released_until(self) -> Position:
        """The position up to which stored logits may have been let go of."""


class EventLog(LogReader, Protocol):
    """The one truth. What :meth:`append` has returned is on disk."""

    async def append(
        self,
        appends: Sequence[Append],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
        replaces: bool = False,
    ) -> tuple[Recorded, ...]:
        """Record events, all or none, and the ``Idempotency-Key`` they answer.

        A key that was used before gets the events recorded then, and records nothing; unless this
        ``replaces`` them as its answer.

        Raises:
            VersionConflict: a state is not at its ``expected_version``; names the current one.
            IdempotencyKeyReused: the key belongs to a request with another body.
            QueueFull: too many appends are waiting.
            LogUnavailable: the database could not be written; nothing was recorded.
        """

    async def adopt(
        self,
        imported: Sequence[Imported],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> tuple[Recorded, ...]:
        """Record events of another log with their source, all or none.

        They keep their state, version, type, schema, payload and fingerprint, and get a position
        and hashes of this log.

        Raises:
            VersionConflict: a state is here already; names its version.
            IdempotencyKeyReused, QueueFull, LogUnavailable: as for :meth:`append`.
        """

    async def erase(
        self,
        state_ids: Sequence[StateId],
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> tuple[Recorded, ...]:
        """Record that states are erased and destroy their keys; on disk before this returns.

        No state can begin with what an erased one held.

        Raises:
            NotErasable: the log was not created erasable.
            StateNotFound, StateIsErased: there is no such state, or nothing left to erase.
            HasDescendants: states that are not among these hold what they held; names them.
            IdempotencyKeyReused, QueueFull, LogUnavailable: as for :meth:`append`.
        """

    async def grown(self, after: Position) -> None:
        """Return once there is an event after position ``after``."""

    async def recall(self, idempotency: Idempotency) -> Remembered | None:
        """What an earlier request with this key in this scope did."""

    async def begin_generation(
        self,
        started: GenerationStarted,
        *,
        provenance: Provenance,
        idempotency: Idempotency | None = None,
    ) -> None:
        """Record the intent of a streamed generation, on disk before this returns."""

    async def begun_generation(self, idempotency: Idempotency) -> GenerationStarted | None:
        """The intent that a streamed request with this key left last, if any.

        Raises:
            IdempotencyKeyReused: the key belongs to a request with another body.
        """


class Signer(Protocol):
    """An Ed25519 key that signs checkpoints.

    ``name`` is what signature lines call it, ``key_id`` are the four bytes that tell keys of one
    name apart, ``public_key`` is PEM.
    """

    name: str
    key_id: bytes
    public_key: str

    def sign(self, text: bytes) -> bytes:
        """The signature over a text, 64 bytes."""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What is known of a model without loading it."""

    model_id: ModelId
    description: str
    model_type: ModelType | None
    loaded: bool
    embedded: bool


class Numerics(Struct, frozen=True, kw_only=True):
    """What a loaded model claims about its bits, and how they are made."""

    deterministic: bool
    fingerprint: str
    strategy: str
    dtype: str
    quantum: int
    query_tile: int
    note: str | None


class LanguageModel(Protocol):
    """A loaded causal language model. All work runs on the engine's thread."""

    model_id: ModelId
    model_type: ModelType
    revision: str | None
    context_size: int
    vocabulary_size: int
    eos_token_ids: frozenset[TokenId]
    max_beams: int
    config: dict[str, Any]
    numerics: Numerics
    fingerprint: Fingerprint

    async def encode(self, text: str, *, beginning: bool, room: int) -> tuple[TokenId, ...]:
        """Tokens of a text; at the beginning with the special tokens the model expects.

        Raises:
            TooLarge: the text cannot be ``room`` tokens or fewer; found without encoding it.
        """

    def opening(self) -> tuple[TokenId, ...]:
        """Tokens of a state that begins with nothing: BOS, or EOS where there is no BOS."""

    def fragment(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> Fragment:
        """``tokens`` with the text each of them adds after ``before``."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """Draw tokens one by one. Closing the iterator ends the work and frees its memory."""

    async def search(self, request: BeamRequest) -> BeamsFound:
        """Continue a text by beam search. Cancelling it ends the work and frees its memory."""

    async def score(
        self, requests: Sequence[ScoreRequest], *, private: bool = False
    ) -> list[Scored]:
        """Score texts at prefill speed, each as asked.

        ``private`` uses no KV block that this call did not compute itself, and leaves none
        behind; tokens that several of the texts begin with are computed once.
        """

    async def check_constraint(self, constraint: Constraint) -> None:
        """Make sure that a text can be held to a constraint.

        Raises:
            InvalidInput: it is malformed, too large, or no text satisfies it; says where.
        """

    def fulfils(self, constraint: Constraint, tokens: Sequence[TokenId]) -> bool:
        """Whether tokens satisfy a constraint that allows nothing after them."""

    def tokens_hot(self, tokens: Sequence[TokenId]) -> int:
        """How many leading tokens have their K/V in the cache."""

    def tier(self, tokens: Sequence[TokenId]) -> Tier:
        """The slowest memory that a hot token's K/V would come from."""

    def counters(self) -> CacheCounters:
        """Counters of the KV cache."""

    async def forget(self) -> None:
        """Drop every block of the cache that no running work holds."""


class Models(Protocol):
    """The models that may be named here."""

    def known(self) -> list[ModelInfo]:
        """Every model that clients may name (hub names allowed by ``*`` excepted)."""

    def info(self, model_id: ModelId) -> ModelInfo:
        """One of them.

        Raises:
            ModelNotFound: clients may not name it.
        """

    async def describe(self, model_id: ModelId) -> tuple[dict[str, Any], Numerics | None]:
        """A model's ``config.json`` and, for one that is run here, its numerics; loads it.

        Raises:
            ModelNotFound, ModelUnavailable: as for :meth:`get`.
        """

    def counters(self) -> dict[ModelId, CacheCounters]:
        """Counters of the KV cache of every loaded model."""

    async def forget(self) -> None:
        """Drop every block of every loaded model's KV cache that no running work holds."""

    async def get(self, model_id: ModelId) -> LanguageModel:
        """The model, loaded if it was not.

        Raises:
            ModelNotFound: clients may not name it.
            ModelUnavailable: it cannot be loaded; says why and what would work.
        """
