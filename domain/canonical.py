"""JSON with sorted keys: the form in which things are stored and hashed."""

from typing import Any, Final

import msgspec

_encoder: Final = msgspec.json.Encoder(order="sorted")


def as_json(value: Any) -> str:
    """Any value that JSON can hold, readable without this program; every key is a string."""
    try:
        encoded = _encoder.encode(value)
    except TypeError:  # keys that are numbers: they are sorted as strings
        encoded = _encoder.encode(msgspec.to_builtins(value, str_keys=True))
    return encoded.decode()
