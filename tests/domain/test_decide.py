"""Given events, when a client wishes something, then an event or a refusal."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import decide
from domain.config import BeamParameters, ConfigChanges, LogitsParameters
from domain.errors import (
    InvalidInput,
    NotAPrefix,
    PreconditionFailed,
    StateIsDeleted,
    StateIsErased,
    StateNotFound,
    TooLarge,
)
from domain.events import (
    Beam,
    BeamsGenerated,
    ConfigChanged,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    Event,
    HeadRewound,
    StateCreated,
    StateDeleted,
    StateErased,
    TextForwarded,
    event_type,
)
from domain.ids import ModelId, TokenId, Version
from domain.origin import ContinuationId, Fork, Merge, Parent
from domain.state import Live, apply, evolve, fold
from tests.builders import (
    MODEL,
    MODEL_CONTEXT,
    PARAMETERS,
    RECORDED_AT,
    config,
    created,
    forwarded,
    fragment,
    generated,
    history,
    live,
    recorded,
    scores,
    state_id,
)


def slid_forwarded(start: int, text: str, dropped: int) -> TextForwarded:
    return msgspec.structs.replace(forwarded(start, text), dropped=dropped)


# which states take operations


def test_a_live_state_takes_operations() -> None:
    assert decide.live(live(), state_id()) == live()


def test_a_state_that_never_was_is_not_found() -> None:
    with pytest.raises(StateNotFound) as refused:
        decide.live(None, state_id(3))
    assert refused.value.facts == {"state_id": state_id(3)}


def test_a_deleted_state_says_when_and_that_its_events_stay() -> None:
    with pytest.raises(StateIsDeleted, match="its events stay readable") as refused:
        decide.live(fold(history(created(), StateDeleted())), state_id())
    assert refused.value.facts["deleted_at"] == RECORDED_AT


@pytest.mark.parametrize("before", [(), (StateDeleted(),)], ids=["live", "deleted"])
def test_an_erased_state_says_when_and_that_nothing_of_it_can_be_read(
    before: tuple[Event, ...],
) -> None:
    with pytest.raises(StateIsErased, match="cannot be read again") as refused:
        decide.live(fold(history(created(), *before, StateErased())), state_id())
    assert refused.value.facts == {"state_id": state_id(), "erased_at": RECORDED_AT}


@pytest.mark.parametrize("if_match", [None, 2])
def test_the_right_precondition_holds(if_match: Version | None) -> None:
    decide.check_precondition(live(created(), forwarded(3)), if_match)


@pytest.mark.parametrize("if_match", [0, 1, 3])
def test_another_precondition_fails(if_match: Version) -> None:
    with pytest.raises(PreconditionFailed) as refused:
        decide.check_precondition(live(created(), forwarded(3)), if_match)
    assert refused.value.facts["expected_version"] == if_match
    assert refused.value.facts["current_version"] == 2


# create


def creation(text: str = "abc", **changes: Any) -> StateCreated:
    return decide.create(
        model_id=MODEL,
        model_type="causal_lm",
        model_revision=None,
        model_context=MODEL_CONTEXT,
        config=config(**changes),
        metadata={},
        content=fragment(text),
    )


def test_a_state_is_created() -> None:
    assert creation("abc", context_size=3) == created("abc", context_size=3)


def test_a_context_above_the_models_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"config\.context_size: must be at most 64"):
        creation(context_size=MODEL_CONTEXT + 1)


def test_content_above_the_context_is_too_large() -> None:
    with pytest.raises(TooLarge, match="4 tokens do not fit") as refused:
        creation("abcd", context_size=3)
    assert refused.value.facts == {"tokens": 4, "head_position": 0, "context_size": 3}


# forward


def test_text_is_forwarded_at_the_head() -> None:
    state = live(created("abc", context_size=5))
    event = decide.forward(state, fragment("de"), scores(2))
    assert event == TextForwarded(start=3, content=fragment("de"), scores=scores(2))


def test_text_that_does_not_fit_is_too_large() -> None:
    with pytest.raises(TooLarge) as refused:
        decide.forward(live(created("abc", context_size=4)), fragment("de"), scores(2))
    assert refused.value.facts == {"tokens": 2, "head_position": 3, "context_size": 4}


def test_a_slid_state_is_forwarded_at_its_absolute_position() -> None:
    state = live(created("abcd"), ContextSlid(dropped=3))
    event = decide.forward(state, fragment("e"), scores(1))
    assert (event.start, event.dropped) == (4, 3)


# slide


def sliding(text: str, context_size: int, **changes: Any) -> Live:
    return live(created(text, context_size=context_size, **{"on_full": "slide"} | changes))


@pytest.mark.parametrize(
    ("held", "size", "dropped"), [("abcd", 4, 2), ("abc", 4, 2), ("abcde", 5, 3), ("ab", 2, 1)]
)
def test_half_of_what_a_state_may_hold_is_let_go_of(held: str, size: int, dropped: int) -> None:
    assert decide.slide(sliding(held, size)) == ContextSlid(dropped=dropped)


@pytest.mark.parametrize("held", ["a", "ab"])
def test_a_state_that_holds_no_more_than_a_slide_keeps_it(held: str) -> None:
    assert decide.slide(sliding(held, 4)) is None


def test_a_state_that_stops_when_it_is_full_lets_go_of_nothing() -> None:
    state = sliding("abcd", 4, on_full="stop")
    assert decide.slide(state) is None
    assert decide.room(state) == 0
    with pytest.raises(TooLarge):
        decide.make_room(state, 1)


def test_tokens_that_fit_need_no_slide() -> None:
    assert decide.make_room(sliding("abc", 4), 1) is None
    assert decide.make_room(sliding("abc", 4), 2) == ContextSlid(dropped=2)


def test_tokens_that_do_not_fit_even_after_a_slide_are_too_large() -> None:
    with pytest.raises(TooLarge, match="room for 3") as refused:
        decide.make_room(sliding("abc", 4), 4)
    assert refused.value.facts == {"tokens": 4, "head_position": 3, "context_size": 4, "room": 3}


@given(size=st.integers(2, 40), data=st.data())
def test_there_is_room_after_the_slide_or_a_refusal_and_never_a_second_slide(
    size: int, data: st.DataObject
) -> None:
    state = sliding("x" * data.draw(st.integers(1, size)), size)
    count = data.draw(st.integers(1, size + 1))
    if count > decide.room(state):
        with pytest.raises(TooLarge):
            decide.make_room(state, count)
        return
    slid = decide.make_room(state, count)
    assert (slid is None) == (count <= state.room)
    after = apply(state, slid) if slid else state
    assert after.head_position + count <= size
    assert after.absolute_position == state.absolute_position
    assert not slid or decide.slide(after) is None


# config


def test_settings_change() -> None:
    changes = ConfigChanges(temperature=0.5, context_size=3, seed=None)
    assert decide.change_config(live(created("abc")), changes, MODEL_CONTEXT) == ConfigChanged(
        changes=changes
    )


def test_changing_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one setting"):
        decide.change_config(live(), ConfigChanges(), MODEL_CONTEXT)


@pytest.mark.parametrize(("size", "limit"), [(65, "at most 64"), (2, "at least 3")])
def test_a_context_that_does_not_fit_is_refused(size: int, limit: str) -> None:
    with pytest.raises(InvalidInput, match=limit):
        decide.change_config(live(created("abc")), ConfigChanges(context_size=size), MODEL_CONTEXT)


@pytest.mark.parametrize(
    ("had", "changes"),
    [
        ({"on_full": "stop", "context_size": 1}, {"on_full": "slide"}),
        ({"on_full": "slide", "context_size": 2}, {"context_size": 1}),
    ],
)
def test_a_context_of_one_token_cannot_slide(had: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"config\.on_full: .* from a context_size of 2"):
        decide.change_config(live(created("a", **had)), ConfigChanges(**changes), MODEL_CONTEXT)
    with pytest.raises(InvalidInput, match=r"config\.on_full"):
        creation("a", **(had | changes))
    assert creation("a", on_full="slide", context_size=2).config.on_full == "slide"


# rewind


@pytest.mark.parametrize("position", [1, 2, 3])
def test_a_state_is_rewound(position: int) -> None:
    assert decide.rewind(live(created("abc")), position) == HeadRewound(to_position=position)


@pytest.mark.parametrize("position", [-1, 0, 4])
def test_rewinding_outside_the_state_is_refused(position: int) -> None:
    with pytest.raises(InvalidInput, match="position: must be from 1 to 3"):
        decide.rewind(live(created("abc")), position)


def test_a_state_is_rewound_to_an_earlier_version() -> None:
    then = live(created("abc"))
    now = live(created("abc"), forwarded(3, "de"), generated(5, "f"))
    assert decide.rewind_to(now, then) == HeadRewound(to_position=3)


@pytest.mark.parametrize(
    "now",
    [
        live(created("abc"), HeadRewound(to_position=2), forwarded(2, "x")),
        live(created("abc"), HeadRewound(to_position=2)),
    ],
)
def test_a_version_whose_tokens_were_cut_is_no_prefix(now: Live) -> None:
    with pytest.raises(NotAPrefix, match="fork that version instead"):
        decide.rewind_to(now, live(created("abc")))


def test_a_version_from_before_a_slide_is_no_prefix_even_if_its_tokens_are() -> None:
    then = live(created("aaaa"))
    slid = live(created("aaaa"), ContextSlid(dropped=2), slid_forwarded(4, "aa", 2))
    assert slid.content.tokens == then.content.tokens
    with pytest.raises(NotAPrefix):
        decide.rewind_to(slid, then)


def test_a_state_is_rewound_to_a_version_after_its_last_slide() -> None:
    then = live(created("aaaa"), ContextSlid(dropped=2))
    now = live(created("aaaa"), ContextSlid(dropped=2), slid_forwarded(4, "aa", 2))
    assert decide.rewind_to(now, then) == HeadRewound(to_position=2)
    assert apply(now, HeadRewound(to_position=2)).dropped == 2


# fork

BEGIN: dict[str, Any] = {"metadata": {"of": "a fork"}, "model_context": MODEL_CONTEXT}


def forked(parent: Live, position: int | None = None, **changes: Any) -> StateCreated:
    return decide.fork(parent, position=position, changes=ConfigChanges(**changes), **BEGIN)


@pytest.mark.parametrize(("position", "text"), [(None, "abcd"), (4, "abcd"), (2, "ab"), (1, "a")])
def test_a_fork_begins_with_the_first_tokens_of_its_parent(position: int | None, text: str) -> None:
    parent = live(created("abc", seed=4), forwarded(3))
    event = forked(parent, position, temperature=0.5)
    assert event == StateCreated(
        origin=Fork(state_id=state_id(), version=2, head_position=len(text)),
        model_id=MODEL,
        model_type="causal_lm",
        model_revision=None,
        config=config(seed=4, temperature=0.5),
        metadata={"of": "a fork"},
        content=fragment(text),
    )


@pytest.mark.parametrize("position", [0, 4])
def test_a_fork_outside_its_parent_is_refused(position: int) -> None:
    with pytest.raises(InvalidInput, match="position: must be from 1 to 3"):
        forked(live(created("abc")), position)


def test_a_fork_with_a_context_above_the_models_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at most 64"):
        forked(live(), context_size=MODEL_CONTEXT + 1)


def test_a_fork_that_does_not_fit_its_context_is_too_large() -> None:
    with pytest.raises(TooLarge):
        forked(live(created("abc")), context_size=2)
    assert forked(live(created("abc")), 2, context_size=2).content == fragment("ab")


def test_a_fork_goes_on_at_the_absolute_position_of_its_parent() -> None:
    parent = live(created("abcd"), ContextSlid(dropped=2), slid_forwarded(4, "e", 2))
    event = forked(parent, 2)
    assert (event.content, event.dropped) == (fragment("cd"), 2)
    child = evolve(None, recorded(event))
    assert isinstance(child, Live)
    assert child.absolute_position == 4


# fork with a continuation


def continuations(start: int, *texts: str, dropped: int = 0) -> ContinuationsGenerated:
    return ContinuationsGenerated(
        parameters=PARAMETERS,
        seed=7,
        start=start,
        dropped=dropped,
        continuations=tuple(
            Continuation(
                content=fragment(text),
                scores=scores(len(text)),
                sampling_probabilities=(1.0,) * len(text),
                alternatives=((),) * len(text),
                finish_reason=None,
            )
            for text in texts
        ),
        stored_logits=None,
    )


def beams(start: int, *texts: str) -> BeamsGenerated:
    return BeamsGenerated(
        parameters=BeamParameters(logits=LogitsParameters(), max_tokens=3, num_beams=2),
        start=start,
        steps=(),
        beams=tuple(
            Beam(content=fragment(text), scores=scores(len(text)), score=-1.0, finished=True)
            for text in texts
        ),
    )


def adopted(parent: Live, event: Event, index: int, **changes: Any) -> StateCreated:
    return decide.adopt(parent, event, index, changes=ConfigChanges(**changes), **BEGIN)


@pytest.mark.parametrize("make", [continuations, beams])
@pytest.mark.parametrize(("index", "text"), [(0, "abcde"), (1, "abcfé")])
def test_a_fork_of_a_continuation_begins_with_all_its_parent_held_and_the_continuation(
    make: Callable[..., Event], index: int, text: str
) -> None:
    event = make(3, "de", "fé")
    parent = live(created("abc", seed=4), event)
    assert adopted(parent, event, index, temperature=0.5) == StateCreated(
        origin=Fork(
            state_id=state_id(),
            version=2,
            head_position=3,
            continuation=ContinuationId(version=2, index=index),
        ),
        model_id=MODEL,
        model_type="causal_lm",
        config=config(seed=4, temperature=0.5),
        metadata={"of": "a fork"},
        content=fragment(text),
    )


def test_a_fork_of_a_continuation_goes_on_at_the_absolute_position() -> None:
    event = continuations(4, "e", dropped=2)
    child = adopted(live(created("abcd"), ContextSlid(dropped=2), event), event, 0)
    assert (child.content, child.dropped) == (fragment("cde"), 2)


@pytest.mark.parametrize("make", [continuations, beams])
@pytest.mark.parametrize("index", [-1, 2])
def test_a_continuation_that_does_not_exist_is_refused_with_those_that_do(
    make: Callable[..., Event], index: int
) -> None:
    event = make(3, "d", "e")
    with pytest.raises(InvalidInput, match=r"continuation\.index: must be from 0 to 1"):
        adopted(live(created("abc"), event), event, index)


@pytest.mark.parametrize("event", [created("abc"), forwarded(3), HeadRewound(to_position=1)])
def test_a_version_without_continuations_says_what_it_is(event: Event) -> None:
    with pytest.raises(InvalidInput, match=r"continuation\.version: .*" + event_type(event)):
        adopted(live(), event, 0)


def test_a_continuation_that_does_not_fit_is_too_large() -> None:
    event = continuations(3, "de")
    with pytest.raises(TooLarge):
        adopted(live(created("abc"), event), event, 0, context_size=4)


# merge


def numbered(number: int, *events: Event) -> Live:
    """State number ``number``."""
    return msgspec.structs.replace(live(*events), state_id=state_id(number))


def merged(parents: list[Live], text: str, **changes: Any) -> StateCreated:
    return decide.merge(parents, fragment(text), changes=ConfigChanges(**changes), **BEGIN)


def test_a_merge_names_its_parents_and_takes_the_settings_of_the_first() -> None:
    parents = [numbered(0, created("ab", seed=4)), numbered(1, created("a"), forwarded(1, "c"))]
    assert merged(parents, "abc", temperature=0.5) == StateCreated(
        origin=Merge(
            parents=(
                Parent(state_id=state_id(0), version=1, head_position=2),
                Parent(state_id=state_id(1), version=2, head_position=2),
            ),
            strategy="concatenate",
        ),
        model_id=MODEL,
        model_type="causal_lm",
        config=config(seed=4, temperature=0.5),
        metadata={"of": "a fork"},
        content=fragment("abc"),
    )


def test_a_merge_begins_at_position_0_wherever_its_parents_are() -> None:
    slid = numbered(0, created("abcd"), ContextSlid(dropped=2))
    assert merged([slid, numbered(1)], "cdabc").dropped == 0


def test_a_merge_that_does_not_fit_its_context_is_too_large() -> None:
    parents = [numbered(0, created("ab", context_size=2)), numbered(1)]
    with pytest.raises(TooLarge):
        merged(parents, "abc")
    assert merged(parents, "abc", context_size=3).content == fragment("abc")


def test_states_of_one_model_may_be_merged() -> None:
    decide.check_parents([numbered(number) for number in range(3)])


def test_states_that_cannot_be_merged_are_named() -> None:
    other = numbered(1, created(model_id=ModelId("other")))
    with pytest.raises(InvalidInput) as refused:
        decide.check_parents([numbered(0), other, numbered(2), numbered(0)])
    assert [problem.field for problem in refused.value.facts["errors"]] == [
        "state_ids[1]",
        "state_ids[3]",
    ]
    assert f"is a state of other, the first one is of {MODEL}" in str(refused.value)
    assert "is state_ids[0] again" in str(refused.value)


@pytest.mark.parametrize(
    ("texts", "text"),
    [
        (["abx", "aby"], "abxy"),
        (["ab", "abc", "ab"], "abc"),
        (["ab", "cd"], "abcd"),
        (["abx", "aby", "ac"], "abxbyc"),
        (["ab", "ab"], "ab"),
    ],
)
def test_what_all_have_in_common_comes_once_and_all_else_as_often_as_it_is_there(
    texts: list[str], text: str
) -> None:
    assert decide.concatenate([fragment(one).tokens for one in texts]) == fragment(text).tokens


runs = st.lists(st.integers(0, 3).map(TokenId), min_size=1, max_size=6).map(tuple)


@given(st.lists(runs, min_size=2, max_size=5))
def test_concatenated_texts_are_a_common_prefix_and_a_part_of_each(
    texts: list[tuple[TokenId, ...]],
) -> None:
    merged = decide.concatenate(texts)
    common = (sum(map(len, texts)) - len(merged)) // (len(texts) - 1)
    assert {text[:common] for text in texts} == {merged[:common]}
    assert len({text[: common + 1] for text in texts}) > 1 or common == min(map(len, texts))
    parts = merged[common:]
    for text in texts:
        own = text[common:]
        assert parts[: len(own)] == own
        parts = parts[len(own) :]
    assert parts == ()


@given(runs)
def test_concatenating_a_text_with_itself_or_its_beginnings_is_that_text(
    text: tuple[TokenId, ...],
) -> None:
    assert decide.concatenate([text, text]) == text
    assert decide.concatenate([text[:1], text]) == text


# delete


def test_a_state_is_deleted() -> None:
    assert decide.delete(live()) == StateDeleted()
