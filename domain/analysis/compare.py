"""Where two states differ: what each says comes next, as far as both go."""

from typing import Final

from msgspec import Struct

from domain.analysis.parameters import CompareParameters
from domain.diff import CommonPrefix, Diff, NextToken, Side, places
from domain.errors import invalid

PLACE_BYTES: Final = 512
"""About what is held for a position while the answer is made."""


class ComparedToken(NextToken, frozen=True, kw_only=True):
    """The distributions of the token at a position; ``changed``: their likeliest tokens differ."""

    changed: bool


class CompareFacts(Struct, frozen=True, kw_only=True):
    """What two states say of the tokens from ``start`` up to, not with, ``end``.

    Given the same tokens one model says the same, so it begins after the first token that is not
    common to both. It ends after the shorter text: both say what they expect there. ``changed`` is
    the number of positions at which another token is the likeliest.
    """

    a: Side
    b: Side
    same_model: bool
    common_prefix: CommonPrefix
    start: int
    end: int
    positions: tuple[ComparedToken, ...]
    changed: int


def asked_places(found: Diff, parameters: CompareParameters, context: int) -> range:
    """The positions asked for, of those at which two states can be told apart.

    Nothing comes after a full ``context``.

    Raises:
        InvalidInput: the positions are beyond those of the shorter state; says what there are.
    """
    every = places(found)
    every = range(every.start, max(every.start, min(every.stop, context)))
    last = every.stop - 1
    start, end = parameters.start, parameters.end
    if start > last:
        raise invalid("start", f"must be 0 to {last}: the shorter state ends there")
    if end is not None and not start < end <= every.stop:
        raise invalid("end", f"must be {start + 1} to {every.stop}: the shorter state ends there")
    first = max(start, every.start)
    return range(first, max(first, every.stop if end is None else end))
