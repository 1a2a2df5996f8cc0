"""The kinds of handler our routes have: those that read, those that take a body, those that end."""

from dataclasses import dataclass
from typing import Any, Final

from litestar import delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Schema,
)
from msgspec import Struct

from app import sse
from app.body import JsonBody
from app.problems import RESPONSES

_TEXT: Final = Schema(type=OpenAPIType.STRING)
_SECONDS: Final = Schema(type=OpenAPIType.INTEGER)
_NOTHING_MORE: Final = ResponseSpec(
    None, description="Nothing more can come: a client does not come back"
)


def reading(path: str, *, answer: type[Struct] | None = None) -> get:
    """A handler for ``GET``; ``answer`` describes what its return type does not."""
    return get(path, responses=_responses({200: answer}))


def following(path: str, *, answer: type[Struct]) -> get:
    """A handler for ``GET`` that answers a page, or follows what comes as server-sent events."""
    responses = _responses({200: answer}) | {204: _NOTHING_MORE}
    return get(path, responses=responses, operation_class=_Following)


def writing(
    path: str,
    body: type[Struct],
    *,
    status: int = 200,
    answer: type[Struct] | None = None,
    later: type[Struct] | None = None,
) -> post:
    """A handler for ``POST`` with a JSON body.

    ``answer`` describes what it answers where its return type does not; ``later`` what it answers
    (202) where that takes longer than the client wants to wait.
    """
    return post(
        path,
        dto=JsonBody[body],  # type: ignore[valid-type]
        return_dto=None,
        status_code=status,
        responses=_responses({status: answer, 202: later}),
        operation_class=Operation if later is None else _Waiting,
    )


def deleting(path: str) -> delete:
    """A handler for ``DELETE`` that answers what it deleted."""
    return delete(path, status_code=200, responses=RESPONSES)


def _responses(answers: dict[int, type[Struct] | None]) -> dict[int, Any]:
    return dict(RESPONSES) | {
        status: ResponseSpec(
            answer,
            generate_examples=False,
            description=(answer.__doc__ or "").partition("\n")[0],
        )
        for status, answer in answers.items()
        if answer is not None
    }


def _header(name: str, description: str) -> Parameter:
    return Parameter(name, "header", schema=_TEXT, description=description)


def _answer(operation: Operation, status: str) -> OpenAPIResponse:
    answer = (operation.responses or {})[status]
    assert isinstance(answer, OpenAPIResponse)
    return answer


@dataclass
class _Following(Operation):
    """Describes a list of events that can be followed."""

    def __post_init__(self) -> None:
        page = _answer(self, "200")
        page.content = {**(page.content or {}), sse.MEDIA_TYPE: OpenAPIMediaType(schema=_TEXT)}
        last = _header("Last-Event-ID", "The last event that the client has of a feed it resumes.")
        self.parameters = [*(self.parameters or ()), last]


@dataclass
class _Waiting(Operation):
    """Describes what may take longer than the client waits."""

    def __post_init__(self) -> None:
        applied = OpenAPIHeader(schema=_TEXT, description="What of ``Prefer`` was applied.")
        place = OpenAPIHeader(schema=_TEXT, description="Where what is answered later will be.")
        wait = OpenAPIHeader(schema=_SECONDS, description="Seconds after which to ask there.")
        _answer(self, "200").headers = {"Preference-Applied": applied}
        _answer(self, "202").headers = {
            "Preference-Applied": applied,
            "Location": place,
            "Retry-After": wait,
        }
        prefer = _header("Prefer", "``wait=SECONDS``, or ``respond-async`` (RFC 7240).")
        self.parameters = [*(self.parameters or ()), prefer]
