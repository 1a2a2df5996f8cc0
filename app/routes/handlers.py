"""The two kinds of handler our routes have: those that read, and those that take a body."""

from typing import Any

from litestar import delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from msgspec import Struct

from app.body import JsonBody
from app.problems import RESPONSES


def reading(path: str, *, answer: type[Struct] | None = None) -> get:
    """A handler for ``GET``; ``answer`` describes what its return type does not."""
    return get(path, responses=_responses(200, answer))


def _responses(status: int, answer: type[Struct] | None) -> dict[int, Any]:
    if answer is None:
        return dict(RESPONSES)
    description = (answer.__doc__ or "").splitlines()[0]
    spec = ResponseSpec(answer, generate_examples=False, description=description)
    return {**RESPONSES, status: spec}


def writing(
    path: str, body: type[Struct], *, status: int = 200, answer: type[Struct] | None = None
) -> post:
    """A handler for ``POST`` with a JSON body.

    ``answer`` describes what it answers where its return type does not.
    """
    dto = JsonBody[body]  # type: ignore[valid-type]
    responses = _responses(status, answer)
    return post(path, dto=dto, return_dto=None, status_code=status, responses=responses)


def deleting(path: str) -> delete:
    """A handler for ``DELETE`` that answers what it deleted."""
    return delete(path, status_code=200, responses=RESPONSES)
