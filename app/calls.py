"""What a request says in its headers: who it is, its conditions, its keys."""

import hashlib
import hmac
import re
import uuid
from typing import Any, Final

from litestar import Request
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.types import Message, Scope

from app.service import Call
from domain.errors import invalid
from domain.ids import Version
from domain.ports import Idempotency

ANONYMOUS: Final = "anonymous"
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]{1,200}")
_ETAG: Final = re.compile(r'"(\d{1,15})"')


async def call_of(request: Request[Any, Any, Any], body_digest: bytes | None = None) -> Call:
    """The call of a request; ``body_digest`` is the SHA-256 of its body where that is known.

    Raises:
        InvalidInput: a header that is not of its form.
    """
    key = request.headers.get("idempotency-key")
    actor = actor_of(request)
    idempotency = None
    if key is not None:
        if not _PRINTABLE.fullmatch(key):
            raise invalid("Idempotency-Key", "must be 1 to 200 printable ASCII characters")
        idempotency = Idempotency(
            actor=actor,
            method=request.method,
            path=request.url.path,
            key=key,
            request_digest=body_digest or hashlib.sha256(await request.body()).digest(),
        )
    return Call(
        actor=actor,
        request_id=request_id_of(request.scope),
        if_match=_if_match(request.headers.get("if-match")),
        idempotency=idempotency,
    )


def last_event_id(request: Request[Any, Any, Any], *, streamed: bool) -> int | None:
    """The id of the last event that a client has of a stream it resumes; -1 if it has none.

    Null where nothing is resumed.

    Raises:
        InvalidInput: it is no id, or the request names no stream to resume.
    """
    given = request.headers.get("last-event-id")
    if given is None:
        return None
    if not streamed:
        raise invalid("Last-Event-ID", "resumes a stream: send it with stream: true")
    if "idempotency-key" not in request.headers:
        raise invalid("Last-Event-ID", "needs the Idempotency-Key that the stream began with")
    if not re.fullmatch(r"\d{0,9}", given, re.ASCII):
        raise invalid("Last-Event-ID", "must be the id of an event of the stream, or empty")
    return int(given or -1)


def etag(version: Version) -> dict[str, str]:
    """The header that names a state's version."""
    return {"ETag": f'"{version}"'}


def _if_match(value: str | None) -> Version | None:
    if value is None or value.strip() == "*":
        return None
    match = _ETAG.fullmatch(value.strip())
    if match is None:
        raise invalid("If-Match", 'must be one ETag as given with a state, such as "3"')
    return Version(int(match[1]))


def actor_of(request: Request[Any, Any, Any]) -> str:
    """Who a request is from: a name made from its key, which names no secret."""
    key = _key(request)
    return ANONYMOUS if key is None else f"key-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _key(request: Request[Any, Any, Any]) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")


def check_key(request: Request[Any, Any, Any], keys: tuple[str, ...]) -> None:
    """Let a request in.

    Raises:
        NotAuthorizedException: no key where one is needed (401).
        PermissionDeniedException: a key that is not accepted (403).
    """
    if not keys:
        return
    key = _key(request)
    if key is None:
        raise NotAuthorizedException("Send a key: Authorization: Bearer KEY, or X-API-Key: KEY")
    if not any(hmac.compare_digest(key.encode(), known.encode()) for known in keys):
        raise PermissionDeniedException("This key is not accepted")


async def disconnected(request: Request[Any, Any, Any]) -> None:
    """Return once the client has gone; only for a request whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def request_id_of(scope: Scope) -> str:
    """The ``X-Request-ID`` of a request: the client's if it is of our form, or one made here."""
    state = scope["state"]
    if "request_id" not in state:
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        state["request_id"] = given if _PRINTABLE.fullmatch(given) else uuid.uuid4().hex
    request_id: str = state["request_id"]
    return request_id


async def echo_request_id(message: Message, scope: Scope) -> None:
    """Hook before an answer is sent, also one to a path that no route takes: name the request."""
    if message["type"] == "http.response.start":
        header = (b"x-request-id", request_id_of(scope).encode())
        message["headers"] = [*message["headers"], header]
