"""The chain finds every change, and its encoding never changes silently."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.chain import COLUMNS, Head, Row, blobs_digest, follow, genesis, row_hash
from domain.events import Recorded
from domain.ids import Position, StateId, Version
from domain.log_errors import ChainBroken
from tests.builders import histories

GENESIS = genesis("a log")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
integers = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "position": integers,
    "state_id": texts,
    "version": st.none() | integers,
    "at_version": st.none() | integers,
    "type": texts,
    "schema": integers,
    "payload": texts,
    "fingerprint": st.none() | texts,
    "recorded_at": texts,
    "actor": texts,
    "request_id": texts,
    "previous_hash": st.binary(min_size=32, max_size=32),
    "hash": st.binary(min_size=32, max_size=32),
    "source": st.none() | texts,
}
rows_of_any_kind = st.builds(Row, **VALUES)


def rows(history: list[Recorded]) -> list[Row]:
    return [recorded.row for recorded in history]


def verify(rows: list[Row]) -> Head:
    head = GENESIS
    for row in rows:
        head = follow(head, row)
    return head


def test_every_column_has_values_to_try() -> None:
    assert tuple(VALUES) == COLUMNS


@given(histories())
def test_an_untouched_chain_leads_to_its_newest_row(history: list[Recorded]) -> None:
    newest = history[-1].row
    assert verify(rows(history)) == Head(newest.position, newest.hash)


@given(history=histories(), data=st.data())
def test_any_change_of_any_column_is_found(history: list[Recorded], data: st.DataObject) -> None:
    chain = rows(history)
    place = data.draw(st.integers(0, len(chain) - 1))
    column = data.draw(st.sampled_from(COLUMNS))
    old = getattr(chain[place], column)
    new = data.draw(VALUES[column].filter(lambda value: value != old))
    chain[place] = msgspec.structs.replace(chain[place], **{column: new})
    with pytest.raises(ChainBroken):
        verify(chain)


@given(history=histories().filter(lambda history: len(history) > 1), data=st.data())
def test_a_removed_row_is_found(history: list[Recorded], data: st.DataObject) -> None:
    chain = rows(history)
    del chain[data.draw(st.integers(0, len(chain) - 2))]
    with pytest.raises(ChainBroken):
        verify(chain)


@given(histories())
def test_a_removed_tail_is_only_found_against_a_remembered_head(history: list[Recorded]) -> None:
    chain = rows(history)
    remembered = verify(chain)
    assert verify(chain[:-1]) != remembered


@given(history=histories().filter(lambda history: len(history) > 1), data=st.data())
def test_swapped_rows_are_found(history: list[Recorded], data: st.DataObject) -> None:
    chain = rows(history)
    first = data.draw(st.integers(0, len(chain) - 2))
    second = data.draw(st.integers(first + 1, len(chain) - 1))
    chain[first], chain[second] = chain[second], chain[first]
    with pytest.raises(ChainBroken):
        verify(chain)


@given(history=histories(), data=st.data())
def test_a_repeated_row_is_found(history: list[Recorded], data: st.DataObject) -> None:
    chain = rows(history)
    place = data.draw(st.integers(0, len(chain) - 1))
    chain.insert(data.draw(st.integers(0, len(chain))), chain[place])
    with pytest.raises(ChainBroken):
        verify(chain)


@given(histories())
def test_rows_of_another_log_are_found(history: list[Recorded]) -> None:
    with pytest.raises(ChainBroken, match="position 1"):
        follow(genesis("another log"), history[0].row)


@given(one=rows_of_any_kind, other=rows_of_any_kind)
def test_different_rows_have_different_hashes(one: Row, other: Row) -> None:
    blank = {"hash": b""}
    differ = msgspec.structs.replace(one, **blank) != msgspec.structs.replace(other, **blank)
    assert (row_hash(one) != row_hash(other)) == differ


def test_text_cannot_move_from_one_column_to_the_next() -> None:
    one = msgspec.structs.replace(PLAIN, actor="ab", request_id="c")
    other = msgspec.structs.replace(PLAIN, actor="a", request_id="bc")
    assert row_hash(one) != row_hash(other)


def test_null_is_not_the_empty_text_and_not_zero() -> None:
    assert row_hash(PLAIN) != row_hash(msgspec.structs.replace(PLAIN, fingerprint=""))
    assert row_hash(PLAIN) != row_hash(msgspec.structs.replace(PLAIN, at_version=Version(0)))


def test_the_message_names_the_position_and_what_is_wrong() -> None:
    with pytest.raises(ChainBroken, match="position 1: a column was changed"):
        follow(Head(Position(0), PLAIN.previous_hash), PLAIN)
    with pytest.raises(ChainBroken, match="position 1: does not follow position 0"):
        follow(GENESIS, PLAIN)
    with pytest.raises(ChainBroken, match="position 1: comes after position 1"):
        follow(Head(Position(1), b""), PLAIN)


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_different_blobs_have_different_digests(one: list[bytes], other: list[bytes]) -> None:
    assert (blobs_digest(tuple(one)) == blobs_digest(tuple(other))) == (one == other)


PLAIN = Row(
    position=Position(1),
    state_id=StateId("state-00000000000000000000000000000001"),
    version=Version(1),
    at_version=None,
    type="state_deleted",
    schema=1,
    payload='{"type":"state_deleted"}',
    fingerprint=None,
    recorded_at="2026-01-02T03:04:05.000006Z",
    actor="tester",
    request_id="request-1",
    previous_hash=bytes(range(32)),
    hash=b"",
)
FULL = Row(
    position=Position(2**40),
    state_id=StateId("state-ffffffffffffffffffffffffffffffff"),
    version=None,
    at_version=Version(2**53),
    type="state_analyzed",
    schema=7,
    payload='{"text":"añ\U0001f600","type":"state_analyzed"}',
    fingerprint="ab" * 32,
    recorded_at="2026-12-31T23:59:59.999999Z",
    actor="",
    request_id="\0",
    previous_hash=bytes(32),
    hash=b"",
)
# Written down once and never again: a change here makes every existing log unverifiable.
HASHES = {
    "plain": (PLAIN, "ddd35103d60cec05de599556962c83fcebcaa0efee7b527ddcb0aaa916a286d1"),
    "full": (FULL, "c2d3b515d321f11d5677f19aada3600e7e516e5cfd6ac86e04381d3e37101972"),
}


@pytest.mark.parametrize("name", HASHES)
def test_the_hash_of_a_row_never_changes(name: str) -> None:
    row, expected = HASHES[name]
    assert row_hash(row).hex() == expected


def test_the_genesis_never_changes() -> None:
    assert GENESIS.position == 0
    assert GENESIS.hash.hex() == "4b2aedd1b3ed78bb265abe00c8ffe92b4d26723772ac09741f73f60c21e55427"


def test_the_digest_of_blobs_never_changes() -> None:
    assert (
        blobs_digest((b"", b"\x01\x02"))
        == "edb23fa02a5ec629f900cefbe280df8d734c46b0b5813624bdc66a14415f2050"
    )
    assert blobs_digest(()) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
