"""A state is the fold of its events: defined for every valid history, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.config import ConfigChanges
from domain.errors import UnknownEvent
from domain.events import ConfigChanged, Event, Fragment, HeadRewound, Recorded, StateDeleted
from domain.state import Deleted, Live, fold, join, take
from tests.builders import (
    MODEL,
    RECORDED_AT,
    config,
    created,
    forwarded,
    fragment,
    fragments,
    generated,
    histories,
    history,
    live,
    recorded,
    state_id,
)

# given events / then state


def test_no_events_are_no_state() -> None:
    assert fold([]) is None


def test_a_created_state_holds_what_it_was_created_with() -> None:
    state = live(created("añ", temperature=0.5))
    assert state == Live(
        state_id=state_id(),
        version=1,
        model_id=MODEL,
        model_type="causal_lm",
        config=config(temperature=0.5),
        metadata={},
        origin=created().origin,
        content=fragment("añ"),
        created_at=RECORDED_AT,
        modified_at=RECORDED_AT,
    )


def test_content_is_appended() -> None:
    state = live(created("ab"), forwarded(2, "cd"), generated(4, "é"))
    assert state.content == fragment("abcdé")
    assert (state.version, state.head_position) == (3, 5)


def test_a_generation_may_add_nothing() -> None:
    state = live(created("ab"), generated(2, ""))
    assert (state.version, state.content) == (2, fragment("ab"))


def test_a_changed_config_keeps_what_it_does_not_name() -> None:
    changes = ConfigChanges(temperature=0.9, seed=None)
    state = live(created(seed=4, top_k=5), ConfigChanged(changes=changes))
    assert state.config == config(temperature=0.9, top_k=5)


def test_a_rewound_state_holds_the_first_tokens() -> None:
    state = live(created("abcd"), HeadRewound(to_position=2), forwarded(2, "x"))
    assert state.content == fragment("abx")


def test_a_deleted_state_keeps_only_what_its_history_needs() -> None:
    assert fold(history(created(), StateDeleted())) == Deleted(
        state_id=state_id(), version=2, model_id=MODEL, deleted_at=RECORDED_AT
    )


def test_times_are_those_of_the_first_and_of_the_newest_event() -> None:
    first = recorded(created(), version=1, recorded_at="2026-01-01T00:00:00.000000Z")
    second = recorded(forwarded(3), version=2, recorded_at="2026-01-01T00:00:01.000000Z")
    state = fold([first, second])
    assert isinstance(state, Live)
    assert (state.created_at, state.modified_at) == (first.row.recorded_at, second.row.recorded_at)


def test_room_is_what_the_context_leaves() -> None:
    assert live(created("abc", context_size=5)).room == 2
    assert live(created("abc", context_size=3)).room == 0


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([forwarded(0)], "cannot happen"),
        ([created(), created()], "exists already"),
        ([created(), StateDeleted(), forwarded(3)], "cannot happen"),
        ([created(), StateDeleted(), StateDeleted()], "cannot happen"),
        ([created("abc"), forwarded(2)], "starts at 2, the head is at 3"),
        ([created("abc"), generated(4)], "starts at 4, the head is at 3"),
    ],
)
def test_an_event_that_cannot_follow_is_an_error_with_its_position(
    events: list[Event], why: str
) -> None:
    with pytest.raises(UnknownEvent, match=why) as error:
        fold(history(*events))
    assert error.value.position == len(events)


@pytest.mark.parametrize("version", [1, 3])
def test_a_gap_in_the_versions_is_an_error(version: int) -> None:
    with pytest.raises(UnknownEvent, match=f"version {version} where 2 must come"):
        fold([recorded(created()), recorded(forwarded(3), version=version)])


# laws


@given(histories())
def test_every_valid_history_folds_to_its_last_version(history: list[Recorded]) -> None:
    state = fold(history)
    assert state is not None
    assert state.version == len(history)
    assert [one.version for one in history] == list(range(1, len(history) + 1))


@given(histories())
def test_a_live_state_never_holds_more_than_its_context(history: list[Recorded]) -> None:
    for count in range(1, len(history) + 1):
        state = fold(history[:count])
        if isinstance(state, Live):
            assert 1 <= state.head_position <= state.config.context_size
            assert len(state.content.ends) == state.head_position
            assert "".join(state.content.pieces()) == state.content.text


@given(history=histories(), data=st.data())
def test_a_history_may_be_folded_in_parts(history: list[Recorded], data: st.DataObject) -> None:
    split = data.draw(st.integers(0, len(history)))
    assert fold(history[split:], fold(history[:split])) == fold(history)


@given(history=histories(), data=st.data())
def test_a_missing_event_is_always_found(history: list[Recorded], data: st.DataObject) -> None:
    missing = data.draw(st.integers(0, len(history) - 1))
    if missing < len(history) - 1:
        with pytest.raises(UnknownEvent):
            fold(history[:missing] + history[missing + 1 :])


NOTHING = Fragment(tokens=(), text="", ends=())


@given(fragments(min_size=0), fragments(min_size=0), fragments(min_size=0))
def test_joining_is_associative(one: Fragment, two: Fragment, three: Fragment) -> None:
    assert join(join(one, two), three) == join(one, join(two, three))


@given(fragments(min_size=0))
def test_joining_nothing_changes_nothing(one: Fragment) -> None:
    assert join(one, NOTHING) == one == join(NOTHING, one)


@given(one=fragments(min_size=0), two=fragments(min_size=0))
def test_what_was_joined_first_can_be_taken_back(one: Fragment, two: Fragment) -> None:
    assert take(join(one, two), len(one.tokens)) == one


@given(fragment=fragments(min_size=0), data=st.data())
def test_taking_twice_is_taking_the_smaller(fragment: Fragment, data: st.DataObject) -> None:
    size = len(fragment.tokens)
    first, second = data.draw(st.integers(0, size)), data.draw(st.integers(0, size))
    assert take(take(fragment, first), second) == take(fragment, min(first, second))
    assert take(fragment, size) == fragment
    assert take(fragment, 0) == NOTHING


@given(fragments(min_size=0), fragments(min_size=0))
def test_the_pieces_of_joined_fragments_are_the_pieces_of_each(
    one: Fragment, two: Fragment
) -> None:
    assert join(one, two).pieces() == one.pieces() + two.pieces()
