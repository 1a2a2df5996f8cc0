"""The kinds of handler our routes have: those that read, those that take a body, those that end."""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from litestar import delete, get, post
from litestar.handlers import HTTPRouteHandler
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

from app import problems, sse
from app.body import JsonBody
from app.pictures import MEDIA_TYPES as PICTURES
from app.problems import RESPONSES
from app.representations import NPY, SAFETENSORS
from app.schemas import StreamedToken

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
    streamed: bool = False,
) -> post:
    """A handler for ``POST`` with a JSON body.

    ``answer`` describes what it answers where its return type does not; ``later`` what it answers
    (202) where that takes longer than the client wants to wait. What is ``streamed`` is answered as
    server-sent events if the body says so.
    """
    operation = _Streaming if streamed else Operation if later is None else _Waiting
    return post(
        path,
        dto=JsonBody[body],  # type: ignore[valid-type]
        return_dto=None,
        status_code=status,
        responses=_responses({status: answer, 202: later}),
        operation_class=operation,
    )


def deleting(path: str) -> delete:
    """A handler for ``DELETE`` that answers what it deleted."""
    return delete(path, status_code=200, responses=RESPONSES)


def looking(
    path: str, body: type[Struct] | None = None, *, answer: Any, pictured: bool = False
) -> HTTPRouteHandler:
    """A handler for a question about the inside of a state: ``GET``, or ``POST`` with a body.

    ``answer`` describes it as JSON; it is given as tensors too, and where it is ``pictured`` drawn.
    """
    described = {
        **RESPONSES,
        **problems.described(406),
        200: ResponseSpec(answer, generate_examples=False, description="What was found"),
    }
    operation = _Pictured if pictured else _Looking
    if body is None:
        return get(path, responses=described, operation_class=operation)
    return post(
        path,
        dto=JsonBody[body],  # type: ignore[valid-type]
        return_dto=None,
        status_code=200,
        responses=described,
        operation_class=operation,
    )


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

    events: ClassVar[str] = (
        "``event: recorded`` for each event, as on a page, with its position as ``id``; then"
        " ``event: end`` if the state has ended, or ``event: error`` with the problem."
    )
    last: ClassVar[str] = "The last event that the client has of a feed it resumes."

    def __post_init__(self) -> None:
        found = _answer(self, "200")
        events = Schema(type=OpenAPIType.STRING, description=self.events)
        found.content = {**(found.content or {}), sse.MEDIA_TYPE: OpenAPIMediaType(schema=events)}
        self.parameters = [*(self.parameters or ()), _header("Last-Event-ID", self.last)]


@dataclass
class _Streaming(_Following):
    """Describes what can be answered token by token."""

    events: ClassVar[str] = (
        f"``event: token`` for each token ({', '.join(StreamedToken.__struct_fields__)}), with its"
        " number in the stream as ``id``; then ``event: done`` with the whole answer, or"
        " ``event: error`` with the problem."
    )
    last: ClassVar[str] = "The last ``id`` that the client has of a stream it resumes, or empty."


@dataclass
class _Looking(Operation):
    """Describes an answer that is given in the form that the client accepts."""

    media_types: ClassVar[tuple[str, ...]] = (SAFETENSORS, NPY)

    def __post_init__(self) -> None:
        found = _answer(self, "200")
        forms = {form: OpenAPIMediaType(schema=_binary(form)) for form in self.media_types}
        found.content = {**(found.content or {}), **forms}
        found.headers = {
            "ETag": OpenAPIHeader(schema=_TEXT, description="The version that was looked at."),
            "X-Tensor": OpenAPIHeader(schema=_TEXT, description="JSON: what a .npy file holds."),
        }


@dataclass
class _Pictured(_Looking):
    """Describes an answer that is drawn, too."""

    media_types: ClassVar[tuple[str, ...]] = (SAFETENSORS, NPY, *PICTURES)


def _binary(media_type: str) -> Schema:
    return Schema(type=OpenAPIType.STRING, content_media_type=media_type)


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
