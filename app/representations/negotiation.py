"""Which media type a client would rather have (RFC 9110, section 12.5.1)."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from domain.errors import Refusal

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_RANGE: Final = re.compile(rf"(?!\*/(?!\*$))({_TOKEN})/({_TOKEN})")
_WEIGHT: Final = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)


class NotAcceptable(Refusal):
    """The answer cannot be had in any form that the client accepts."""

    slug = "not-acceptable"

    def __init__(self, available: Sequence[str], hint: str = "") -> None:
        super().__init__(
            f"this can be had as {', '.join(available)}: name one of them in Accept{hint}",
            available=available,
        )


class Range(Struct, frozen=True):
    """A media range with its weight; ``*`` stands for anything."""

    kind: str
    subtype: str
    weight: float

    def precision(self, media_type: str) -> int | None:
        """How closely this range names a media type, 0 to 2; null if it does not."""
        kind, _, subtype = media_type.partition("/")
        if self.kind not in (kind, "*") or self.subtype not in (subtype, "*"):
            return None
        return (self.kind != "*") + (self.subtype != "*")


def ranges(accept: str) -> tuple[Range, ...]:
    """The media ranges of an ``Accept`` header; an empty one accepts anything.

    Parameters other than the weight are not looked at, and what is no media range is left out.
    """
    return tuple(_ranges(accept)) if accept.strip() else (Range("*", "*", 1.0),)


def best(accepted: Sequence[Range], offered: Sequence[str]) -> str | None:
    """The media type of those offered that a client wants most; null if it accepts none of them.

    Of several with the highest weight that which it names first, then that which is offered first.
    """
    wishes = [(media_type, _wish(accepted, media_type)) for media_type in offered]
    (weight, _), media_type = max(
        ((wish, media_type) for media_type, wish in wishes),
        key=lambda one: one[0],
        default=((0.0, 0), None),
    )
    return media_type if weight else None


def _ranges(accept: str) -> Iterator[Range]:
    for element in accept.split(","):
        name, *parameters = (part.strip() for part in element.split(";"))
        match = _RANGE.fullmatch(name.lower())
        weights = [text[2:] for text in parameters if text[:2].lower() == "q="]
        if match and all(_WEIGHT.fullmatch(weight) for weight in weights):
            yield Range(match[1], match[2], float(weights[0]) if weights else 1.0)


def _wish(accepted: Sequence[Range], media_type: str) -> tuple[float, int]:
    """The weight of a media type, and minus the place of the range that says so."""
    found = [
        (precision, one.weight, -place)
        for place, one in enumerate(accepted)
        if (precision := one.precision(media_type)) is not None
    ]
    _, weight, place = max(found, default=(0, 0.0, 0))
    return weight, place
