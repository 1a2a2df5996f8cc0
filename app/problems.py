"""Refusals to RFC 9457 problem+json: one table, and nothing an answer should not show."""

import logging
from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ExceptionHandlersMap

from app.representations import NotAcceptable
from app.schemas import Problem
from domain.errors import (
    BrokenExport,
    Conflict,
    InvalidInput,
    NotFound,
    PreconditionFailed,
    QueueFull,
    Refusal,
    StateIsErased,
    TooLarge,
    Unavailable,
)
from domain.log_errors import EventErased, LogError

MEDIA_TYPE: Final = "application/problem+json"
STATUS: Final[dict[type[Refusal], int]] = {
    InvalidInput: 400,
    NotFound: 404,
    Conflict: 409,
    StateIsErased: 410,
    BrokenExport: 400,
    NotAcceptable: 406,
    PreconditionFailed: 412,
    TooLarge: 413,
    QueueFull: 429,
    Unavailable: 503,
}
_HEADERS: Final[dict[int, dict[str, str]]] = {
    401: {"WWW-Authenticate": "Bearer"},
    409: {"x-should-retry": "false"},
    412: {"x-should-retry": "false"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
}
_TITLES: Final = {
    400: "Bad input",
    401: "Key missing",
    403: "Key not accepted",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    409: "Conflict",
    410: "Gone",
    412: "Precondition failed",
    413: "Too large",
    415: "Unsupported media type",
    429: "Too many requests",
    500: "Internal error",
    503: "Unavailable",
}


def described(*statuses: int) -> dict[int, ResponseSpec]:
    """What an answer with one of these statuses is, for the OpenAPI document."""
    return {
        status: ResponseSpec(
            Problem, generate_examples=False, description=_TITLES[status], media_type=MEDIA_TYPE
        )
        for status in statuses
    }


RESPONSES: Final = described(400, 401, 403, 404, 409, 410, 412, 413, 415, 429, 503)
"""What any route may answer instead, for the OpenAPI document."""

logger = logging.getLogger(__name__)


def problem(status: int, slug: str, detail: str, facts: dict[str, Any]) -> dict[str, Any]:
    """A problem document (RFC 9457, section 3)."""
    return {
        "type": f"/problems/{slug}",
        "title": _TITLES.get(status, "Request refused"),
        "status": status,
        "detail": detail,
        **facts,
    }


def problem_of(error: Exception) -> dict[str, Any]:
    """The problem an exception means to a client; an unforeseen one says nothing of itself."""
    match error:
        case Refusal():
            status = next(s for kind, s in STATUS.items() if isinstance(error, kind))
            return problem(status, error.slug, str(error), error.facts)
        case EventErased():  # the answer to an earlier request, or a race with an erasure
            detail = "what this answer held was erased"
            return problem(410, StateIsErased.slug, detail, {"position": error.position})
        case LogError():
            logger.error("the log is damaged", exc_info=error)
            return problem(503, "log-damaged", f"The log is damaged: {error}", {})
        case HTTPException():
            status = error.status_code
            errors = error.extra if isinstance(error.extra, list) else []
            fields = [_field(e) for e in errors if "key" in e]
            facts = {"field": fields[0]["field"], "errors": fields} if fields else {}
            detail = "; ".join(f"{f['field']}: {f['message']}" for f in fields) or error.detail
            slug = "invalid-input" if status == 400 else _slug(status)
            return problem(status, slug, detail, facts)
        case _:
            logger.error("unforeseen error", exc_info=error)
            return problem(500, "internal-error", "The server failed; its log says why.", {})


def _field(error: dict[str, Any]) -> dict[str, str]:
    if error["key"] == "data":  # Litestar's name for a body that is not there
        return {"field": "body", "message": "must not be empty, send a JSON object"}
    return {"field": error["key"], "message": error["message"]}


def _slug(status: int) -> str:
    return _TITLES.get(status, "request refused").lower().replace(" ", "-")


def respond(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The response for an exception."""
    document = problem_of(error)
    status = document["status"]
    headers = _HEADERS.get(status, {})
    if isinstance(error, HTTPException):  # 405 has Allow (RFC 9110, section 15.5.6)
        headers = headers | (error.headers or {})
    return Response(
        msgspec.json.encode(document), status_code=status, media_type=MEDIA_TYPE, headers=headers
    )


HANDLERS: Final[ExceptionHandlersMap] = {
    Refusal: respond,
    HTTPException: respond,
    Exception: respond,
}
