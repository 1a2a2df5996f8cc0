"""Everything Cacher refuses, as one tree.

::

    Refusal
     |- InvalidInput            a field of the request is wrong; names every one of them
     |- NotFound
     |   |- StateNotFound       never existed
     |   |- StateIsDeleted      existed; its events stay readable
     |   |- VersionNotFound     the state has no such version
     |   |- ModelNotFound       not a model that clients may name
     |   |- NoSigningKey        checkpoints are not signed here
     |   `- ReplayNotFound      no such replay, or its report is kept no more
     |- StateIsErased           existed; what it held was destroyed
     |- Conflict
     |   |- VersionConflict     the state has moved on since it was read
     |   |- FingerprintChanged  the request to go on with began under other numerics
     |   |- ResultChanged       it found something else (domain.analysis.result)
     |   |- NothingToResume     no stream was begun by this request
     |   |- NotAPrefix          the tokens of that version do not begin the state's tokens
     |   |- IdempotencyKeyReused  the key was used for another request
     |   |- NotRunnable         an imported state is of another model of this name
     |   |- StateExists         a state to import is there already
     |   |- HasDescendants      other states hold what is to be erased
     |   `- NotErasable         the log was not created erasable
     |- BrokenExport            a file to import that does not prove what it holds
     |   `- ExportTooNew        a file of a newer release
     |- PreconditionFailed      If-Match names another version
     |- TooLarge                text or tokens that do not fit the context
     |   `- ResultTooLarge      what was asked about a state's inside does not fit an answer
     |- QueueFull               too much is waiting already; try again later
     `- Unavailable
         |- ModelUnavailable    the model's files cannot be had or are not usable
         |- LogUnavailable      the database cannot be written
         `- LogAltered          its events are not those that its Merkle tree was made of

    NotComparable               nothing could be replayed, or not what a baseline is of
"""

from typing import Any, ClassVar

from msgspec import Struct

from domain.ids import ModelId, Position, StateId, Version


class FieldProblem(Struct, frozen=True):
    """One field of a request and what is wrong with it."""

    field: str
    message: str


class Refusal(Exception):
    """A request that cannot be carried out; the message says what was wrong and what to do.

    ``slug`` is the stable name of the problem; ``facts`` are machine-readable details.
    """

    slug: ClassVar[str] = "refused"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class InvalidInput(Refusal):
    """Fields of the request are wrong."""

    slug = "invalid-input"

    def __init__(self, *problems: FieldProblem) -> None:
        super().__init__(
            "; ".join(f"{p.field}: {p.message}" for p in problems),
            field=problems[0].field,
            errors=problems,
        )


def invalid(field: str, message: str) -> InvalidInput:
    """The refusal of a single field."""
    return InvalidInput(FieldProblem(field, message))


class NotFound(Refusal):
    """What the request names does not exist."""

    slug = "not-found"


class StateNotFound(NotFound):
    """There is no state of this id."""

    slug = "state-not-found"

    def __init__(self, state_id: StateId) -> None:
        super().__init__(f"there is no state {state_id!r}", state_id=state_id)


class StateIsDeleted(NotFound):
    """The state was deleted; its events stay readable."""

    slug = "state-deleted"

    def __init__(self, state_id: StateId, deleted_at: str) -> None:
        super().__init__(
            f"state {state_id!r} was deleted at {deleted_at};"
            f" its events stay readable at /v1/states/{state_id}/events",
            state_id=state_id,
            deleted_at=deleted_at,
        )


class VersionNotFound(NotFound):
    """The state has no such version."""

    slug = "version-not-found"

    def __init__(self, state_id: StateId, version: Version, current: Version) -> None:
        super().__init__(
            f"state {state_id!r} has no version {version}; it has versions 1 to {current}",
            state_id=state_id,
            version=version,
            current_version=current,
        )


class ModelNotFound(NotFound):
    """No model of this name may be used here."""

    slug = "model-not-found"

    def __init__(self, model_id: ModelId, allowed: tuple[ModelId, ...]) -> None:
        super().__init__(
            f"model {model_id!r} is not served here; allowed are {', '.join(allowed)}"
            " (the setting CACHER_ALLOWED_MODELS names more)",
            model_id=model_id,
            allowed=allowed,
        )


class NoSigningKey(NotFound):
    """Checkpoints are not signed here."""

    slug = "no-signing-key"

    def __init__(self) -> None:
        super().__init__(
            "checkpoints are not signed here: the server was started without CACHER_SIGNING_KEY"
        )


class ReplayNotFound(NotFound):
    """There is no replay of this id."""

    slug = "replay-not-found"

    def __init__(self, replay_id: str) -> None:
        super().__init__(
            f"there is no replay {replay_id!r}, or its report is not kept any more",
            replay_id=replay_id,
        )


class StateIsErased(Refusal):
    """What the state held was destroyed for good."""

    slug = "state-erased"

    def __init__(self, state_id: StateId, erased_at: str) -> None:
        super().__init__(
            f"state {state_id!r} was erased at {erased_at}: what it held cannot be read again",
            state_id=state_id,
            erased_at=erased_at,
        )


class Conflict(Refusal):
    """The request does not fit what has happened since."""

    slug = "conflict"


class VersionConflict(Conflict):
    """The state has moved on."""

    slug = "version-conflict"

    def __init__(self, state_id: StateId, expected: Version, current: Version) -> None:
        super().__init__(
            f"state {state_id!r} is at version {current}, not {expected}; read it and try again",
            state_id=state_id,
            expected_version=expected,
            current_version=current,
        )


class FingerprintChanged(Conflict):
    """What was begun cannot be gone on with under numerics that could give something else."""

    slug = "fingerprint-changed"

    def __init__(self, state_id: StateId, begun: str, current: str) -> None:
        super().__init__(
            f"this request about state {state_id!r} began under the numerics fingerprint {begun},"
            f" which is {current} now; send the request with a fresh Idempotency-Key",
            state_id=state_id,
            begun_fingerprint=begun,
            current_fingerprint=current,
        )


class NothingToResume(Conflict):
    """A stream that is not known cannot be resumed."""

    slug = "nothing-to-resume"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"no stream with the Idempotency-Key {key!r} is known; send the request without"
            " Last-Event-ID to begin one",
            idempotency_key=key,
        )


class NotAPrefix(Conflict):
    """The tokens of the version to rewind to do not begin the state's tokens."""

    slug = "not-a-prefix"

    def __init__(self, state_id: StateId, version: Version) -> None:
        super().__init__(
            f"the tokens of version {version} are not a prefix of the tokens of state"
            f" {state_id!r}; fork that version instead",
            state_id=state_id,
            version=version,
        )


class IdempotencyKeyReused(Conflict):
    """The key belongs to another request."""

    slug = "idempotency-key-reused"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Idempotency-Key {key!r} was used for a request with another body; use a fresh key",
            idempotency_key=key,
        )


class NotRunnable(Conflict):
    """The state holds what the model of this name here cannot be asked about."""

    slug = "not-runnable"

    def __init__(self, state_id: StateId, model_id: ModelId, reason: str) -> None:
        super().__init__(
            f"state {state_id!r} cannot be run by the model {model_id!r} of this server: {reason};"
            " it was imported from one where that name means another model",
            state_id=state_id,
            model_id=model_id,
        )


class StateExists(Conflict):
    """A state to import is there already."""

    slug = "state-exists"

    def __init__(self, state_id: StateId) -> None:
        super().__init__(
            f"state {state_id!r} is in this log already; nothing was imported", state_id=state_id
        )


class HasDescendants(Conflict):
    """Other states hold what is to be erased."""

    slug = "has-descendants"

    def __init__(self, state_id: StateId, descendants: tuple[StateId, ...]) -> None:
        super().__init__(
            f"other states ({len(descendants)}) hold what state {state_id!r} held: erase them too"
            " with forks=true",
            state_id=state_id,
            descendants=descendants,
        )


class NotErasable(Conflict):
    """The log keeps what states hold unsealed."""

    slug = "not-erasable"

    def __init__(self) -> None:
        super().__init__(
            "nothing can be erased from this log: it was not created with CACHER_ERASABLE=1"
        )


class BrokenExport(Refusal):
    """A file to import that does not prove what it holds; nothing was imported."""

    slug = "broken-export"


class ExportTooNew(BrokenExport):
    """A file that a newer release wrote."""


class PreconditionFailed(Refusal):
    """``If-Match`` names a version that is not the state's."""

    slug = "precondition-failed"

    def __init__(self, state_id: StateId, expected: Version, current: Version) -> None:
        super().__init__(
            f"If-Match names version {expected}, but state {state_id!r} is at version {current}",
            state_id=state_id,
            expected_version=expected,
            current_version=current,
        )


class TooLarge(Refusal):
    """Text or tokens that do not fit."""

    slug = "too-large"


class ResultTooLarge(TooLarge):
    """What is asked for does not fit into an answer."""

    slug = "result-too-large"

    def __init__(self, size: int, limit: int, remedy: str, unit: str = "bytes") -> None:
        super().__init__(
            f"the answer would take {size} {unit}, at most {limit} are given. {remedy}",
            size=size,
            limit=limit,
        )


class QueueFull(Refusal):
    """Too much is waiting, or open."""

    slug = "queue-full"

    def __init__(self, limit: int, what: str = "requests are waiting") -> None:
        super().__init__(f"{limit} {what} already; try again later", limit=limit)


class Unavailable(Refusal):
    """Something the request needs cannot be had now."""

    slug = "unavailable"


class ModelUnavailable(Unavailable):
    """The model cannot be loaded."""

    slug = "model-unavailable"

    def __init__(self, model_id: ModelId, reason: str, remedy: str) -> None:
        super().__init__(
            f"model {model_id!r} cannot be loaded: {reason.rstrip('.')}. {remedy}",
            model_id=model_id,
        )


class LogUnavailable(Unavailable):
    """The database cannot be written."""

    slug = "log-unavailable"


class LogAltered(Unavailable):
    """Rows are not those whose root was kept: nothing can be proven of them."""

    slug = "log-altered"

    def __init__(self, after: Position, last: Position) -> None:
        super().__init__(
            f"events after position {after}, up to {last}, were changed or removed behind the"
            " back of the log: they do not lead to the root that was kept of them"
        )


class NotComparable(Exception):
    """A replay and what it is to be held against do not fit, or there is nothing to replay."""
