"""JSON with sorted keys: the form in which things are stored and hashed."""

from typing import Any, Final

import msgspec

_encoder: Final = msgspec.json.Encoder(order="sorted")


def as_json(value: Any) -> str:
    """Any JSON value, readable without this program."""
    return _encoder.encode(value).decode()
