"""A history held against its re-execution: an honest one passes, any change of it is named."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from domain import compare
from domain.beams import ends_of
from domain.config import Constraint
from domain.content import Scores, StoredLogits
from domain.events import (
    BeamsGenerated,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    Event,
    Recorded,
    TextForwarded,
    TokensGenerated,
)
from domain.fingerprint import Fingerprint
from domain.ids import Position, TokenId, Version
from domain.replay import Run, occurrences, passages, place_of, runs_of
from domain.report import Divergence, Drift, divergence
from domain.work import Scored
from tests.builders import created, generated, history, recorded, state_id
from tests.domain.replaying import (
    EOS,
    Path,
    Story,
    beams,
    changed,
    divergences,
    execute,
    generation,
    other,
    stories,
    the_first,
)

# given a history / when it is executed again / then


@given(stories())
def test_an_honest_history_is_as_recorded(story: Story) -> None:
    assert divergences(story.events) == []


Where = tuple[int, str, Run, int]
"""Index of an event, name and run of a claim in it, and index of a token of the run."""


def tokens_of(events: Sequence[Event], *kinds: type[Any]) -> list[Where]:
    """Every claimed token of the runs of some kinds."""
    return [
        (place, name, run, index)
        for place, event in enumerate(events)
        for name, run in runs_of(recorded(event))
        if isinstance(run, kinds)
        for index in range(len(run.content.tokens))
    ]


def path_of(name: str, field: str, index: int) -> Path:
    """Where a value of a run is in its event: ``name`` is like ``continuations[3].``."""
    outer: Path = ()
    if name:
        kind, _, number = name.removesuffix("].").partition("[")
        outer = (kind, int(number))
    return (*outer, *field.split("."), index)


def start(events: Sequence[Event], place: int) -> int:
    begin: int = getattr(events[place], "start", 0)
    return begin


EVERY_RUN = (TextForwarded, TokensGenerated, Continuation)
DRAWN = (TokensGenerated, Continuation)
DRAWING = ("generate", "multi")


@given(
    story=stories("forward", *DRAWING),
    data=st.data(),
    score=st.sampled_from(Scores.__struct_fields__),
)
def test_any_changed_score_is_named_with_its_place(
    story: Story, data: st.DataObject, score: str
) -> None:
    events = story.events
    assume(where := tokens_of(events, *EVERY_RUN))
    place, name, _, index = data.draw(st.sampled_from(where))
    field = f"scores.{score}"
    events[place] = changed(events[place], path_of(name, field, index), other)
    assert the_first(events) == (place + 1, name + field, start(events, place) + index)
    assert len(divergences(events)) == 1


@given(story=stories(*DRAWING), data=st.data())
def test_a_changed_drawn_token_is_named_as_the_token(story: Story, data: st.DataObject) -> None:
    events = story.events
    assume(where := tokens_of(events, *DRAWN))
    place, name, _, index = data.draw(st.sampled_from(where))
    events[place] = changed(events[place], path_of(name, "content.tokens", index), other)
    at = start(events, place) + index
    assert the_first(events) == (place + 1, f"{name}content.tokens", at)


@given(story=stories(*DRAWING), data=st.data())
def test_of_a_changed_logprob_and_a_changed_token_after_it_the_first_is_named(
    story: Story, data: st.DataObject
) -> None:
    events = story.events
    assume(where := [one for one in tokens_of(events, *DRAWN) if one[3] > 0])
    place, name, _, index = data.draw(st.sampled_from(where))
    token, logprob = (
        path_of(name, "content.tokens", index),
        path_of(name, "scores.logprobs", index - 1),
    )
    events[place] = changed(changed(events[place], token, other), logprob, other)
    at = start(events, place) + index - 1
    assert the_first(events) == (place + 1, f"{name}scores.logprobs", at)


@given(story=stories("forward"), data=st.data())
def test_a_changed_forwarded_token_is_found_in_its_logprob(
    story: Story, data: st.DataObject
) -> None:
    events = story.events
    assume(where := tokens_of(events, TextForwarded))
    place, _, _, index = data.draw(st.sampled_from(where))
    events[place] = changed(events[place], ("content", "tokens", index), other)
    assert the_first(events) == (place + 1, "scores.logprobs", start(events, place) + index)


@given(story=stories("forward", *DRAWING), index=st.integers(0, 2))
def test_a_changed_token_of_the_beginning_is_found_in_the_first_claim_after_it(
    story: Story, index: int
) -> None:
    events = story.events
    rows = history(*events)
    first = next((r for r in rows if any(run.content.tokens for _, run in runs_of(r))), None)
    assume(first is not None)
    assert first is not None
    assume(place_of(first) > index and getattr(first.event, "dropped", 0) == 0)
    events[0] = changed(events[0], ("content", "tokens", index), other)
    assert divergences(events)[0].version == first.version


@given(story=stories(*DRAWING), data=st.data(), seed=st.integers(100, 199))
def test_a_changed_seed_is_found(story: Story, data: st.DataObject, seed: int) -> None:
    events = story.events
    assume(where := tokens_of(events, *DRAWN))
    place, *_ = data.draw(st.sampled_from(where))
    events[place] = msgspec.structs.replace(events[place], seed=seed)
    version, field, _ = the_first(events)
    assert version == place + 1
    assert field.rpartition("].")[2] in ("content.tokens", "sampling_probabilities")


@pytest.mark.parametrize("field", ["sampling_probabilities", "alternatives"])
@given(story=stories(*DRAWING), data=st.data())
def test_what_is_recorded_of_a_draw_is_compared(
    field: str, story: Story, data: st.DataObject
) -> None:
    events = story.events
    assume(where := tokens_of(events, *DRAWN))
    place, name, _, index = data.draw(st.sampled_from(where))
    events[place] = changed(events[place], path_of(name, field, index), other)
    assert the_first(events) == (place + 1, name + field, start(events, place) + index)


# given one generation / when something of it is not as recorded / then


def one_generation(**fields: Any) -> list[Event]:
    story = Story()
    story.generate(generation(max_tokens=3), seed=5)
    return [story.events[0], msgspec.structs.replace(story.events[1], **fields)]


def test_a_divergence_says_what_was_recorded_and_what_came_out() -> None:
    events = one_generation()
    assert isinstance(events[1], TokensGenerated)
    actual = events[1].sampling_probabilities[0]
    assert divergences(one_generation(sampling_probabilities=(0.5, 0.25, 0.125))) == [
        Divergence(
            position=Position(2),
            state_id=state_id(),
            version=Version(2),
            field="sampling_probabilities",
            expected=0.5,
            actual=actual,
            token_position=Position(3),
        )
    ]


def test_another_digest_of_the_stored_logits_is_named() -> None:
    stored = StoredLogits(kind="top_k", k=2, digest="00" * 32)
    found = divergences(one_generation(stored_logits=stored))
    assert [(one.field, one.expected) for one in found] == [("stored_logits.digest", "00" * 32)]


def test_values_that_are_missing_are_named_by_their_number() -> None:
    (_, event) = one_generation()
    assert isinstance(event, TokensGenerated)
    short = msgspec.structs.replace(event.scores, entropies=event.scores.entropies[:2])
    found = divergences(one_generation(scores=short))
    assert [(one.field, one.expected, one.actual) for one in found] == [
        ("len(scores.entropies)", 2, 3)
    ]
    assert divergences(one_generation(alternatives=()))[0].field == "len(alternatives)"


PENALTIES: dict[str, Any] = {
    "logit_bias": {"7": 1.5},
    "repetition_penalty": 1.25,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "bad_words_ids": [[1, 2]],
    "min_p": 0.25,
    "typical_p": 0.5,
}


@pytest.mark.parametrize("name", PENALTIES)
def test_every_parameter_of_sampling_counts(name: str) -> None:
    (first, event) = one_generation()
    path = ("parameters", "sampling", name)
    assert the_first([first, changed(event, path, lambda _: PENALTIES[name])])[:2] == (
        2,
        "content.tokens",
    )


def one_constrained(kind: str) -> Story:
    story = Story()
    asked = generation(max_tokens=6, constraint=Constraint(kind="regex", text="5"))
    if kind == "token":
        story.generate(asked, seed=5)
    else:
        story.multi(asked, seed=5, count=2)
    return story


@pytest.mark.parametrize("kind", ["token", "multi"])
def test_another_constraint_would_have_drawn_other_tokens(kind: str) -> None:
    first, event = one_constrained(kind).events
    path = ("parameters", "constraint", "text")
    version, field, at = the_first([first, changed(event, path, lambda _: "4")])
    assert (version, field.rpartition("].")[2], at) == (2, "content.tokens", 3)


def test_what_a_call_drew_before_counts_where_it_is_constrained() -> None:
    story = Story("abc", context_size=6, on_full="slide")
    constraint = Constraint(kind="regex", text="9")
    story.generate(generation(max_tokens=5, constraint=constraint, ignore_eos=True), seed=5)
    assert isinstance(story.events[-1], TokensGenerated)
    assert story.events[-1].resumes == 3
    story.events[-1] = msgspec.structs.replace(story.events[-1], resumes=0)
    assert the_first(story.events) == (4, "content.tokens", 6)


# given continuations / when something of them is not as recorded / then


def continuations(**config: Any) -> list[Event]:
    story = Story(**config)
    story.multi(generation(), seed=5, count=3)
    return story.events


def test_continuations_that_changed_places_are_found() -> None:
    first, event = continuations()
    assert isinstance(event, ContinuationsGenerated)
    one, *others = event.continuations
    swapped = msgspec.structs.replace(event, continuations=(*others, one))
    assert the_first([first, swapped]) == (2, "continuations[0].content.tokens", 3)


def test_the_digest_of_stored_logits_is_over_all_continuations_in_order() -> None:
    first, event = continuations()
    assert divergences([first, event]) == []
    path = ("stored_logits", "digest")
    (found,) = divergences([first, changed(event, path, lambda _: "00" * 32)])
    assert found.field == "stored_logits.digest"
    assert isinstance(event, ContinuationsGenerated)
    fewer = msgspec.structs.replace(event, continuations=event.continuations[:2])
    assert divergences([first, fewer])[0].field == "stored_logits.digest"


# given a slide / when it is not as recorded / then


def test_a_slide_that_dropped_another_number_is_found_in_what_came_after_it() -> None:
    story = Story("abc", context_size=6, on_full="slide")
    story.generate(generation(max_tokens=5, ignore_eos=True), seed=5)
    _, _, slid, last = story.events
    assert slid == ContextSlid(dropped=3)
    story.events[2] = ContextSlid(dropped=2)
    story.events[3] = msgspec.structs.replace(last, dropped=2)
    assert the_first(story.events)[0] == 4


# given a beam search / when something of it is not as recorded / then

SEARCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.25},
    "one beam": {"num_beams": 1, "num_return": 1},
    "to the end": {"early_stopping": "never", "length_penalty": 2.0},
    "one step": {"max_tokens": 1},
}


def a_search(name: str = "plain") -> list[Event]:
    story = Story()
    story.forward("de")
    story.search(beams(**SEARCHES[name]))
    return story.events


@pytest.mark.parametrize("name", SEARCHES)
def test_an_honest_search_is_as_recorded(name: str) -> None:
    assert divergences(a_search(name)) == []


def in_search(events: list[Event], path: Path, make: Any = other) -> tuple[Any, ...]:
    return the_first([*events[:-1], changed(events[-1], path, make)])


@pytest.mark.parametrize("name", ["plain", "groups", "to the end"])
@given(data=st.data())
def test_the_first_step_that_differs_is_named(name: str, data: st.DataObject) -> None:
    events = a_search(name)
    assert isinstance(events[-1], BeamsGenerated)
    steps = events[-1].steps
    assert len(steps) > 2
    index = data.draw(st.integers(1, len(steps) - 1))
    beam, before = data.draw(st.integers(0, len(steps[index].tokens) - 1)), len(steps[0].tokens)
    token = in_search(events, ("steps", index, "tokens", beam))
    assert token == (3, f"steps[{index}].tokens", 5 + index)
    parent = in_search(events, ("steps", index, "parents", beam), lambda old: (old + 1) % before)
    assert parent == (3, f"steps[{index}].parents", 5 + index)


def test_a_step_that_is_missing_or_too_many_is_named() -> None:
    events = a_search()
    assert isinstance(events[-1], BeamsGenerated)
    count = len(events[-1].steps)
    fewer = in_search(events, ("steps",), lambda steps: steps[:-1])
    assert fewer == (3, f"steps[{count - 1}]", 5 + count - 1)
    more = in_search(events, ("steps",), lambda steps: [*steps, steps[0]])
    assert more == (3, f"steps[{count}]", 5 + count)


@pytest.mark.parametrize("name", SEARCHES)
@given(data=st.data())
def test_a_changed_token_of_a_beam_is_named(name: str, data: st.DataObject) -> None:
    events = a_search(name)
    assert isinstance(events[-1], BeamsGenerated)
    beam = data.draw(st.integers(0, len(events[-1].beams) - 1))
    tokens = events[-1].beams[beam].content.tokens
    index = data.draw(st.integers(0, len(tokens) - 1))
    found = in_search(events, ("beams", beam, "content", "tokens", index))
    assert found == (3, f"beams[{beam}].content.tokens", 5 + index)


@pytest.mark.parametrize("field", ["score", "finished"])
def test_a_changed_score_or_end_of_a_beam_is_named(field: str) -> None:
    assert in_search(a_search(), ("beams", 1, field)) == (3, f"beams[1].{field}", None)


@pytest.mark.parametrize("field", Scores.__struct_fields__)
def test_the_scores_of_a_beam_are_those_of_its_rows(field: str) -> None:
    found = in_search(a_search(), ("beams", 1, "scores", field, 2))
    assert found == (3, f"beams[1].scores.{field}", 7)


def test_beams_in_another_order_are_found() -> None:
    found = in_search(a_search(), ("beams",), lambda found: found[::-1])
    assert found[:2] == (3, "beams[0].content.tokens")


def test_a_beam_that_is_missing_is_found() -> None:
    assert in_search(a_search(), ("beams",), lambda found: found[1:]) == (3, "len(beams)", None)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("num_beams",), 2),
        (("max_tokens",), 3),
        (("length_penalty",), 0.5),
        (("logits", "repetition_penalty"), 1.5),
        (("no_repeat_ngram_size",), 2),
        (("num_return",), 1),
        (("stop_token_ids",), [0, 1]),
    ],
)
def test_a_changed_parameter_of_a_search_is_found(path: Path, value: Any) -> None:
    assert in_search(a_search(), ("parameters", *path), lambda _: value)[0] == 3


def test_the_ends_of_a_search_are_eos_and_its_stop_tokens() -> None:
    asked = beams(stop_token_ids=(TokenId(7),))
    assert ends_of(asked, EOS) == {0, 7}
    assert ends_of(beams(ignore_eos=True), EOS) == set()


# given a divergence / what comes before the token that it names


def test_the_text_before_a_token_is_what_was_held_and_what_its_run_had_before_it() -> None:
    held = (TokenId(97), TokenId(98), TokenId(99))
    beginning = recorded(created("abc"))
    assert before(beginning, "content.tokens", 2, ()) == held[:2]
    drawn = recorded(generated(3, "de"))
    assert before(drawn, "scores.logprobs", 4, held) == (*held, TokenId(100))
    assert before(drawn, "content.text", None, held) is None
    several = recorded(continuations()[-1])
    assert isinstance(several.event, ContinuationsGenerated)
    tokens = several.event.continuations[1].content.tokens
    assert before(several, "continuations[1].scores.ranks", 5, held) == held + tokens[:2]
    searched = recorded(a_search()[-1])
    assert before(searched, "steps[1].tokens", 4, held) is None
    assert isinstance(searched.event, BeamsGenerated)
    tokens = searched.event.beams[0].content.tokens
    token = searched.event.start + 1
    assert before(searched, "beams[0].content.tokens", token, held) == held + tokens[:1]


def before(
    one: Recorded, field: str, token: int | None, held: tuple[TokenId, ...]
) -> tuple[TokenId, ...] | None:
    index = None if token is None else token - getattr(one.event, "start", 0)
    return compare.text_before(divergence(one, field, 1, 2, index), one, held)


# given a history of another machine / when it is executed here / then


def moved(scored: Scored, index: int, by: float, **fields: Any) -> Scored:
    """What another machine might have found: one logprob is another."""
    logprobs = list(scored.scores.logprobs)
    logprobs[index] += by
    scores = msgspec.structs.replace(scored.scores, logprobs=tuple(logprobs))
    return msgspec.structs.replace(scored, scores=scores, **fields)


def drifts(events: Sequence[Event], change: Any, **columns: Any) -> list[Drift]:
    """The drift of every event, where ``change`` is what the other machine finds."""
    rows = history(*events, **columns)
    asked = passages(occurrences(rows))
    results = [(p, change(i, execute(p.request()))) for i, p in enumerate(asked)]
    evidence = compare.by_event(results)
    return [
        compare.drift(one.recorded, evidence[one.recorded.position], EOS, {"torch": ("1", "2")})
        for one in occurrences(rows)
        if one.recorded.position in evidence
    ]


def test_the_drift_is_the_largest_change_of_a_logprob_and_the_first_changed_token() -> None:
    story = Story()
    story.forward("d")
    story.generate(generation(max_tokens=3), seed=5)

    def there(_: int, here: Scored) -> Scored:
        first, second, *rest = here.redrawn
        drawn = (first, msgspec.structs.replace(second, token_id=TokenId(600)), *rest)
        found = moved(here, 0, 2.0**20, redrawn=drawn)
        return moved(moved(found, 2, -(2.0**10)), 3, 2.0**4)

    forwarded, drawn = drifts(story.events, there, fingerprint="ab" * 32)
    assert drawn == Drift(
        position=Position(3),
        state_id=state_id(),
        version=Version(3),
        recorded_fingerprint="ab" * 32,
        max_logprob_delta=2.0**10,
        first_changed=5,
        differences={"torch": ("1", "2")},
    )
    assert (forwarded.max_logprob_delta, forwarded.first_changed) == (2.0**20, None)


def test_the_drift_of_continuations_is_that_of_all_of_them() -> None:
    def there(index: int, here: Scored) -> Scored:
        drawn = list(here.redrawn)
        drawn[3 - index] = msgspec.structs.replace(drawn[3 - index], token_id=TokenId(600))
        return moved(here, 0, 2.0**index, redrawn=tuple(drawn))

    (drift,) = drifts(continuations(), there)
    assert (drift.max_logprob_delta, drift.first_changed) == (4.0, 3 + 1)


def test_the_drift_of_beams_is_that_of_their_logprobs_and_of_the_first_other_choice() -> None:
    def there(index: int, here: Scored) -> Scored:
        return moved(here, 0, 2.0**30) if index == 1 else here

    def chooses(index: int, here: Scored) -> Scored:
        rows = list(here.candidates)
        for place in range(max(0, len(rows) - 2), len(rows)):
            rows[place] = rows[place][:0]
        return msgspec.structs.replace(here, candidates=tuple(rows))

    story = Story()
    story.search(beams())
    (drift,) = drifts(story.events, there)
    assert (drift.max_logprob_delta, drift.first_changed) == (2.0**30, None)
    (drift,) = drifts(story.events, chooses)
    assert (drift.max_logprob_delta, drift.first_changed) == (0.0, 3 + 2)


@given(stories())
def test_there_is_no_drift_between_equal_results(story: Story) -> None:
    for drift in drifts(story.events, lambda _, here: here):
        assert (drift.max_logprob_delta, drift.first_changed) == (0.0, None)


def test_the_differences_of_two_fingerprints_are_named() -> None:
    old = Fingerprint.of({"torch": "1", "dtype": "float32", "gone": 1, "deterministic": True})
    new = Fingerprint.of({"torch": "2", "dtype": "float32", "came": 2, "deterministic": True})
    assert compare.differences(old, new) == {
        "came": (None, 2),
        "gone": (1, None),
        "torch": ("1", "2"),
    }
    assert compare.differences(old, old) == {}
