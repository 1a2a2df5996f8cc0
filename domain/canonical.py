"""JSON with sorted keys: the form in which things are stored and hashed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct

_encoder: Final = msgspec.json.Encoder(order="sorted")


def as_json(value: Any) -> str:
    """Any value that JSON can hold, readable without this program; every key is a string."""
    try:
        encoded = _encoder.encode(value)
    except TypeError:  # keys that are numbers: they are sorted as strings
        encoded = _encoder.encode(msgspec.to_builtins(value, str_keys=True))
    return encoded.decode()


def members(fields: Mapping[str, Any], encode: Callable[[Any], bytes]) -> Iterator[bytes]:
    """The JSON of an object without its braces, piece by piece; what is ``UNSET`` is left out.

    Lists of structs are encoded one by one: no other thread runs while msgspec encodes.
    """
    begin = b""
    for name, value in fields.items():
        if value is not UNSET:
            yield begin + encode(name) + b":"
            yield from _pieces(value, encode)
            begin = b","


def _pieces(value: Any, encode: Callable[[Any], bytes]) -> Iterator[bytes]:
    if not (isinstance(value, tuple) and value and isinstance(value[0], Struct | tuple)):
        yield encode(value)
        return
    begin = b"["
    for element in value:
        yield begin
        yield from _pieces(element, encode)
        begin = b","
    yield b"]"
