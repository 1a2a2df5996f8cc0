"""Request bodies to structs: strict, and every wrong field named."""

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from app.decoding import MAX_PROBLEMS, decode
from app.schemas import GenerateTokens
from domain.errors import InvalidInput

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


class Inner(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=1)] = 1
    name: str = ""


class Choice(Struct, frozen=True, kw_only=True):
    one: Literal["red", "green"] | None = None
    many: tuple[Literal[1, 2], ...] = ()


class Outer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    needed: int
    text: str | None = None
    items: tuple[int, ...] = ()
    inner: Inner = Inner()
    loose: dict[str, Any] = {}


GOOD: dict[str, Any] = {
    "needed": 1,
    "text": "a",
    "items": [1, 2],
    "inner": {"size": 2, "name": "x"},
    "loose": {"any": ["thing", None, 1.5]},
}
BAD: dict[str, tuple[Any, str]] = {
    "needed": ("1", "needed"),
    "text": (5, "text"),
    "items": ([1, "2"], "items[1]"),
    "inner": ([], "inner"),
    "loose": (5, "loose"),
    "unknown": (1, "unknown"),
    "other": (None, "other"),
}
BAD_INNER: dict[str, tuple[Any, str]] = {
    "size": (0, "inner.size"),
    "name": (1, "inner.name"),
    "unknown": (1, "inner.unknown"),
}


def _named(body: bytes, type_: type[Struct] = Outer) -> set[str]:
    with pytest.raises(InvalidInput) as refused:
        decode(body, type_)
    errors = refused.value.facts["errors"]
    assert refused.value.facts["field"] == errors[0].field
    assert all(f"{error.field}: {error.message}" in str(refused.value) for error in errors)
    assert all(error.message for error in errors)
    fields = [error.field for error in errors]
    assert len(fields) == len(set(fields))
    return set(fields)


def _fields(body: bytes) -> set[str] | None:
    """The fields that a body is refused for; null if it is not."""
    try:
        decode(body, Outer)
    except InvalidInput as refused:
        return {error.field for error in refused.facts["errors"]}
    return None


def test_a_right_body_becomes_its_struct() -> None:
    decoded = decode(msgspec.json.encode(GOOD), Outer)
    assert decoded == Outer(
        needed=1,
        text="a",
        items=(1, 2),
        inner=Inner(size=2, name="x"),
        loose=GOOD["loose"],
    )


def test_what_is_left_out_has_its_default() -> None:
    assert decode(b'{"needed": 1}', Outer) == Outer(needed=1)


@given(
    spoilt=st.sets(st.sampled_from(sorted(BAD))),
    spoilt_inner=st.sets(st.sampled_from(sorted(BAD_INNER))),
)
def test_exactly_the_wrong_fields_are_named(spoilt: set[str], spoilt_inner: set[str]) -> None:
    body = GOOD | {field: BAD[field][0] for field in spoilt}
    expected = {BAD[field][1] for field in spoilt}
    if "inner" not in spoilt:
        body["inner"] = GOOD["inner"] | {field: BAD_INNER[field][0] for field in spoilt_inner}
        expected |= {BAD_INNER[field][1] for field in spoilt_inner}
    if not expected:
        assert decode(msgspec.json.encode(body), Outer).needed == 1
        return
    assert _named(msgspec.json.encode(body)) == expected


@given(missing=st.sets(st.sampled_from(sorted(GOOD)), min_size=1))
def test_of_the_missing_fields_those_that_are_needed_are_named(missing: set[str]) -> None:
    body = msgspec.json.encode({k: v for k, v in GOOD.items() if k not in missing})
    if "needed" in missing:
        assert _named(body) == {"needed"}
    else:
        assert decode(body, Outer).needed == 1


@given(value=JSON)
def test_any_json_is_decoded_or_refused_by_fields(value: Any) -> None:
    named = _fields(msgspec.json.encode(value))
    assert named is None or named


@given(body=st.binary())
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    assert _fields(body) in (None, {"body"}, {"needed"})


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"needed": NaN}', b'{"needed": 1e999}', b'{"text": "\xff"}', b"[" * 100_000],
    ids=["empty", "cut off", "NaN", "1e999", "not UTF-8", "deep"],
)
def test_what_is_no_json_is_said_of_the_body(body: bytes) -> None:
    assert _named(body) == {"body"}


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "\\udc00\\ud800"])
def test_a_lone_surrogate_is_named_as_such(escape: str) -> None:
    with pytest.raises(InvalidInput, match="lone surrogate"):
        decode(f'{{"needed": 1, "text": "{escape}"}}'.encode(), Outer)


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"a"', b"true"])
def test_what_is_no_object_is_said_of_the_body(body: bytes) -> None:
    assert _named(body) == {"body"}


def test_where_one_of_a_few_values_is_wanted_they_are_named() -> None:
    with pytest.raises(InvalidInput) as refused:
        decode(b'{"one": "blue", "many": [1, 3]}', Choice)
    messages = {error.field: error.message for error in refused.value.facts["errors"]}
    assert messages == {
        "one": "invalid enum value 'blue', allowed are red, green",
        "many[1]": "invalid enum value 3, allowed are 1, 2",
    }


@pytest.mark.parametrize("value", ["1", 1.5, True, None])
def test_no_value_is_bent_into_an_integer(value: Any) -> None:
    assert _named(msgspec.json.encode({"needed": value})) == {"needed"}


def test_a_body_with_very_many_wrong_fields_gets_an_answer_of_bounded_size() -> None:
    body = json.dumps({f"unknown-{i}": i for i in range(10_000)}).encode()
    with pytest.raises(InvalidInput) as refused:
        decode(body, GenerateTokens)
    assert len(refused.value.facts["errors"]) == MAX_PROBLEMS
