"""Everything Cacher refuses, as one tree.

::

    Refusal
     |- InvalidInput            a field of the request is wrong; names every one of them
     |- NotFound
     |   |- StateNotFound       never existed
     |   |- StateIsDeleted      existed; its events stay readable
     |   |- VersionNotFound     the state has no such version
     |   `- ModelNotFound       not a model that clients may name
     |- Conflict
     |   |- VersionConflict     the state has moved on since it was read
     |   |- FingerprintChanged  the stream to resume began under other numerics
     |   |- NothingToResume     no stream was begun by this request
     |   |- NotAPrefix          the tokens of that version do not begin the state's tokens
     |   `- IdempotencyKeyReused  the key was used for another request
     |- PreconditionFailed      If-Match names another version
     |- TooLarge                text or tokens that do not fit the context
     |- QueueFull               too much is waiting already; try again later
     `- Unavailable
         |- ModelUnavailable    the model's files cannot be had or are not usable
         `- LogUnavailable      the database cannot be written

    LogError                    the log itself is wrong; nobody's request is to blame
     |- ChainBroken             a stored row does not match its hash
     |- UnknownEvent            an event of a newer release, or not an event at all
     |- SchemaTooNew            the database was written by a newer release
     |- MigrationChanged        an applied migration's text is not what was applied
     `- LogIsLocked             another process writes to this log
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
    """A stream cannot be resumed under numerics that could draw other tokens."""

    slug = "fingerprint-changed"

    def __init__(self, state_id: StateId, begun: str, current: str) -> None:
        super().__init__(
            f"this stream of state {state_id!r} began under the numerics fingerprint {begun},"
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


class QueueFull(Refusal):
    """Too many requests are waiting."""

    slug = "queue-full"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} requests are waiting already; try again later", limit=limit)


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


class LogError(Exception):
    """The log itself is wrong."""


class ChainBroken(LogError):
    """A stored row does not match its hash or its predecessor."""

    def __init__(self, position: Position, message: str) -> None:
        super().__init__(f"position {position}: {message}")
        self.position = position


class UnknownEvent(LogError):
    """A stored event that this release cannot read."""

    def __init__(self, position: Position, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position = position


class SchemaTooNew(LogError):
    """The database was written by a newer release."""


class MigrationChanged(LogError):
    """An applied migration is not the one this release carries."""


class LogIsLocked(LogError):
    """Another process writes to this log."""
