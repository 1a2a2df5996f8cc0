"""Whether an event can be as it is recorded, by its own words and what came before it."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any
from unittest.mock import ANY

import msgspec
import pytest
from hypothesis import given

from domain import consistency
from domain.config import ConfigChanges, Constraint
from domain.content import Fragment, StoredLogits
from domain.decide import adopt, concatenate, fork, merge
from domain.events import (
    ConfigChanged,
    ContextSlid,
    Event,
    HeadRewound,
    Recorded,
    StateCreated,
    StateDeleted,
    TokensGenerated,
)
from domain.ids import ModelId, Position, TokenId
from domain.replay import BEGINNING, Course, Occurrence, occurrences
from domain.report import Divergence
from domain.state import Live, fold
from tests.builders import (
    MODEL_CONTEXT,
    created,
    forwarded,
    generated,
    history,
    recorded,
    state_id,
)
from tests.domain.replaying import (
    EOS,
    VOCABULARY,
    Path,
    Story,
    beams,
    changed,
    fulfils,
    generation,
    stories,
    text_of,
)

Check = Callable[[Occurrence], Divergence | None]


def ended(occurrence: Occurrence) -> Divergence | None:
    return consistency.compare_finish(occurrence, EOS, fulfils)


def told(occurrence: Occurrence) -> Divergence | None:
    return consistency.compare_text(occurrence, text_of)


def configured(occurrence: Occurrence) -> Divergence | None:
    return consistency.compare_config(occurrence, VOCABULARY, MODEL_CONTEXT)


CHECKS: dict[str, Check] = {
    "text": told,
    "call": consistency.compare_call,
    "slide": consistency.compare_slide,
    "config": configured,
    "room": consistency.compare_room,
    "finish": ended,
    "storage": consistency.compare_storage,
}


@pytest.mark.parametrize("name", CHECKS)
@given(story=stories())
def test_what_happened_can_be_as_it_is_recorded(name: str, story: Story) -> None:
    assert [CHECKS[name](one) for one in occurrences(history(*story.events))] == [None] * len(
        story.events
    )


def found_by(name: str, *events: Event) -> list[tuple[int | None, str, Any, Any]]:
    """Version, field, expected and actual of what one check finds in a history."""
    found = [CHECKS[name](one) for one in occurrences(history(*events))]
    return [(one.version, one.field, one.expected, one.actual) for one in found if one]


# given a generation / when its end is checked / then


def finish(
    text: str, *, context: int = 64, held: str = "abc", **fields: Any
) -> tuple[str, Any, int | None] | None:
    """What is wrong with how a generation of ``text`` ended; "0" stands for end-of-sequence."""
    content = Fragment.of([TokenId(0 if letter == "0" else ord(letter)) for letter in text], text)
    event = generated(len(held), content, **({"parameters": generation()} | fields))
    *_, one = occurrences(history(created(held, context_size=context), event))
    found = ended(one)
    return None if found is None else (found.field, found.actual, found.token_position)


def constrained(count: int, **fields: Any) -> dict[str, Any]:
    """The constraint of the oracle that texts of so many tokens fulfil."""
    return {
        "parameters": generation(constraint=Constraint(kind="regex", text=str(count)), **fields)
    }


ENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all its tokens": ("abcd", {"finish_reason": None}),
    "end-of-sequence": ("ab0", {"finish_reason": "eos"}),
    "end-of-sequence as its last token": ("abc0", {"finish_reason": "eos"}),
    "a stop token": (
        "ab",
        {"finish_reason": "stop_token", "parameters": generation(stop_token_ids=(ord("b"),))},
    ),
    "a stop sequence": (
        "abc",
        {"finish_reason": "stop_sequence", "parameters": generation(stop_sequences=("bc",))},
    ),
    "a full context": ("ab", {"finish_reason": "context_full", "context": 5}),
    "a context that was full before": ("", {"finish_reason": "context_full", "context": 3}),
    "a client that left": ("ab", {"finish_reason": "cancelled"}),
    "a client that left at the last token": ("abcd", {"finish_reason": "cancelled"}),
    "a client that left with nothing to draw": ("", {"finish_reason": "cancelled", "context": 3}),
    "its constraint": ("ab", {"finish_reason": "constraint", **constrained(2)}),
    "its constraint, and a full context": (
        "ab",
        {"finish_reason": "constraint", "context": 5, **constrained(2)},
    ),
    "end-of-sequence, which no constraint undoes": (
        "a0",
        {"finish_reason": "eos", **constrained(2)},
    ),
    "an ignored end-of-sequence that fulfils": (
        "a0",
        {"finish_reason": "constraint", **constrained(2, ignore_eos=True)},
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_generation_may_end_with(name: str) -> None:
    text, fields = ENDS[name]
    assert finish(text, **fields) is None


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(
    "reason",
    [None, "eos", "stop_token", "stop_sequence", "constraint", "context_full", "cancelled"],
)
def test_no_other_reason_passes_for_it(name: str, reason: str | None) -> None:
    text, fields = ENDS[name]
    right: set[Any] = {fields["finish_reason"]}
    if name in ("all its tokens", "a client that left at the last token"):
        right = {None, "cancelled"}
    if not text:
        right |= {"cancelled"} | ({"context_full"} if "context" in fields else set())
    found = finish(text, **(fields | {"finish_reason": reason}))
    assert (found is None) == (reason in right)
    assert found is None or (found[0] == "finish_reason" and found[1] in right)


@pytest.mark.parametrize(
    ("text", "fields", "reason", "at"),
    [
        ("a0b", {}, "eos", 4),
        ("abcd", {"parameters": generation(stop_token_ids=(98,))}, "stop_token", 4),
        ("abcd", {"parameters": generation(stop_sequences=("ab",))}, "stop_sequence", 4),
        ("abcd", {"context": 5}, "context_full", 4),
        ("a", {"context": 3}, "context_full", None),
        ("ab0", constrained(2), "constraint", 4),
        ("ab00", constrained(2, ignore_eos=True), "constraint", 4),
    ],
)
def test_a_generation_that_went_on_past_its_end_is_named_where_it_should_have_ended(
    text: str, fields: dict[str, Any], reason: str, at: int | None
) -> None:
    assert finish(text, **({"finish_reason": None} | fields)) == ("finish_reason", reason, at)


def test_more_tokens_than_were_asked_for_are_found() -> None:
    assert finish("abcde", finish_reason=None) == ("len(content.tokens)", 4, None)


def test_nothing_drawn_where_there_was_room_is_found() -> None:
    assert finish("", finish_reason="context_full", context=4) == (
        "finish_reason",
        "cancelled",
        None,
    )


def test_the_end_of_every_continuation_is_checked() -> None:
    story = Story()
    story.multi(generation(ignore_eos=True, max_tokens=3), seed=1, count=3)
    first, event = story.events
    wrong = changed(event, ("continuations", 1, "finish_reason"), lambda _: "eos")
    assert found_by("finish", first, wrong) == [(2, "continuations[1].finish_reason", "eos", None)]
    short = changed(event, ("parameters", "max_tokens"), lambda _: 2)
    assert found_by("finish", first, short) == [(2, "len(continuations[0].content.tokens)", 3, 2)]


# given the parts of one call / when they are checked / then


def two_parts() -> list[Event]:
    """A call that slides: "abc" held, three tokens drawn, three dropped, three drawn."""
    story = Story("abc", context_size=6, on_full="slide")
    story.generate(generation(max_tokens=6, ignore_eos=True), seed=1)
    assert [type(event) for event in story.events[1:]] == [
        TokensGenerated,
        ContextSlid,
        TokensGenerated,
    ]
    return story.events


@pytest.mark.parametrize(
    ("path", "value", "actual"),
    [
        (("resumes",), 2, 3),
        (("seed",), 2, 1),
        (("parameters", "max_tokens"), 7, 6),
        (("parameters", "sampling", "top_k"), 41, 40),
        (("parameters", "stop_sequences"), ["zz"], ()),
    ],
)
def test_a_part_that_does_not_go_on_as_the_call_began_is_found(
    path: Path, value: Any, actual: Any
) -> None:
    events = two_parts()
    events[-1] = changed(events[-1], path, lambda _: value)
    (found,) = found_by("call", *events)
    assert found[:2] == (4, path[0])
    if path[0] != "parameters":
        assert found[2:] == (value, actual)


def test_a_part_that_resumes_nothing_is_found() -> None:
    alone = generated(3, "d", resumes=1)
    assert found_by("call", created("abc"), alone) == [(2, "resumes", 1, 0)]


@pytest.mark.parametrize(
    ("reason", "may"),
    [("cancelled", True), ("context_full", True), (None, False), ("eos", False)],
)
def test_only_what_was_cut_off_is_resumed(reason: Any, may: bool) -> None:
    parts = generated(3, "d", finish_reason=reason), generated(4, "e", resumes=1)
    assert (found_by("call", created("abc"), *parts) == []) == may


def test_a_stop_sequence_may_begin_in_an_earlier_part() -> None:
    stops = generation(stop_sequences=("de",))
    first = generated(3, "d", parameters=stops, finish_reason="cancelled")
    second = generated(4, "e", parameters=stops, resumes=1, finish_reason="stop_sequence")
    assert found_by("finish", created("abc"), first, second) == []
    alone = msgspec.structs.replace(second, resumes=0)
    assert found_by("finish", created("abc"), first, alone) == [
        (3, "finish_reason", "stop_sequence", "cancelled")
    ]


def test_the_tokens_of_all_parts_count() -> None:
    *before, last = two_parts()
    assert isinstance(last, TokensGenerated)
    assert found_by("finish", *before, last) == []
    fewer = msgspec.structs.replace(last, parameters=generation(max_tokens=5, ignore_eos=True))
    assert found_by("finish", *before, fewer) == [(4, "len(content.tokens)", 3, 2)]


def test_a_constraint_looks_at_all_parts() -> None:
    asked = constrained(2)
    first = generated(3, "d", finish_reason="cancelled", **asked)
    second = generated(4, "e", resumes=1, finish_reason="constraint", **asked)
    assert found_by("finish", created("abc"), first, second) == []


# given a slide / when it is checked / then


def slid(text: str, dropped: int, after: Event | None = None, **config: Any) -> list[Any]:
    """What is wrong with a slide; a generation comes after it where nothing is given."""
    settings: dict[str, Any] = {"context_size": 6, "on_full": "slide"}
    first = created(text, **(settings | config))
    after = after or generated(len(text), "x", dropped=dropped)
    return [one[1:] for one in found_by("slide", first, ContextSlid(dropped=dropped), after)]


def test_a_full_state_slides_by_half_of_what_it_may_hold() -> None:
    assert slid("abcdef", 3) == []
    assert slid("abcdef", 2) == [("dropped", 2, 3)]
    assert slid("abcde", 3, context_size=5) == []
    assert slid("abcde", 2, context_size=5) == [("dropped", 2, 3)]


def test_a_state_that_stops_where_it_is_full_does_not_slide() -> None:
    assert slid("abcdef", 3, on_full="stop") == [("dropped", 3, 0)]


def test_a_state_with_room_slides_only_for_text_that_would_not_fit() -> None:
    assert slid("abcd", 3) == [("dropped", 3, "room for 2")]
    forwarded_after = [forwarded(4, "x" * count) for count in (2, 3)]
    little, much = (msgspec.structs.replace(one, dropped=3) for one in forwarded_after)
    assert slid("abcd", 3, little) == [("dropped", 3, "room for 2")]
    assert slid("abcd", 3, much) == []
    assert slid("abcd", 3, generated(4, "x", dropped=3)) == [("dropped", 3, "room for 2")]


@pytest.mark.parametrize("after", [(), (HeadRewound(to_position=1),), (StateDeleted(),)])
def test_a_slide_that_no_text_comes_after_is_found(after: tuple[Event, ...]) -> None:
    first = created("abcdef", context_size=6, on_full="slide")
    assert found_by("slide", first, ContextSlid(dropped=3), *after) == [
        (2, "dropped", 3, "nothing: no text came after it")
    ]


# given settings / when they are checked / then


def settings(**values: Any) -> list[Any]:
    """What is wrong with settings, of a state that begins with them and of one that gets them."""
    begun = found_by("config", created("abcd", **values))
    got = found_by("config", created("abcd"), ConfigChanged(changes=ConfigChanges(**values)))
    assert [one[1:] for one in begun] == [one[1:] for one in got]
    return [one[1:3] for one in begun]


def test_settings_are_such_that_a_state_of_the_model_can_have_them() -> None:
    assert settings(context_size=4, stop_token_ids=(127,)) == []
    assert settings(context_size=3) == [("config.context_size", 3)]
    assert settings(context_size=64) == []
    assert settings(context_size=65) == [("config.context_size", 65)]
    assert settings(stop_token_ids=(1, 128)) == [("config.stop_token_ids[1]", (1, 128))]
    assert settings(logit_bias={128: 1.0}) == [("config.logit_bias.128", {128: 1.0})]
    assert settings(bad_words_ids=((1, 128),)) == [("config.bad_words_ids[0][1]", ((1, 128),))]


def test_a_state_whose_context_is_too_small_does_not_slide() -> None:
    assert found_by("config", created("a", context_size=1, on_full="slide")) == [
        (1, "config.on_full", "slide", ANY)
    ]
    slides = ConfigChanged(changes=ConfigChanges(on_full="slide"))
    assert found_by("config", created("a", context_size=1), slides) == [
        (2, "config.on_full", "slide", ANY)
    ]


def test_a_forwarded_text_has_room() -> None:
    first = created("abc", context_size=5)
    assert found_by("room", first, forwarded(3, "de")) == []
    assert found_by("room", first, forwarded(3, "def")) == [
        (2, "len(content.tokens)", 3, "at most 2")
    ]


# given a generation / when what it kept is compared / then


@pytest.mark.parametrize(
    ("kind", "k", "text", "kept"),
    [
        ("none", 10, "a", None),
        ("top_k", 10, "a", ("top_k", 10)),
        ("full", 10, "a", ("full", 10)),
        ("full", 10, "", None),
    ],
)
def test_a_generation_keeps_the_logits_that_its_state_is_to_keep(
    kind: str, k: int, text: str, kept: tuple[str, int] | None
) -> None:
    first = created("abc", store_logits=kind, top_k_logits=k)
    for stored in [None, ("top_k", 10), ("top_k", 9), ("full", 10), ("full", 9)]:
        digest = {"kind": stored[0], "k": stored[1], "digest": "00" * 32} if stored else None
        event = generated(3, text, stored_logits=msgspec.convert(digest, StoredLogits | None))
        right = [] if stored == kept else [(2, "stored_logits", stored, kept)]
        assert found_by("storage", first, event) == right


def test_continuations_keep_the_logits_that_their_state_is_to_keep() -> None:
    story = Story(store_logits="full")
    story.multi(generation(), seed=1, count=2)
    first, event = story.events
    without = changed(event, ("stored_logits",), lambda _: None)
    assert found_by("storage", first, without) == [(2, "stored_logits", None, ("full", 2))]


def test_only_generations_keep_logits() -> None:
    assert found_by("storage", created("abc", store_logits="full"), forwarded(3)) == []


# given an event / when its text is compared / then


def searched() -> list[Event]:
    story = Story()
    story.search(beams())
    return story.events


def several() -> list[Event]:
    story = Story()
    story.multi(generation(ignore_eos=True), seed=1, count=2)
    return story.events


TEXTS: dict[str, tuple[list[Event], Path, str]] = {
    "a beginning": ([created("abc")], (), ""),
    "forwarded": ([created("abc"), forwarded(3, "def")], (), ""),
    "generated": ([created("abc"), generated(3, "def")], (), ""),
    "a continuation": (several(), ("continuations", 1), "continuations[1]."),
    "a beam": (searched(), ("beams", 1), "beams[1]."),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("text", "other", "content.text"),
        ("ends", [0, 0, 5], "content.text"),
        ("partial", {"1": "c3"}, "content.partial"),
    ],
)
def test_another_text_other_ends_and_other_bytes_are_found(
    name: str, field: str, value: Any, named: str
) -> None:
    (*before, event), path, prefix = TEXTS[name]
    assert found_by("text", *before, event) == []
    wrong = changed(event, (*path, "content", field), lambda _: value)
    ((version, found, *_),) = found_by("text", *before, wrong)
    assert (version, found) == (len(before) + 1, prefix + named)


def test_bytes_of_incomplete_characters_are_expected_since_the_schema_that_has_them() -> None:
    content = text_of((), [TokenId(65), TokenId(121)])
    assert content.partial == {1: "79"}
    bare = msgspec.structs.replace(content, partial={})
    event = msgspec.structs.replace(created("abc"), content=bare)
    full = msgspec.structs.replace(created("abc"), content=content)
    for schema, right, wrong_ in ((1, event, full), (2, full, event)):
        assert told(*occurrences([recorded(right, schema=schema)])) is None
        found = told(*occurrences([recorded(wrong_, schema=schema)]))
        assert found is not None
        assert found.field == "content.partial"


def test_events_without_text_have_nothing_to_compare() -> None:
    assert found_by("text", created("abc"), HeadRewound(to_position=1)) == []


# given a state that comes from others / when its origin is checked / then


LATER = Position(100)
"""Where in the log a state began that comes from others."""


def rows_of(story: Story, number: int = 0) -> list[Recorded]:
    return history(*story.events, state_id=state_id(number))


def course(rows: Sequence[Recorded]) -> Course:
    return reduce(Course.after, rows, BEGINNING)


def origin(
    created_: StateCreated, *parents: Sequence[Recorded], position: Position = LATER
) -> tuple[str, Any, Any] | None:
    courses = [course(rows) for rows in parents]
    found = consistency.compare_origin(recorded(created_, position=position), courses)
    return (found.field, found.expected, found.actual) if found else None


def at(story: Story, version: int) -> Live:
    state = fold(rows_of(story)[:version])
    assert isinstance(state, Live)
    return state


def parent() -> Story:
    """A state that has slid, was continued in several ways, and searched on."""
    story = Story("abc", context_size=6, on_full="slide")
    story.generate(generation(max_tokens=4, ignore_eos=True), seed=1)
    story.multi(generation(max_tokens=2, ignore_eos=True), seed=2, count=2)
    story.search(beams(max_tokens=2))
    assert story.state.dropped == 3
    return story


OPTIONS: dict[str, Any] = {
    "changes": ConfigChanges(on_full="stop"),
    "metadata": {},
    "model_context": 64,
}


def forked(story: Story, version: int, position: int | None = None) -> StateCreated:
    return fork(at(story, version), position=position, **OPTIONS)


def adopted(story: Story, version: int, index: int) -> StateCreated:
    return adopt(at(story, version), story.events[version - 1], index, **OPTIONS)


def field_of(created_: StateCreated, *parents: Sequence[Recorded]) -> str | None:
    found = origin(created_, *parents)
    return found[0] if found else None


def wrong(event: StateCreated, path: Path, value: Any) -> StateCreated:
    found = changed(event, path, lambda old: value(old) if callable(value) else value)
    assert isinstance(found, StateCreated)
    return found


def first_token(tokens: list[int]) -> list[int]:
    return [tokens[0] ^ 1, *tokens[1:]]


def test_a_state_of_its_own_has_no_origin_to_check() -> None:
    assert origin(created("abc")) is None
    assert origin(wrong(created("abc"), ("dropped",), 2)) == ("dropped", 2, 0)


def test_a_fork_begins_with_what_its_parent_held() -> None:
    story = parent()
    rows, event = rows_of(story)[:4], forked(story, 4)
    assert origin(event, rows) is None
    assert origin(forked(story, 4, 3), rows) is None
    assert event.dropped == 3
    for path, value, field in [
        (("content", "tokens"), first_token, "content.tokens"),
        (("content", "text"), "xyz", "content.text"),
        (("dropped",), 0, "dropped"),
        (("origin", "head_position"), 99, "origin.head_position"),
        (("origin", "head_position"), 2, "content.tokens"),
        (("origin", "version"), 99, "origin.version"),
    ]:
        assert field_of(wrong(event, path, value), rows) == field


def test_a_fork_of_a_version_that_is_not_there_or_of_another_is_found() -> None:
    story = parent()
    rows, event = rows_of(story), forked(story, 2)
    assert origin(event, rows[:2]) is None
    assert origin(event, rows[:1]) == ("origin.version", 2, 1)
    assert origin(event, []) == ("origin.version", 2, None)
    earlier = wrong(event, ("origin", "version"), 1)
    assert field_of(earlier, rows[:1]) == "content.tokens"


@pytest.mark.parametrize("version", [5, 6])
def test_a_fork_with_a_continuation_holds_its_parents_tokens_and_its_own(version: int) -> None:
    story = parent()
    rows, event = rows_of(story)[:version], adopted(story, version, 1)
    assert origin(event, rows) is None
    assert event.dropped == 3
    last = len(event.content.tokens) - 1
    cases: list[tuple[Path, Any, str]] = [
        (("content", "tokens", last), lambda old: old ^ 1, "content.tokens"),
        (("origin", "continuation", "index"), 0, "content.tokens"),
        (("origin", "continuation", "index"), 2, "origin.continuation.index"),
        (("origin", "continuation", "index"), -1, "origin.continuation.index"),
        (("origin", "continuation", "version"), 2, "origin.continuation.version"),
        (("origin", "head_position"), 2, "origin.head_position"),
        (("origin", "continuation"), None, "content.tokens"),
        (("dropped",), 0, "dropped"),
    ]
    for path, value, field in cases:
        assert field_of(wrong(event, path, value), rows) == field


def test_a_fork_with_a_continuation_of_an_event_that_has_none_is_found() -> None:
    story = parent()
    event = adopted(story, 5, 1)
    event = wrong(event, ("origin", "version"), 4)
    event = wrong(event, ("origin", "continuation", "version"), 4)
    found = origin(event, rows_of(story)[:4])
    assert found == ("origin.continuation.index", 1, "one of 0 continuations")


def merged() -> tuple[StateCreated, list[list[Recorded]]]:
    stories_ = [Story("abc", on_full="stop"), parent(), Story("abd")]
    stories_[0].forward("de")
    return merge_of([rows_of(story, number) for number, story in enumerate(stories_)])


def merge_of(parents: list[list[Recorded]]) -> tuple[StateCreated, list[list[Recorded]]]:
    states = [state for rows in parents if isinstance(state := fold(rows), Live)]
    tokens = concatenate([state.content.tokens for state in states])
    return merge(states, text_of((), tokens), **OPTIONS), parents


def test_a_merge_holds_what_its_parents_hold_in_common_then_their_own_parts() -> None:
    event, parents = merged()
    assert origin(event, *parents) is None
    assert event.dropped == 0
    last = len(event.content.tokens) - 1
    cases: list[tuple[Path, Any, str]] = [
        (("content", "tokens", last), lambda old: old ^ 1, "content.tokens"),
        (("origin", "parents"), lambda old: [old[1], old[0], old[2]], "origin.parents[0].version"),
        (("origin", "parents", 1, "version"), 99, "origin.parents[1].version"),
        (("origin", "parents", 2, "head_position"), 2, "origin.parents[2].head_position"),
        (("dropped",), 3, "dropped"),
    ]
    for path, value, field in cases:
        assert field_of(wrong(event, path, value), *parents) == field


def test_a_merge_of_parents_in_another_order_is_found() -> None:
    event, parents = merged()
    swapped = wrong(event, ("origin", "parents"), lambda old: [old[2], old[1], old[0]])
    assert field_of(swapped, *reversed(parents)) == "content.tokens"


def test_what_a_state_comes_from_was_there_before_it() -> None:
    story = parent()
    rows, event = rows_of(story)[:4], forked(story, 4)
    assert rows[-1].position == 4
    assert origin(event, rows, position=Position(5)) is None
    for position in (4, 1):
        found = origin(event, rows, position=Position(position))
        assert found == ("origin.version", 4, "recorded later, at position 4")
    event, parents = merged()
    latest = max(rows[-1].position for rows in parents)
    assert origin(event, *parents, position=Position(latest + 1)) is None
    found = origin(event, *parents, position=latest)
    assert found == ("origin.parents[1].version", latest, f"recorded later, at position {latest}")


def test_a_state_cannot_come_from_itself() -> None:
    event = wrong(
        created("abc"),
        ("origin",),
        {"kind": "fork", "state_id": state_id(), "version": 1, "head_position": 3},
    )
    itself = recorded(event)
    found = consistency.compare_origin(itself, [course([itself])])
    assert found is not None
    assert found.field == "origin.version"


@pytest.mark.parametrize("count", [0, 1, 2, 64, 65])
def test_a_merge_has_from_two_to_sixty_four_parents(count: int) -> None:
    event, parents = merge_of([rows_of(Story("abc"), number) for number in range(count or 1)])
    event = wrong(event, ("origin", "parents"), lambda old: old[:count])
    found = origin(event, *parents[:count])
    right = 2 <= count <= 64
    assert found == (None if right else ("len(origin.parents)", count, "from 2 to 64"))


def test_no_state_is_merged_with_itself() -> None:
    event, parents = merge_of([rows_of(Story("abc"), number) for number in (1, 2, 1)])
    assert origin(event, *parents) == (
        "origin.parents[2].state_id",
        state_id(1),
        "another state",
    )


@pytest.mark.parametrize(
    ("field", "value", "actual"),
    [
        ("model_id", "another", "cacher-tiny"),
        ("model_type", "sequence_classification", "causal_lm"),
        ("model_revision", "deadbeef", None),
    ],
)
def test_a_state_has_the_model_of_those_it_comes_from(field: str, value: str, actual: Any) -> None:
    story = parent()
    event = wrong(forked(story, 4), (field,), value)
    assert origin(event, rows_of(story)[:4]) == (field, value, actual)
    event, parents = merged()
    assert origin(wrong(event, (field,), value), *parents) == (field, value, actual)


def test_all_states_that_are_merged_have_one_model() -> None:
    event, (first, second, third) = merged()
    beginning = msgspec.structs.replace(created("abd"), model_id=ModelId("another"))
    assert origin(event, first, second, third) is None
    third = history(beginning, state_id=state_id(2))
    assert origin(event, first, second, third) == ("model_id", "cacher-tiny", "another")
