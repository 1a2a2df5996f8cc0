"""The Merkle tree over a log (RFC 9162, section 2.1), and proofs that need no more than its root.

The leaves are the hashes of the events, in order: ``leaf = SHA-256(0x00 || hash)``,
``node = SHA-256(0x01 || left || right)``. A root names all events before it; that an event is among
them, or that a later root continues an earlier one, is proven by a number of hashes that grows with
the logarithm of their number.
"""

from typing import Final

from msgspec import Struct

from domain.ids import Position

TILE: Final = 256
"""Events whose root is kept, so that no proof has to read more than two tiles' events."""


class Tile(Struct, frozen=True):
    """The root over ``TILE`` events in a row, of which ``last_position`` is the last."""

    number: int
    last_position: Position
    hash: bytes


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A log as it stood: ``size`` events, of which the newest has ``position`` and ``hash``.

    ``root`` is that of the tree over all of them; hashes are hexadecimal.
    """

    log_id: str
    size: int
    position: Position
    hash: str
    root: str


class Inclusion(Struct, frozen=True, kw_only=True):
    """That the event at ``position`` is number ``index`` (from 0) of a tree of ``size`` events.

    ``path`` are the siblings on the way up, hexadecimal (RFC 9162, 2.1.3).
    """

    position: Position
    index: int
    size: int
    path: tuple[str, ...]


class Consistency(Struct, frozen=True, kw_only=True):
    """That a tree of ``second`` events begins with all of the tree of ``first`` (2.1.4)."""

    first: int
    second: int
    path: tuple[str, ...]
