"""A state is the fold of its events: defined for every valid history, and nothing else."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.chain import SEALED, Row
from domain.config import BeamParameters, ConfigChanges, LogitsParameters
from domain.content import Fragment
from domain.events import (
    BeamsGenerated,
    ConfigChanged,
    ContextSlid,
    ContinuationsGenerated,
    Event,
    HeadRewound,
    Recorded,
    StateDeleted,
    StateErased,
    encode,
)
from domain.log_errors import EventErased, UnknownEvent
from domain.state import (
    CannotFollow,
    Deleted,
    Erased,
    Live,
    apply,
    drop,
    fold,
    fold_rows,
    join,
    take,
)
from tests.builders import (
    MODEL,
    PARAMETERS,
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


def after_a_slide(event: Event, dropped: int) -> Event:
    """An event of a state that has let go of so many tokens."""
    return msgspec.structs.replace(event, dropped=dropped)


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
        dropped=0,
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


def test_a_state_that_slides_lets_go_of_its_first_tokens_and_keeps_its_absolute_position() -> None:
    state = live(created("abcd"), ContextSlid(dropped=3))
    assert (state.content, state.dropped) == (fragment("d"), 3)
    assert (state.version, state.head_position, state.absolute_position) == (2, 1, 4)
    grown = apply(state, after_a_slide(forwarded(4, "ef"), 3))
    assert (grown.content, grown.absolute_position) == (fragment("def"), 6)
    again = apply(grown, ContextSlid(dropped=2))
    assert (again.content, again.dropped, again.absolute_position) == (fragment("f"), 5, 6)


def test_a_state_may_begin_after_tokens_that_it_does_not_hold() -> None:
    state = live(after_a_slide(created("ab"), 7))
    assert (state.head_position, state.absolute_position) == (2, 9)


def test_a_rewound_state_keeps_what_it_let_go_of() -> None:
    state = live(created("abcd"), ContextSlid(dropped=2), HeadRewound(to_position=1))
    assert (state.content, state.dropped) == (fragment("c"), 2)


def continued(start: int) -> ContinuationsGenerated:
    return ContinuationsGenerated(
        parameters=PARAMETERS, seed=7, start=start, continuations=(), stored_logits=None
    )


def searched(start: int) -> BeamsGenerated:
    parameters = BeamParameters(logits=LogitsParameters(), max_tokens=1, num_beams=1)
    return BeamsGenerated(parameters=parameters, start=start, steps=(), beams=())


def test_continuations_and_beams_are_versions_of_their_own_and_change_nothing() -> None:
    state = live(created("abc"), continued(3), searched(3))
    assert state == msgspec.structs.replace(live(created("abc")), version=3)


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
        ([created(), created()], "not an event that the state outlives"),
        ([created(), StateDeleted(), forwarded(3)], "cannot happen"),
        ([created(), StateDeleted(), StateDeleted()], "cannot happen"),
        ([created("abc"), forwarded(2)], "starts at 2 with 0 tokens dropped, the head is at 3"),
        ([created("abc"), generated(4)], "starts at 4 with 0 tokens dropped, the head is at 3"),
        ([created("abc"), ContextSlid(dropped=3)], "names 3 tokens, the head is at 3"),
        ([created("abc"), ContextSlid(dropped=0)], "names 0 tokens"),
        ([created("abc"), HeadRewound(to_position=4)], "names 4 tokens, the head is at 3"),
        ([created("abc"), ContextSlid(dropped=2), forwarded(1)], "head is at 3 with 2 dropped"),
        ([created("abc"), ContextSlid(dropped=2), forwarded(3)], "3 with 0 tokens dropped"),
        ([created("abc"), continued(2)], "starts at 2"),
        ([created("abc"), searched(4)], "starts at 4"),
    ],
)
def test_an_event_that_cannot_follow_is_an_error_with_its_position(
    events: list[Event], why: str
) -> None:
    with pytest.raises(UnknownEvent, match=why) as error:
        fold(history(*events))
    assert error.value.position == len(events)


@pytest.mark.parametrize("event", [created(), StateDeleted()])
def test_an_event_that_begins_or_ends_a_state_is_not_applied_to_one(event: Event) -> None:
    with pytest.raises(CannotFollow):
        apply(live(), event)


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


# what is sealed


def sealed(one: Recorded, *, key: bool) -> Row:
    """A row as an erasable log has it, with or without the key to it."""
    opened = encode(one.event) if key else None
    return msgspec.structs.replace(one.row, payload=f'{SEALED}"AAAA"}}', opened=opened)


@given(histories())
def test_sealed_rows_lead_to_the_same_state_with_the_key_and_to_none_without_it(
    history: list[Recorded],
) -> None:
    assert fold_rows([one.row for one in history]) == fold(history)
    assert fold_rows([sealed(one, key=True) for one in history]) == fold(history)
    with pytest.raises(EventErased):
        fold_rows([sealed(one, key=False) for one in history])


@given(histories())
def test_a_state_that_was_erased_is_known_without_the_key_to_what_it_held(
    events: list[Recorded],
) -> None:
    whole = history(*(one.event for one in events), StateErased())
    rows = [*(sealed(one, key=False) for one in whole[:-1]), whole[-1].row]
    state = Erased(state_id=state_id(), version=len(rows), erased_at=RECORDED_AT)
    assert fold_rows(rows) == state == fold(whole)


def test_no_rows_are_no_state() -> None:
    assert fold_rows([]) is None


@pytest.mark.parametrize("event", [forwarded(3), StateDeleted(), StateErased(), created()])
def test_nothing_can_happen_to_a_state_that_was_erased(event: Event) -> None:
    with pytest.raises(UnknownEvent, match="cannot happen to this state"):
        fold(history(created(), StateErased(), event))


def test_what_never_was_cannot_be_erased() -> None:
    with pytest.raises(UnknownEvent, match="cannot happen to this state"):
        fold(history(StateErased()))


NOTHING = Fragment(tokens=(), text="", ends=())


@st.composite
def any_fragments(draw: st.DrawFn) -> Fragment:
    """Fragments of no token or several, of which some are not whole characters by themselves."""
    content = draw(fragments(min_size=0))
    indices = st.integers(0, max(0, len(content.tokens) - 1))
    some = draw(st.dictionaries(indices, st.binary(min_size=1, max_size=4).map(bytes.hex)))
    return msgspec.structs.replace(content, partial=some if content.tokens else {})


def raw_bytes(content: Fragment) -> list[str | None]:
    return [content.partial.get(at) for at in range(len(content.tokens))]


@given(any_fragments(), any_fragments(), any_fragments())
def test_joining_is_associative(one: Fragment, two: Fragment, three: Fragment) -> None:
    assert join(join(one, two), three) == join(one, join(two, three))


@given(any_fragments())
def test_joining_nothing_changes_nothing(one: Fragment) -> None:
    assert join(one, NOTHING) == one == join(NOTHING, one)


@given(any_fragments(), any_fragments())
def test_joined_fragments_keep_what_each_token_adds_and_its_bytes(
    one: Fragment, two: Fragment
) -> None:
    both = join(one, two)
    assert both.pieces() == one.pieces() + two.pieces()
    assert raw_bytes(both) == raw_bytes(one) + raw_bytes(two)
    assert both.partial.keys() <= set(range(len(both.tokens)))


@given(one=any_fragments(), two=any_fragments())
def test_what_was_joined_can_be_taken_apart(one: Fragment, two: Fragment) -> None:
    both, count = join(one, two), len(one.tokens)
    assert (take(both, count), drop(both, count)) == (one, two)


@given(fragment=any_fragments(), data=st.data())
def test_any_place_parts_a_fragment_in_two_that_join_to_it(
    fragment: Fragment, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(fragment.tokens)))
    first, second = take(fragment, count), drop(fragment, count)
    assert join(first, second) == fragment
    assert (len(first.tokens), len(second.tokens)) == (count, len(fragment.tokens) - count)


@given(fragment=any_fragments(), data=st.data())
def test_taking_twice_is_taking_the_smaller(fragment: Fragment, data: st.DataObject) -> None:
    size = len(fragment.tokens)
    first, second = data.draw(st.integers(0, size)), data.draw(st.integers(0, size))
    assert take(take(fragment, first), second) == take(fragment, min(first, second))
    assert take(fragment, size) == fragment
    assert take(fragment, 0) == NOTHING


@given(fragment=any_fragments(), data=st.data())
def test_dropping_twice_is_dropping_the_sum(fragment: Fragment, data: st.DataObject) -> None:
    size = len(fragment.tokens)
    first = data.draw(st.integers(0, size))
    second = data.draw(st.integers(0, size - first))
    assert drop(drop(fragment, first), second) == drop(fragment, first + second)
    assert drop(fragment, size) == NOTHING
    assert drop(fragment, 0) == fragment


@given(fragment=any_fragments(), data=st.data())
def test_it_does_not_matter_which_end_is_cut_first(fragment: Fragment, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(fragment.tokens)))
    begin = data.draw(st.integers(0, end))
    assert drop(take(fragment, end), begin) == take(drop(fragment, begin), end - begin)
