"""Query parameters: a route takes those that it has, each of them once."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from litestar import Request
from litestar.constants import RESERVED_KWARGS
from litestar.handlers import HTTPRouteHandler

from app.decoding import MAX_PROBLEMS
from domain.errors import FieldProblem, InvalidInput


async def check_parameters(request: Request[Any, Any, Any]) -> None:
    """Hook before a route is asked: nothing that it would not look at goes by in silence.

    Raises:
        InvalidInput: names every parameter that the route does not have, or that is repeated.
    """
    handler = request.scope["route_handler"]
    assert isinstance(handler, HTTPRouteHandler)
    query = request.query_params
    given = {name: len(query.getall(name)) for name in query}  # in their order
    if given and handler.resolve_include_in_schema():
        names = _names(handler, request.path_params)
        if problems := tuple(islice(_problems(given, names), MAX_PROBLEMS)):
            raise InvalidInput(*problems)


def _names(handler: HTTPRouteHandler, path: dict[str, Any]) -> list[str]:
    """The query parameters of a route: those of its function, and of the router it is in."""
    others = {*RESERVED_KWARGS, *handler.resolve_dependencies(), *path}
    own = [name for name in handler.parsed_fn_signature.parameters if name not in others]
    return [*own, *handler.resolve_layered_parameters()]


def _problems(given: Mapping[str, int], names: Sequence[str]) -> Iterator[FieldProblem]:
    known = f"parameters are {', '.join(names)}" if names else "there are none"
    for name, times in given.items():
        if name not in names:
            yield FieldProblem(name, f"is not a parameter here; {known}")
        elif times > 1:
            yield FieldProblem(name, f"is given {times} times, must be given once")
