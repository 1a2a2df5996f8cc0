"""Choosing the form of an answer before the work is done, and giving it that form after."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Final

from litestar import Request, Response
from msgspec import Struct

from app import pictures
from app.operations.analysis.analyze import Analyzed
from app.representations import files, nested
from app.representations.negotiation import NotAcceptable, Range, best, ranges
from app.streams import EventStream
from app.turns import Turns
from domain.analysis.extent import Extent
from domain.analysis.parameters import Question
from domain.analysis.result import Result, Tensor
from domain.errors import invalid

JSON: Final = "application/json"
SAFETENSORS: Final = "application/vnd.safetensors"
NPY: Final = "application/x-npy"

_WHOLE_BYTES: Final = 1 << 20
"""A body of more than this is sent as it is made."""

_PART_BYTES: Final = 1 << 18


class Wanted(Struct, frozen=True):
    """The form that a client wants the answer to a question in; ``tensor`` is the one to send.

    What is drawn, or large, has one of the ``places`` until it is sent.
    """

    question: Question
    accepted: tuple[Range, ...]
    tensor: str | None
    places: Turns

    def form(self, tensors: bool = True) -> str:
        """The media type to answer with, where there are tensors or none.

        Raises:
            NotAcceptable: names those that there are.
        """
        offered = [JSON, *([SAFETENSORS, NPY] if tensors else []), *pictures.offered(self.question)]
        found = best(self.accepted, offered)
        if found is None:
            lacking = pictures.lacking(self.question) and best(self.accepted, pictures.MEDIA_TYPES)
            raise NotAcceptable(offered, f"; {pictures.REMEDY}" if lacking else "")
        return found

    def check_extent(self, extent: Extent) -> None:
        """Refuse, before the work, more than the form wanted holds, or than can be sent now.

        Raises:
            ResultTooLarge: says how to ask for less.
            QueueFull: there is no place for it.
        """
        form = self.form()
        if form in pictures.MEDIA_TYPES or extent.numbers * 4 > _WHOLE_BYTES:
            self.places.check()
        if form == JSON:
            nested.check(extent)
        elif form in pictures.MEDIA_TYPES:
            pictures.check(self.question, extent)

    def check(self, result: Result) -> None:
        """Refuse what cannot be given in the form wanted.

        Raises:
            NotAcceptable, InvalidInput: it cannot; says what can.
        """
        if self.form(bool(result.tensors)) == NPY:
            self.chosen(result)

    def chosen(self, result: Result) -> Tensor:
        """The one tensor to send.

        Raises:
            InvalidInput: there is none of this name, or there are several to choose from.
        """
        named = {tensor.name: tensor for tensor in result.tensors}
        if self.tensor is None and len(named) == 1:
            return result.tensors[0]
        if self.tensor not in named:
            raise invalid("tensor", f"must be one of {', '.join(named)}: a .npy file holds one")
        return named[self.tensor]


def wanted(request: Request[Any, Any, Any], question: Question, places: Turns) -> Wanted:
    """The form that a request asks for.

    Raises:
        NotAcceptable: it cannot be had, whatever is found.
    """
    accept = ", ".join(request.headers.getall("accept", []))
    asked = Wanted(question, ranges(accept), request.query_params.get("tensor"), places)
    asked.form()
    return asked


async def represent(wanted: Wanted, found: Analyzed, headers: dict[str, str]) -> Response[Any]:
    """The answer to a question, in the form that the client asks for.

    It is encoded off the event loop; a large one is sent piece by piece.

    Raises:
        QueueFull: there is no place for it.
    """
    form = wanted.form(bool(found.result.tensors))
    headers = headers | {"Vary": "Accept"}
    size: int | None = None
    match form:
        case "application/x-npy":
            tensor = wanted.chosen(found.result)
            headers["X-Tensor"] = files.npy_note(tensor)
            size, parts = files.npy(tensor)
        case "application/vnd.safetensors":
            size, parts = await asyncio.to_thread(files.safetensors, found)
        case "application/json":
            parts = nested.parts(found)
        case _:
            async with wanted.places.turn(object()):
                drawn = await pictures.draw(found, form)
            return Response(drawn, media_type=form, headers=headers)
    parts = _joined(parts)
    begin = await asyncio.to_thread(_taken, parts, _WHOLE_BYTES)
    if len(begin) < _WHOLE_BYTES:
        return Response(begin, media_type=form, headers=headers)
    if size is not None:
        headers["Content-Length"] = str(size)
    chunks = _sent(begin, parts, wanted.places)
    await anext(chunks)
    return EventStream(chunks, media_type=form, headers=headers)


def _joined(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of ``_PART_BYTES`` or more, the last one excepted."""
    held = bytearray()
    for part in parts:
        held += part
        if len(held) >= _PART_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _taken(parts: Iterator[bytes], size: int) -> bytes:
    """The first parts, ``size`` bytes or more; all of them if that is less."""
    held = bytearray()
    while len(held) < size and (part := next(parts, None)) is not None:
        held += part
    return bytes(held)


async def _sent(begin: bytes, parts: Iterator[bytes], places: Turns) -> AsyncGenerator[bytes, None]:
    """Nothing, once there is a place; then all of it."""
    async with places.turn(object()):
        yield b""
        yield begin
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            yield part
