"""What may be asked for: positions, layers and heads that there are, and not too much at once."""

from collections.abc import Iterable
from typing import Final

from domain.errors import ResultTooLarge, invalid

CAPTURED: Final = 4
"""What is captured of a text to make an answer from may take so many times what that may."""
MAX_ALTERNATIVES: Final = 131_072
"""Likeliest tokens, of all places together, that one answer tells."""


def positions(start: int, end: int | None, held: int, prefix: str = "") -> range:
    """The positions from ``start`` up to ``end`` of a text of ``held`` tokens.

    ``prefix`` is where in the request the two are, such as ``"add[0]."``.

    Raises:
        InvalidInput: there are none such; names the field and what is allowed.
    """
    check_position(f"{prefix}start", start, held)
    if end is not None and not start < end <= held:
        allowed = f"must be {start + 1} to {held}: the state holds {held} tokens"
        raise invalid(f"{prefix}end", allowed)
    return range(start, held if end is None else end)


def check_position(field: str, position: int, held: int) -> None:
    """Refuse a position that a text of ``held`` tokens does not have.

    Raises:
        InvalidInput: names the field and what is allowed.
    """
    if not 0 <= position < held:
        raise invalid(field, f"must be 0 to {held - 1}: the state holds {held} tokens")


def check_index(field: str, index: int, count: int, *, of: str) -> None:
    """Refuse an index that is not below ``count``; ``of`` says of what there are so many.

    Raises:
        InvalidInput: names the field and what is allowed.
    """
    if not 0 <= index < count:
        raise invalid(field, f"must be 0 to {count - 1}: the model has {count} {of}")


def check_indices(field: str, indices: Iterable[int], count: int, *, of: str) -> None:
    """Refuse indices that are not below ``count``, or named twice.

    Raises:
        InvalidInput: names the field, with the place in the list, and what is allowed.
    """
    known: set[int] = set()
    for place, index in enumerate(indices):
        check_index(f"{field}[{place}]", index, count, of=of)
        if index in known:
            raise invalid(f"{field}[{place}]", f"names {index} twice")
        known.add(index)


def check_size(size: int, limit: int, remedy: str) -> None:
    """Refuse an answer of more than ``limit`` bytes.

    Raises:
        ResultTooLarge: it is larger; ``remedy`` says how to ask for less.
    """
    if size > limit:
        raise ResultTooLarge(size, limit, remedy)


def check_alternatives(count: int, remedy: str) -> None:
    """Refuse to tell ``count`` likeliest tokens.

    Raises:
        ResultTooLarge: they are too many; ``remedy`` says how to ask for less.
    """
    if count > MAX_ALTERNATIVES:
        raise ResultTooLarge(count, MAX_ALTERNATIVES, remedy, unit="likeliest tokens")


def check_captured(size: int, limit: int, remedy: str) -> None:
    """Refuse to capture ``size`` bytes of a text for an answer of at most ``limit`` bytes.

    Raises:
        ResultTooLarge: that is too much; ``remedy`` says how to ask for less.
    """
    check_size(size, CAPTURED * limit, f"What an answer is made from counts too. {remedy}")
