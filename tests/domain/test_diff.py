"""How two states differ, as far as no model is needed to know."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from domain.config import StateConfig
from domain.content import Fragment
from domain.diff import config_changes, diff, places, prefix_length
from domain.ids import ModelId
from domain.state import Live, drop, join, take
from tests.builders import config, fragment, fragments, live


def _holding(content: Fragment, **fields: Any) -> Live:
    return replace(live(), content=content, **fields)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Live, Live]:
    """Two states that begin alike, as far as chance says."""
    shared = draw(fragments(min_size=0))
    first, second = (join(shared, draw(fragments(min_size=0))) for _ in range(2))
    return _holding(first), _holding(second)


@given(pairs())
def test_the_common_prefix_and_a_part_are_what_a_state_holds(states: tuple[Live, Live]) -> None:
    found = diff(*states)
    for state, part in zip(states, (found.a_part, found.b_part), strict=True):
        prefix = take(state.content, found.common_prefix.tokens)
        assert prefix.tokens + part.tokens == state.content.tokens
        assert prefix.text + part.text == state.content.text
    assert found.common_prefix.text == take(states[1].content, found.common_prefix.tokens).text


@given(pairs())
def test_nothing_more_is_common(states: tuple[Live, Live]) -> None:
    found = diff(*states)
    rests = [drop(state.content, found.common_prefix.tokens) for state in states]
    first, second = ([*zip(rest.tokens, rest.pieces(), strict=True)][:1] for rest in rests)
    assert first != second or not first


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_longest_common_prefix_is_found(first: list[int], second: list[int]) -> None:
    length = prefix_length(first, second)
    assert first[:length] == second[:length]
    assert first[: length + 1] != second[: length + 1] or first == second


def test_a_diff_names_both_sides() -> None:
    one, other = _holding(fragment("abcd"), dropped=3), _holding(fragment("abx"), version=7)
    found = diff(one, other)
    assert (found.a.state_id, found.a.version, found.a.dropped) == (one.state_id, 1, 3)
    assert (found.b.version, found.b.head_position, found.b.dropped) == (7, 3, 0)
    assert (found.common_prefix.tokens, found.common_prefix.text) == (2, "ab")
    assert (found.a_part.text, found.b_part.text) == ("cd", "x")
    assert found.same_model
    assert not diff(one, replace(other, model_id=ModelId("another"))).same_model


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5]),
        "top_k": st.sampled_from([0, 7]),
        "seed": st.sampled_from([None, 7]),
        "stop_sequences": st.sampled_from([(), ("a",)]),
    }
)


@given(SETTINGS, SETTINGS)
def test_the_settings_that_differ_are_all_named(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    expected = {name: (v, second[name]) for name, v in first.items() if v != second[name]}
    one, other = config(**first), config(**second)
    assert config_changes(one, other) == expected
    made: StateConfig = replace(one, **{name: there for name, (_, there) in expected.items()})
    assert made == other


def test_one_model_can_be_told_apart_after_the_first_token_that_differs() -> None:
    found = diff(_holding(fragment("abcde")), _holding(fragment("abxy")))
    assert list(places(found)) == [3, 4]
    assert list(places(replace(found, same_model=False))) == [1, 2, 3, 4]


def test_where_one_text_begins_the_other_one_model_says_the_same() -> None:
    for one, other in (("abc", "abc"), ("abc", "abcd"), ("abcd", "abc")):
        found = diff(_holding(fragment(one)), _holding(fragment(other)))
        assert list(places(found)) == []
        assert list(places(replace(found, same_model=False))) == [1, 2, 3]
