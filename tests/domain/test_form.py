"""Whether a model can be asked about an event at all."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given

from domain.content import NO_SCORES, Scores
from domain.events import BeamsGenerated, Event
from domain.form import compare_form
from tests.builders import created, forwarded, generated, history, recorded
from tests.domain.replaying import VOCABULARY, Path, Story, beams, changed, generation, stories

Found = tuple[str, Any, Any, int | None] | None


def form(event: Event, context_size: int = 6) -> Found:
    found = compare_form(recorded(event), vocabulary_size=128, context_size=context_size)
    if found is None:
        return None
    return (found.field, found.expected, found.actual, found.token_position)


@given(stories())
def test_what_happened_can_be_asked_about(story: Story) -> None:
    for one in history(*story.events):
        assert compare_form(one, vocabulary_size=VOCABULARY, context_size=40) is None


def several() -> Event:
    story = Story()
    story.multi(generation(max_tokens=2, ignore_eos=True), seed=1, count=3)
    return story.events[-1]


def searched() -> Event:
    story = Story()
    story.search(beams(num_beams=4))
    event = story.events[-1]
    assert isinstance(event, BeamsGenerated)
    assert len(event.steps) == 3
    return event


def test_what_a_classifier_was_given_has_no_scores() -> None:
    given = forwarded(3, "abc")
    bare = msgspec.structs.replace(given, scores=NO_SCORES)
    for event in (created("abc"), bare):
        assert compare_form(recorded(event), 128, 64, scored=False) is None
    found = compare_form(recorded(given), 128, 64, scored=False)
    assert found is not None
    assert (found.field, found.expected, found.actual) == ("len(scores.logprobs)", 3, 0)
    assert form(bare) == ("len(scores.logprobs)", 0, 3, None)


RUNS: dict[str, tuple[Callable[[], Event], Path, str, int]] = {
    "a beginning": (lambda: created("abc"), (), "", 0),
    "forwarded": (lambda: forwarded(3, "abc"), (), "", 3),
    "generated": (lambda: generated(3, "abc"), (), "", 3),
    "a continuation": (several, ("continuations", 1), "continuations[1].", 3),
    "a beam": (searched, ("beams", 1), "beams[1].", 3),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("token", [-1, 128, 10**6])
def test_a_token_outside_the_vocabulary_is_named(name: str, token: int) -> None:
    make, path, prefix, start = RUNS[name]
    event = changed(make(), (*path, "content", "tokens", 1), lambda _: token)
    field, at = f"{prefix}content.tokens", start + 1
    assert form(event, 64) == (field, token, "a token from 0 to 127", at)


@pytest.mark.parametrize(
    ("event", "field", "count", "room"),
    [
        (created("abcdefg"), "len(content.tokens)", 7, 6),
        (forwarded(4, "abc"), "len(content.tokens)", 3, 2),
        (generated(7, "a"), "len(content.tokens)", 1, -1),
        (several(), "len(continuations[0].content.tokens)", 2, 1),
        (searched(), "len(beams[0].content.tokens)", 4, 1),
    ],
)
def test_more_tokens_than_the_context_holds_are_named(
    event: Event, field: str, count: int, room: int
) -> None:
    assert form(event, getattr(event, "start", 0) + room) == (field, count, f"at most {room}", None)


def test_tokens_that_were_let_go_of_take_no_room() -> None:
    assert form(generated(7, "abc", dropped=4)) is None
    assert form(generated(7, "abcd", dropped=4)) is not None


OF_EVERY_TOKEN = ["content.ends", *(f"scores.{field}" for field in Scores.__struct_fields__)]
OF_DRAWN_TOKENS = [*OF_EVERY_TOKEN, "sampling_probabilities", "alternatives"]
LISTS = {
    "a beginning": OF_EVERY_TOKEN[:1],
    "forwarded": OF_EVERY_TOKEN,
    "generated": OF_DRAWN_TOKENS,
    "a continuation": OF_DRAWN_TOKENS,
    "a beam": OF_EVERY_TOKEN,
}


@pytest.mark.parametrize(("name", "field"), [(n, field) for n in LISTS for field in LISTS[n]])
def test_every_list_has_one_value_for_each_token(name: str, field: str) -> None:
    make, path, prefix, _ = RUNS[name]
    event = make()
    assert form(event, 64) is None
    found = form(changed(event, (*path, *field.split(".")), lambda old: [*old, old[0]]), 64)
    assert found is not None
    assert found[0] == f"len({prefix}{field})"
    assert found[1] == found[2] + 1


def test_every_list_of_a_generation_is_one_of_these() -> None:
    event: Any = generated(3, "abc")
    lists = {name for name in event.__struct_fields__ if isinstance(getattr(event, name), tuple)}
    lists |= {f"scores.{field}" for field in Scores.__struct_fields__}
    assert lists | {"content.ends"} == set(OF_DRAWN_TOKENS)


# given parameters that name tokens


@pytest.mark.parametrize("make", [lambda: generated(3, "abc"), several, searched])
@pytest.mark.parametrize(
    ("name", "value", "token"),
    [
        ("logit_bias", {"5": 1.0, "128": 1.0}, 128),
        ("bad_words_ids", [[5], [6, 10**6]], 10**6),
    ],
)
def test_a_token_that_a_parameter_names_is_in_the_vocabulary(
    make: Callable[[], Event], name: str, value: Any, token: int
) -> None:
    event = make()
    inner = "logits" if isinstance(event, BeamsGenerated) else "sampling"
    found = form(changed(event, ("parameters", inner, name), lambda _: value), 64)
    assert found is not None
    assert (found[0], found[1], found[3]) == (f"parameters.{inner}.{name}", token, None)


def test_a_stop_token_is_in_the_vocabulary() -> None:
    for make in (lambda: generated(3, "abc"), several, searched):
        event = changed(make(), ("parameters", "stop_token_ids"), lambda _: [5, 128])
        assert form(event, 64) == ("parameters.stop_token_ids", 128, "a token from 0 to 127", None)


# given an event without results

EMPTY: dict[str, tuple[Callable[[], Event], str]] = {
    "a beginning": (lambda: created(""), "len(content.tokens)"),
    "forwarded": (lambda: forwarded(3, ""), "len(content.tokens)"),
    "continuations": (
        lambda: changed(several(), ("continuations",), cleared),
        "len(continuations)",
    ),
    "beams": (lambda: changed(searched(), ("beams",), cleared), "len(beams)"),
    "a beam": (lambda: changed(searched(), ("beams", 1), cleared), "len(beams[1].content.tokens)"),
}


def cleared(value: Any) -> Any:
    """A value without anything in its lists and texts."""
    match value:
        case dict():
            return {name: cleared(inner) for name, inner in value.items()}
        case list() | str():
            return type(value)()
        case _:
            return value


@pytest.mark.parametrize("name", EMPTY)
def test_what_is_never_recorded_without_a_result_has_one(name: str) -> None:
    make, field = EMPTY[name]
    assert form(make(), 64) == (field, 0, "at least 1", None)


def test_a_generation_may_have_drawn_nothing() -> None:
    assert form(generated(3, ""), 64) is None
    assert form(changed(several(), ("continuations", 1), cleared), 64) is None


# given a beam search

STEPS: dict[str, tuple[Path, Any, str, int | None]] = {
    "a token outside the vocabulary": (("tokens", 2), 128, "steps[1].tokens", 4),
    "a beam that did not run": (("parents", 2), 4, "steps[1].parents", 4),
    "a beam before the first": (("parents", 0), -1, "steps[1].parents", 4),
    "fewer parents than tokens": (("parents",), [0], "len(steps[1].parents)", None),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_beam_of_a_step_goes_on_from_one_of_the_step_before(name: str) -> None:
    path, value, field, at = STEPS[name]
    found = form(changed(searched(), ("steps", 1, *path), lambda _: value), 64)
    assert found is not None
    assert (found[0], found[3]) == (field, at)


def test_the_first_step_goes_on_from_the_text_alone() -> None:
    found = form(changed(searched(), ("steps", 0, "parents", 1), lambda _: 1), 64)
    assert found is not None
    assert found[:3] == ("steps[0].parents", 1, "a beam from 0 to 0")


def one_token(run: Any) -> Any:
    """A run cut to its first token."""
    match run:
        case dict():
            return {name: one_token(value) for name, value in run.items()}
        case list():
            return run[:1]
        case _:
            return run


def test_more_steps_than_the_context_holds_are_named() -> None:
    event = changed(searched(), ("beams",), lambda beams: beams[:1])
    event = changed(event, ("beams", 0), one_token)
    assert form(event, 7) is None
    assert form(event, 6) == ("len(steps)", 3, "at most 2", None)


def test_beams_fit_their_groups() -> None:
    event = changed(searched(), ("parameters", "num_beam_groups"), lambda _: 3)
    assert form(event, 64) == ("parameters.num_beam_groups", 3, "a divisor of 4", None)
