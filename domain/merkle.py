"""The Merkle tree over a log (RFC 9162, section 2.1), and proofs that need no more than its root.

The leaves are the hashes of the events, in order: ``leaf = SHA-256(0x00 || hash)``,
``node = SHA-256(0x01 || left || right)``. A root names all events before it; that an event is among
them, or that a later root continues an earlier one, is proven by a number of hashes that grows with
the logarithm of their number.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from domain.ids import Position
from domain.note import text_of

TILE: Final = 256
"""Events whose root is kept, so that no proof has to read more than two tiles' events."""

_TILE_LEVELS: Final = TILE.bit_length() - 1
"""Levels of the tree that lie inside a tile."""

_ORIGIN: Final = "cacher/"

_CHECKPOINT: Final = re.compile(
    _ORIGIN + r"(?P<log_id>[^\s+]+)\n"
    r"(?P<size>0|[1-9][0-9]{0,17})\n"
    r"(?P<root>[A-Za-z0-9+/]{43}=)\n"
    r"(?P<position>0|[1-9][0-9]{0,17}):(?P<hash>[0-9a-f]{64})\n"
    r"(?:[^\n]+\n)*"
)


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


def leaf(row_hash: bytes) -> bytes:
    """The leaf of an event, from the hash of its row."""
    return hashlib.sha256(b"\0" + row_hash).digest()


def node(left: bytes, right: bytes) -> bytes:
    """The node over two subtrees."""
    return hashlib.sha256(b"\1" + left + right).digest()


def root(hashes: Sequence[bytes]) -> bytes:
    """The root over rows, from their hashes; of none: SHA-256 of nothing."""
    return _top(_levels([leaf(one) for one in hashes]))


def tile_hash(hashes: Sequence[bytes]) -> bytes:
    """The root over the rows of a full tile.

    Raises:
        ValueError: they are not as many as a tile holds.
    """
    if len(hashes) != TILE:
        raise ValueError(f"a tile is {TILE} rows, not {len(hashes)}")
    return root(hashes)


def tile(number: int, rows: Sequence[tuple[Position, bytes]]) -> Tile:
    """The tile of these rows, each with its position.

    Raises:
        ValueError: they are not as many as a tile holds.
    """
    return Tile(number, rows[-1][0], tile_hash([digest for _, digest in rows]))


def _levels(nodes: list[bytes]) -> list[list[bytes]]:
    """All nodes above a row of nodes, level by level, themselves first.

    The last one of a level rises as it is where it has no sibling: that gives the tree of 2.1.1.
    """
    levels = [nodes]
    while len(nodes) > 1:
        pairs = zip(nodes[::2], nodes[1::2], strict=False)
        nodes = [*(node(left, right) for left, right in pairs), *nodes[len(nodes) & ~1 :]]
        levels.append(nodes)
    return levels


def _top(levels: list[list[bytes]]) -> bytes:
    return levels[-1][0] if levels[-1] else hashlib.sha256(b"").digest()


def _siblings(levels: list[list[bytes]], index: int) -> Iterator[bytes]:
    """The other child of each node on the way from a node of the first level to the top."""
    for nodes in levels:
        if index ^ 1 < len(nodes):
            yield nodes[index ^ 1]
        index >>= 1


class Tree:
    """The tree over a log, from the roots over its full ``tiles`` and the hashes of what follows.

    A proof needs the hashes of the rows of one more tile, full or not: those of the event it is
    about. Everything above tiles is computed once, and serves any number of proofs.
    """

    def __init__(self, tiles: Sequence[bytes], rest: Sequence[bytes]) -> None:
        if len(rest) >= TILE:
            raise ValueError(f"{len(rest)} rows after the last full tile are another tile")
        self.size = len(tiles) * TILE + len(rest)
        self._levels = _levels([*tiles, root(rest)] if rest else list(tiles))
        self.root = _top(self._levels)

    def inclusions(
        self, events: Sequence[tuple[int, Position]], rows: Sequence[bytes]
    ) -> list[Inclusion]:
        """The proofs of events of one tile, each given by its index and position (2.1.3.1).

        ``rows`` are the hashes of that tile.
        """
        inside = self._inside(rows, *(index for index, _ in events))
        return [
            Inclusion(
                position=position,
                index=index,
                size=self.size,
                path=_hexadecimal(self._path(inside, index, 0)),
            )
            for index, position in events
        ]

    def consistency(self, first: int, rows: Sequence[bytes]) -> Consistency:
        """The proof that the first ``first`` events are as they were (2.1.4.1).

        ``rows`` are the hashes of the tile that holds the last of them; none where that is 0.
        """
        path: list[bytes] = []
        if 0 < first < self.size:
            inside = self._inside(rows, first - 1)
            # Up from the last of them, as long as what is below holds no event after it.
            height = (first & -first).bit_length() - 1
            path = self._path(inside, first - 1, height)
            if first != 1 << height:
                path.insert(0, self._node(inside, first - 1, height))
        return Consistency(first=first, second=self.size, path=_hexadecimal(path))

    def _path(self, inside: list[list[bytes]], index: int, height: int) -> list[bytes]:
        """The siblings from the node at ``height`` above a leaf to the top."""
        above = max(height - _TILE_LEVELS, 0)
        return [
            *_siblings(inside[height:], index % TILE >> height),
            *_siblings(self._levels[above:], index // TILE >> above),
        ]

    def _node(self, inside: list[list[bytes]], index: int, height: int) -> bytes:
        """The node at ``height`` above a leaf."""
        if height < _TILE_LEVELS:
            return inside[height][index % TILE >> height]
        return self._levels[height - _TILE_LEVELS][index >> height]

    def _inside(self, rows: Sequence[bytes], *indices: int) -> list[list[bytes]]:
        """The levels inside the tile that holds these leaves."""
        begin = indices[0] // TILE * TILE
        held = min(TILE, self.size - begin)
        if not (begin <= min(indices) and max(indices) - begin < held <= len(rows)):
            raise ValueError(f"{len(rows)} rows from {begin} on are not the tile of {indices}")
        return _levels([leaf(one) for one in rows[:held]])


def _hexadecimal(path: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(one.hex() for one in path)


def check_inclusion(row_hash: bytes, proof: Inclusion, root: str) -> bool:
    """Whether a row's hash is where ``proof`` says in the tree of a root (RFC 9162, 2.1.3.2)."""
    path, expected = _digests(proof.path), _digests((root,))
    if path is None or expected is None or not 0 <= proof.index < proof.size:
        return False
    fn, sn, r = proof.index, proof.size - 1, leaf(row_hash)
    for sibling in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = node(sibling, r)
            fn, sn = _past_left_edge(fn, sn)
        else:
            r = node(r, sibling)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and [r] == expected


def check_consistency(proof: Consistency, first_root: str, second_root: str) -> bool:
    """Whether the tree of the second root begins with that of the first (RFC 9162, 2.1.4.2).

    Every tree begins with that of no events, and with itself; the path is empty then.
    """
    path, roots = _digests(proof.path), _digests((first_root, second_root))
    if path is None or roots is None or not 0 <= proof.first <= proof.second:
        return False
    if proof.first == 0:
        return not path and roots[0] == _top([[]]) and (proof.second > 0 or roots[1] == roots[0])
    if proof.first == proof.second:
        return not path and roots[0] == roots[1]
    if proof.first & (proof.first - 1) == 0:
        path.insert(0, roots[0])
    return bool(path) and _continues(proof.first, proof.second, path) == roots


def _continues(first: int, second: int, path: list[bytes]) -> list[bytes] | None:
    """The roots of both trees, from a path that begins with the last subtree they share."""
    fn, sn = first - 1, second - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    fr = sr = path[0]
    for sibling in path[1:]:
        if sn == 0:
            return None
        if fn & 1 or fn == sn:
            fr, sr = node(sibling, fr), node(sibling, sr)
            fn, sn = _past_left_edge(fn, sn)
        else:
            sr = node(sr, sibling)
        fn, sn = fn >> 1, sn >> 1
    return [fr, sr] if sn == 0 else None


def _past_left_edge(fn: int, sn: int) -> tuple[int, int]:
    """Up past the levels where a node has no sibling on its right and rises as it is."""
    while fn and not fn & 1:
        fn, sn = fn >> 1, sn >> 1
    return fn, sn


_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def _digests(texts: Sequence[str]) -> list[bytes] | None:
    """Hashes from hexadecimal, or null where one is none."""
    if not all(_DIGEST.fullmatch(text) for text in texts):
        return None
    return [bytes.fromhex(text) for text in texts]


def includes(checkpoint: Checkpoint, row_hash: bytes, proof: Inclusion) -> bool:
    """Whether a row, by its hash, is among the events of a checkpoint, where ``proof`` says.

    The position that ``proof`` names is not proven by it, but by the row: its hash covers it.
    """
    return proof.size == checkpoint.size and check_inclusion(row_hash, proof, checkpoint.root)


def continues(first: Checkpoint, second: Checkpoint, proof: Consistency) -> bool:
    """Whether a checkpoint is of the same log as an earlier one, with all that was in it."""
    return (
        first.log_id == second.log_id
        and (proof.first, proof.second) == (first.size, second.size)
        and check_consistency(proof, first.root, second.root)
    )


def origin(log_id: str) -> str:
    """The first line of a log's notes, and the name of the key that signs them."""
    return _ORIGIN + log_id


def to_note(checkpoint: Checkpoint) -> str:
    """A checkpoint as a note that has no signatures yet (C2SP tlog-checkpoint).

    Origin, size, root in base64; then, as an extension line, the newest position and its hash.
    """
    root = base64.b64encode(bytes.fromhex(checkpoint.root)).decode()
    return (
        f"{origin(checkpoint.log_id)}\n{checkpoint.size}\n{root}\n"
        f"{checkpoint.position}:{checkpoint.hash}\n\n"
    )


def from_note(text: str) -> Checkpoint:
    """The checkpoint in a note; its signatures are not looked at.

    Raises:
        ValueError: it holds none; says what one looks like.
    """
    match = _CHECKPOINT.fullmatch(text_of(text))
    if match is None:
        raise ValueError(
            f"this is no checkpoint: it must have the lines {_ORIGIN}LOG_ID, number of events,"
            " root in base64, position:hash, as GET /v1/audit/head gives them"
        )
    return Checkpoint(
        log_id=match["log_id"],
        size=int(match["size"]),
        position=Position(int(match["position"])),
        hash=match["hash"],
        root=base64.b64decode(match["root"]).hex(),
    )
