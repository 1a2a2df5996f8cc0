"""Roots and proofs are those of RFC 9162, and nothing else passes for one."""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.ids import Position
from domain.merkle import (
    TILE,
    Checkpoint,
    Consistency,
    Inclusion,
    Tree,
    check_consistency,
    check_inclusion,
    continues,
    from_note,
    includes,
    leaf,
    node,
    origin,
    root,
    tile,
    tile_hash,
    to_note,
)

EMPTY = hashlib.sha256(b"").hexdigest()
unhurried = settings(max_examples=60, deadline=None)
LARGEST = 3 * TILE + 2
HASHES = [hashlib.sha256(f"row {number}".encode()).digest() for number in range(LARGEST)]

# The inputs, roots and proofs that the tests of Certificate Transparency have always used.
CT_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
CT_INCLUSIONS = {
    (0, 1): (),
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
    (1, 5): (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}
CT_CONSISTENCIES = {
    (1, 1): (),
    (1, 8): CT_INCLUSIONS[0, 8],
    (6, 8): (
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 5): (
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}


def tree(hashes: Sequence[bytes]) -> Tree:
    full = len(hashes) // TILE
    tiles = [tile_hash(hashes[number * TILE :][:TILE]) for number in range(full)]
    return Tree(tiles, hashes[full * TILE :])


def tile_of(hashes: Sequence[bytes], index: int) -> Sequence[bytes]:
    """The rows of the tile that holds one of them."""
    return hashes[index // TILE * TILE :][:TILE]


def inclusion(hashes: Sequence[bytes], index: int) -> Inclusion:
    return one_of(tree(hashes), index, tile_of(hashes, index))


def one_of(tree: Tree, index: int, rows: Sequence[bytes]) -> Inclusion:
    (proof,) = tree.inclusions([(index, Position(index + 1))], rows)
    return proof


def consistency(hashes: Sequence[bytes], first: int) -> Consistency:
    return tree(hashes).consistency(first, tile_of(hashes, max(first - 1, 0)))


def split(count: int) -> int:
    """The largest power of two smaller than ``count``."""
    return 1 << (count - 1).bit_length() - 1


def mth(hashes: Sequence[bytes]) -> bytes:
    """MTH of section 2.1.1, word for word."""
    if len(hashes) <= 1:
        return leaf(hashes[0]) if hashes else hashlib.sha256().digest()
    k = split(len(hashes))
    return node(mth(hashes[:k]), mth(hashes[k:]))


def path(m: int, hashes: Sequence[bytes]) -> list[bytes]:
    """PATH of section 2.1.3.1, word for word."""
    if len(hashes) == 1:
        return []
    k = split(len(hashes))
    if m < k:
        return [*path(m, hashes[:k]), mth(hashes[k:])]
    return [*path(m - k, hashes[k:]), mth(hashes[:k])]


def subproof(m: int, hashes: Sequence[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of section 2.1.4.1, word for word."""
    if m == len(hashes):
        return [] if whole else [mth(hashes)]
    k = split(len(hashes))
    if m <= k:
        return [*subproof(m, hashes[:k], whole), mth(hashes[k:])]
    return [*subproof(m - k, hashes[k:], False), mth(hashes[:k])]


def hexadecimal(path: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(one.hex() for one in path)


def flipped(digest: str) -> str:
    return f"{int(digest, 16) ^ 1:064x}"


sizes = st.integers(0, LARGEST) | st.sampled_from(
    [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 3 * TILE - 1, 3 * TILE, 3 * TILE + 1]
)


@st.composite
def leaves(draw: st.DrawFn) -> tuple[int, int]:
    """The index of a leaf, and the size of a tree that holds it."""
    size = draw(sizes.filter(bool))
    return draw(st.integers(0, size - 1)), size


@st.composite
def growths(draw: st.DrawFn) -> tuple[int, int]:
    """Sizes of a tree and of one that it grew to."""
    second = draw(sizes)
    return draw(st.integers(0, second)), second


def test_roots_are_those_of_certificate_transparency() -> None:
    assert root([]).hex() == EMPTY
    assert [root(CT_LEAVES[: size + 1]).hex() for size in range(8)] == CT_ROOTS


@pytest.mark.parametrize(("index", "size"), CT_INCLUSIONS)
def test_inclusion_proofs_are_those_of_certificate_transparency(index: int, size: int) -> None:
    proof = inclusion(CT_LEAVES[:size], index)
    assert proof.path == CT_INCLUSIONS[index, size]
    assert check_inclusion(CT_LEAVES[index], proof, CT_ROOTS[size - 1])


@pytest.mark.parametrize(("first", "second"), CT_CONSISTENCIES)
def test_consistency_proofs_are_those_of_certificate_transparency(first: int, second: int) -> None:
    proof = consistency(CT_LEAVES[:second], first)
    assert proof.path == CT_CONSISTENCIES[first, second]
    assert check_consistency(proof, CT_ROOTS[first - 1], CT_ROOTS[second - 1])


@unhurried
@given(sizes)
def test_a_root_from_tiles_is_that_of_the_rows(size: int) -> None:
    rows = HASHES[:size]
    assert tree(rows).size == size
    assert tree(rows).root == root(rows) == mth(rows)


@unhurried
@given(leaves())
def test_every_row_is_proven_by_the_path_of_the_definition(chosen: tuple[int, int]) -> None:
    index, size = chosen
    rows = HASHES[:size]
    proof = inclusion(rows, index)
    assert proof.path == hexadecimal(path(index, rows))
    assert check_inclusion(rows[index], proof, root(rows).hex())


@unhurried
@given(growths())
def test_every_growth_is_proven_by_the_path_of_the_definition(growth: tuple[int, int]) -> None:
    first, second = growth
    rows = HASHES[:second]
    proof = consistency(rows, first)
    assert proof.path == hexadecimal(subproof(first, rows, True) if first else [])
    assert check_consistency(proof, root(rows[:first]).hex(), root(rows).hex())


def test_small_trees_prove_all_there_is_to_prove() -> None:
    for size in range(1, 34):
        rows = HASHES[:size]
        grown = tree(rows)
        for index in range(size):
            proof = one_of(grown, index, rows)
            assert check_inclusion(rows[index], proof, grown.root.hex())
        for first in range(size + 1):
            continued = grown.consistency(first, rows)
            assert check_consistency(continued, root(rows[:first]).hex(), grown.root.hex())


def test_a_tile_may_be_longer_than_the_tree_that_ends_in_it() -> None:
    size = TILE + 5
    proof = one_of(tree(HASHES[:size]), TILE + 2, HASHES[TILE : 2 * TILE])
    assert proof == inclusion(HASHES[:size], TILE + 2)


def test_rows_that_do_not_hold_the_event_are_refused() -> None:
    grown = tree(HASHES[: TILE + 5])
    for index, rows in ((TILE + 2, HASHES[TILE:][:4]), (TILE + 5, HASHES[TILE:][:5])):
        with pytest.raises(ValueError, match="are not the tile of"):
            one_of(grown, index, rows)
    with pytest.raises(ValueError, match="are not the tile of"):
        grown.inclusions([(3, Position(1)), (TILE, Position(2))], HASHES[:TILE])


def test_the_proofs_of_a_tile_are_made_at_once() -> None:
    events = [(index, Position(index + 1)) for index in range(TILE, 2 * TILE)]
    proofs = tree(HASHES).inclusions(events, HASHES[TILE:][:TILE])
    assert proofs == [inclusion(HASHES, index) for index, _ in events]


@pytest.mark.parametrize("count", [0, 1, TILE - 1, TILE + 1])
def test_a_tile_is_full_or_none(count: int) -> None:
    with pytest.raises(ValueError, match="a tile is 256 rows"):
        tile_hash(HASHES[:count])
    with pytest.raises(ValueError, match="are another tile"):
        Tree([], HASHES[:TILE])
    assert tile(7, list(enumerate(HASHES[:TILE]))).last_position == TILE - 1  # type: ignore[arg-type]


def forged_paths(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One hash flipped, left out, doubled, or not a hash; one too many at either end."""
    forged = [(*path, EMPTY), (EMPTY, *path), *([path[::-1]] if path[::-1] != path else [])]
    for at, one in enumerate(path):
        before, after = path[:at], path[at + 1 :]
        others = (flipped(one),), (), (one, one), (one[:-2],), ("",), (f" {one[1:]}",)
        forged += [(*before, *other, *after) for other in others]
    return forged


@unhurried
@given(leaves())
def test_a_forged_inclusion_is_refused(chosen: tuple[int, int]) -> None:
    index, size = chosen
    rows, row = HASHES[:size], HASHES[index]
    proof, digest = inclusion(rows, index), root(rows).hex()

    def passes(row: bytes = row, digest: str = digest, **changes: Any) -> bool:
        return check_inclusion(row, msgspec.structs.replace(proof, **changes), digest)

    assert passes()
    assert not any(passes(path=forged) for forged in forged_paths(proof.path))
    assert not any(passes(index=other) for other in (index - 1, index + 1, size, -1))
    assert not passes(size=0)
    assert not passes(digest=flipped(digest))
    assert not passes(digest=digest.upper())
    assert not passes(row=HASHES[index - 1])
    assert not passes(row=leaf(row))


@unhurried
@given(growths())
def test_a_forged_consistency_is_refused(growth: tuple[int, int]) -> None:
    first, second = growth
    rows = HASHES[:second]
    proof = consistency(rows, first)
    roots = root(rows[:first]).hex(), root(rows).hex()

    def passes(first_root: str = roots[0], second_root: str = roots[1], **changes: Any) -> bool:
        return check_consistency(msgspec.structs.replace(proof, **changes), first_root, second_root)

    assert passes()
    assert not any(passes(path=forged) for forged in forged_paths(proof.path))
    assert not passes(first=-1)
    assert not passes(first=second + 1)
    assert not passes(first_root=flipped(roots[0]))
    if first:
        assert not passes(second_root=flipped(roots[1]))
        assert not passes(first=0)
    if 0 < first < second:
        assert not passes(first=second)
        assert not passes(first_root=roots[1], second_root=roots[0])


def checkpoint(size: int, **changes: Any) -> Checkpoint:
    fields: dict[str, Any] = {
        "log_id": "a-log",
        "size": size,
        "position": size + 3,
        "hash": HASHES[size - 1].hex(),
        "root": root(HASHES[:size]).hex(),
    }
    return Checkpoint(**(fields | changes))


@unhurried
@given(leaves(), st.sampled_from([-1, 1, 256]))
def test_a_proof_for_another_size_than_the_checkpoint_says_is_refused(
    chosen: tuple[int, int], off: int
) -> None:
    index, size = chosen
    proof = inclusion(HASHES[:size], index)
    assert includes(checkpoint(size), HASHES[index], proof)
    other = msgspec.structs.replace(proof, size=size + off)
    assert not includes(checkpoint(size), HASHES[index], other)


@unhurried
@given(growths())
def test_checkpoints_continue_each_other_in_one_log_and_at_their_sizes(
    growth: tuple[int, int],
) -> None:
    first, second = (checkpoint(size) for size in growth)
    proof = consistency(HASHES[: second.size], first.size)
    assert continues(first, second, proof)
    assert not continues(msgspec.structs.replace(first, log_id="another"), second, proof)
    for end in ("first", "second"):
        for off in (-1, 1):
            moved = {end: getattr(proof, end) + off}
            assert not continues(first, second, msgspec.structs.replace(proof, **moved))


def test_a_log_that_was_written_anew_does_not_continue_what_it_was() -> None:
    anew = [HASHES[0], HASHES[0], *HASHES[2:300]]
    for first in (2, 3, 200, 256, 257):
        proof = consistency(anew, first)
        later = checkpoint(300, root=root(anew).hex())
        assert not continues(checkpoint(first), later, proof)
        assert continues(checkpoint(first, root=root(anew[:first]).hex()), later, proof)


NOTE = """cacher/a-log
2
SRZBD4IvOO34vIMzBLWbRqdzyNUE4Sr0xIF6ddjgdQA=
5:9a0a47ae0c9d3a0c6c05ec7fb1c87d2a4f1ff3d0ffe2a3c3d3ee2f9b0fb5a6f3

"""


def test_a_note_is_origin_size_root_and_the_head_of_the_chain() -> None:
    found = Checkpoint(
        log_id="a-log",
        size=2,
        position=Position(5),
        hash="9a0a47ae0c9d3a0c6c05ec7fb1c87d2a4f1ff3d0ffe2a3c3d3ee2f9b0fb5a6f3",
        root="4916410f822f38edf8bc833304b59b46a773c8d504e12af4c4817a75d8e07500",
    )
    assert from_note(NOTE) == found
    assert to_note(found) == NOTE
    assert NOTE.startswith(origin("a-log") + "\n")


@unhurried
@given(sizes)
def test_a_checkpoint_is_read_from_its_note(size: int) -> None:
    assert from_note(to_note(checkpoint(size))) == checkpoint(size)


@pytest.mark.parametrize(
    "text", [NOTE.rstrip("\n"), NOTE[:-1], NOTE + "\u2014 somebody AAAABBBB\n"]
)
def test_a_note_may_have_signatures_or_have_lost_its_last_newlines(text: str) -> None:
    assert from_note(text) == from_note(NOTE)


def test_extension_lines_that_are_not_known_are_let_pass() -> None:
    assert from_note(NOTE[:-1] + "tomorrow's extension\n\n") == from_note(NOTE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cacher/", ""),
        ("a-log", ""),
        ("a-log", "a log"),
        ("\n2\n", "\n02\n"),
        ("\n2\n", "\n-2\n"),
        ("\n2\n", "\n\n"),
        ("\n2\n", "\n" + "9" * 5000 + "\n"),
        ("SRZB", "SRZ"),
        ("SRZB", "SRZ?"),
        ("\n5:", "\n"),
        ("\n5:", "\nx:"),
        (":9a", ":9A"),
        (":9a", ":"),
        ("\n", "\r\n"),
        (NOTE, ""),
        (NOTE, "5:" + "0" * 64),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_one_looks_like(old: str, new: str) -> None:
    assert old in NOTE
    with pytest.raises(ValueError, match="must have the lines cacher/LOG_ID, number of events"):
        from_note(NOTE.replace(old, new))
