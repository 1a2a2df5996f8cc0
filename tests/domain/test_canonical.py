"""Stored and hashed JSON, and the digest of what is found: the same bytes for ever."""

import hashlib
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.analysis.result import Result, Tensor, digest
from domain.canonical import as_json, members
from tests.builders import created, fragment

SCALARS: Final = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
)


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    by_name = st.dictionaries(st.text(max_size=2), values, max_size=3)
    by_number = st.dictionaries(st.integers(-20, 200), values, max_size=3)
    return st.lists(values, max_size=3).map(tuple) | by_name | by_number


@given(st.recursive(SCALARS, nested, max_leaves=12))
def test_keys_are_sorted_as_strings_whether_they_are_or_are_numbers(value: Any) -> None:
    encoder = msgspec.json.Encoder(order="sorted")
    plain = msgspec.to_builtins(value, str_keys=True)
    assert as_json(value) == encoder.encode(plain).decode()


def test_keys_that_are_numbers_are_found_wherever_they_are() -> None:
    text = as_json([{"b": {10: 1, 9: 2, -1: 3}, "a": None}])
    assert text == '[{"a":null,"b":{"-1":3,"10":1,"9":2}}]'
    event = created(logit_bias={20: 1.0, 3: -1.0})
    partial = msgspec.structs.replace(fragment("ab"), partial={1: "c3"})
    event = msgspec.structs.replace(event, content=partial)
    assert '"logit_bias":{"20":1.0,"3":-1.0}' in as_json(event)
    assert '"partial":{"1":"c3"}' in as_json(event)


@pytest.mark.parametrize("value", [{None: 1}, {(1, 2): 1}, object(), "\ud800"])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, UnicodeEncodeError)):
        as_json(value)


class Told(msgspec.Struct, frozen=True):
    """Something told of a place."""

    place: int
    more: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


TOLD: Final = st.builds(Told, st.integers(0, 9), st.just(msgspec.UNSET) | st.just((1, 2)))
ROWS: Final = st.lists(TOLD, max_size=3).map(tuple)
FIELDS: Final = st.dictionaries(
    st.text(max_size=3),
    SCALARS | ROWS | st.lists(ROWS, max_size=3).map(tuple) | nested(SCALARS),
    max_size=4,
)


@given(FIELDS)
def test_members_piece_by_piece_are_those_of_the_whole_object(fields: dict[str, Any]) -> None:
    in_order = b"".join(members(dict(sorted(fields.items())), lambda one: as_json(one).encode()))
    assert "{" + in_order.decode() + "}" == as_json(fields)
    assert (
        b"".join(members({**fields, "left out": msgspec.UNSET}, msgspec.json.encode))
        == (msgspec.json.encode(fields)[1:-1])
    )


def test_no_piece_holds_more_than_one_struct() -> None:
    rows = tuple(tuple(Told(place, (row,)) for place in range(4)) for row in range(3))
    pieces = list(members({"a": 1, "rows": rows}, msgspec.json.encode))
    assert sum(b"place" in piece for piece in pieces) == 12
    assert all(piece.count(b"place") <= 1 for piece in pieces)


class Facts(msgspec.Struct, frozen=True):
    """Facts of some kind."""

    text: str
    scores: dict[int, float | None]
    top: tuple[int, ...] = ()


def test_a_digest_is_of_the_facts_and_of_the_names_shapes_and_bits_of_tensors() -> None:
    bits = bytes(range(24))
    tensor = Tensor(
        name="keys", shape=(2, 3), dtype="float32", data=bits, layers=(4,), start=1, end=3
    )
    facts = Facts(text="\N{BEAR FACE}", scores={10: 0.5, 9: None}, top=(3, 1))
    data = f'"data":"{hashlib.sha256(bits).hexdigest()}","dtype":"float32","layers":[4]'
    text = (
        '{"facts":{"scores":{"10":0.5,"9":null},"text":"\N{BEAR FACE}","top":[3,1]},'
        f'"tensors":[{{{data},"name":"keys","range":[1,3],"shape":[2,3]}}]}}'
    )
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert digest(Result(facts=facts, tensors=(tensor,))) == expected
    assert digest(Result(facts=facts, tensors=(tensor,), beside=facts)) == expected
    assert digest(Result(facts=facts)) != expected
