"""A history replayed: what is asked of it, what of each place is held against what, how it sums up.

The oracle of :mod:`tests.domain.replaying` stands in place of a model.
"""

import math
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.events import TokensGenerated
from domain.ids import Position, TokenId, Version
from domain.regress import (
    AROUND,
    STRIPS,
    Limits,
    Place,
    Summary,
    Tally,
    failures,
    likeliest,
    merged,
    worst,
)
from domain.replay import Passage, claims_of, occurrences, passages
from domain.teacher_forcing import before_in_log, before_next_time, places, request
from domain.work import Comparison, Scored, ScoreRequest
from tests.builders import history
from tests.domain.replaying import Story, draw, execute, generation, noise, stories

# what is asked


def asked(story: Story) -> list[Passage]:
    found = passages(occurrences(history(*story.events)))
    return [passage for passage in found if passage.claims]


def answer(request: ScoreRequest) -> Scored:
    """What the oracle says; of each place it compares, it says when it was asked."""
    count = len(request.tokens) - request.start
    comparisons = tuple(
        Comparison(
            kl=float(index), exact=index % 2 == 0, greedy=(TokenId(index), TokenId(index + 1))
        )
        for index in range(len(request.references))
    )
    rows = tuple(
        b"%d" % noise(request.tokens[:place])
        for place in range(request.start, request.start + count)
    )
    return msgspec.structs.replace(execute(request), comparisons=comparisons, rows=rows)


@given(stories())
def test_every_token_that_an_event_tells_of_is_one_place(story: Story) -> None:
    told = [
        (claim.recorded.version, claim.name, token)
        for occurrence in occurrences(history(*story.events))
        for claim in claims_of(occurrence)
        for token in claim.tokens
    ]
    before = [one for passage in asked(story) for one in before_in_log(passage, {})]
    assert len({one.place for one in before}) == len(before)
    found = [(one.version, one.run, one.reference.token_id) for one in before]
    assert sorted(found) == sorted(told)


@given(stories())
def test_a_model_is_asked_about_each_place_with_what_the_log_says_of_it(story: Story) -> None:
    for passage in asked(story):
        before = before_in_log(passage, {})
        wanted = request(passage, before, keep_k=3)
        assert (wanted.tokens, wanted.start) == (passage.tokens, passage.start)
        tokens = tuple(one.token_id for one in wanted.references)
        assert tokens == passage.tokens[passage.start :]
        scores = execute(wanted).scores
        assert tuple(one.logprob for one in wanted.references) == scores.logprobs
        assert tuple(one.logsumexp for one in wanted.references) == scores.logsumexps
        assert tuple(one.rank for one in wanted.references) == scores.ranks
        assert (wanted.candidates, wanted.keep, wanted.keep_k) == (None, "top_k", 3)
        drawn = {
            place: one.drawing for one in wanted.redraws for place in range(one.start, one.stop)
        }
        for place, one in enumerate(before, start=passage.start):
            assert (one.sampled is not None) == (place in drawn)
            if one.sampled is not None:
                assert one.sampled == draw(passage.tokens[:place], drawn[place]).token_id
                assert drawn[place].store_logits == "none"


@given(stories())
def test_of_an_unchanged_oracle_every_draw_and_every_logprob_is_the_same(story: Story) -> None:
    for passage in asked(story):
        before = before_in_log(passage, {})
        found = places(passage, before, answer(request(passage, before)))
        assert [place.kl for place in found] == list(range(len(before)))
        for one, place in zip(before, found, strict=True):
            assert (place.version, place.run, place.token_position, place.token_id) == one.place
            assert place.logprobs[0] == place.logprobs[1]
            assert place.sampled == (None if one.sampled is None else (one.sampled, one.sampled))
        texts = [claim.run.content.text for claim in passage.claims]
        assert "".join(place.text for place in found) == "".join(texts)


@given(stories())
def test_what_is_kept_for_the_next_time_names_the_same_places(story: Story) -> None:
    for passage in asked(story):
        before = before_in_log(passage, {})
        scored = answer(request(passage, before))
        later = before_next_time(passage, scored, before, "raw")
        assert [one.place for one in later] == [one.place for one in before]
        assert [one.sampled for one in later] == [one.sampled for one in before]
        assert tuple(one.reference.row for one in later) == scored.rows
        assert {one.reference.kind for one in later} == {"raw"}


def story_with_logits(kind: str) -> Story:
    story = Story("abc", store_logits=kind)
    story.forward("de")
    story.generate(generation(max_tokens=5), seed=3)
    story.multi(generation(max_tokens=3), seed=4, count=3)
    return story


@pytest.mark.parametrize("kind", ["top_k", "full"])
def test_each_drawn_token_has_the_row_of_logits_that_was_kept_of_it(kind: str) -> None:
    story = story_with_logits(kind)
    rows = history(*story.events)
    held = {
        claim.name: passage.tokens[: claim.place]
        for passage in asked(story)
        for claim in passage.claims
        if claim.drawing
    }
    logits: dict[Position, list[bytes]] = {}
    for occurrence in occurrences(rows):
        for claim in claims_of(occurrence):
            if claim.drawing is not None:
                blobs = logits.setdefault(claim.recorded.position, [])
                blobs += [
                    b"%d" % noise(held[claim.name] + claim.tokens[:index])
                    for index in range(len(claim.tokens))
                ]
    before = [one for passage in asked(story) for one in before_in_log(passage, logits)]
    drawn = [one for one in before if one.sampled is not None]
    assert len(drawn) > 8
    for one in drawn:
        start = next(r.event.start for r in rows if r.version == one.version)  # type: ignore[union-attr]
        run = [b for b in drawn if (b.version, b.run) == (one.version, one.run)]
        tokens = held[one.run] + tuple(b.reference.token_id for b in run)
        assert one.reference.kind == kind
        place = len(held[one.run]) + one.token_position - start
        assert one.reference.row == b"%d" % noise(tokens[:place])
    assert {one.reference.row for one in before if one.sampled is None} == {None}


def test_logits_that_were_let_go_of_are_not_missed() -> None:
    story = story_with_logits("top_k")
    before = [one for passage in asked(story) for one in before_in_log(passage, {})]
    assert {(one.reference.kind, one.reference.row) for one in before} == {(None, None)}


def test_a_choice_that_changed_is_told_with_both_tokens() -> None:
    story = Story("abc")
    story.generate(generation(max_tokens=4), seed=3)
    event = story.events[-1]
    assert isinstance(event, TokensGenerated)
    (passage,) = asked(story)
    before = before_in_log(passage, {})
    scored = answer(request(passage, before))
    redrawn = list(scored.redrawn)
    redrawn[2] = msgspec.structs.replace(redrawn[2], token_id=TokenId(99))
    found = places(passage, before, msgspec.structs.replace(scored, redrawn=tuple(redrawn)))
    told = event.content.tokens
    assert [place.sampled for place in found] == [
        (told[0], told[0]),
        (told[1], told[1]),
        (told[2], 99),
        (told[3], told[3]),
    ]


# summaries


def a_place(**fields: Any) -> Place:
    given: dict[str, Any] = {
        "position": Position(1),
        "version": Version(1),
        "run": "",
        "token_position": 0,
        "token_id": TokenId(5),
        "text": "a",
        "sampled": (5, 5),
        "greedy": (5, 5),
        "logprobs": (-1.0, -1.0),
        "kl": 0.0,
        "kl_exact": True,
    }
    return Place(**(given | fields))


choices = st.sampled_from([TokenId(1), TokenId(2)])
some_places = st.builds(
    a_place,
    position=st.integers(1, 4),
    token_position=st.integers(0, 9),
    sampled=st.none() | st.tuples(choices, choices),
    greedy=st.tuples(st.none() | choices, choices),
    logprobs=st.tuples(st.floats(-9, 0), st.floats(-9, 0)),
    kl=st.sampled_from([0.0]) | st.floats(0, 9),
    kl_exact=st.booleans(),
)


def summary_of(*found: Place) -> Summary:
    tally = Tally()
    tally.add(found)
    summary = tally.summary()
    assert summary is not None
    return summary


@given(st.lists(some_places, min_size=1, max_size=30), st.integers(0, 30))
def test_a_summary_is_what_the_places_say_however_they_come(found: list[Place], cut: int) -> None:
    tally = Tally()
    tally.add(found[:cut])
    tally.add(found[cut:])
    summary = tally.summary()
    assert summary is not None
    drawn = [place.sampled for place in found if place.sampled]
    known = [place.greedy for place in found if place.greedy[0] is not None]
    assert (summary.tokens, summary.sampled, summary.greedy) == (
        len(found),
        len(drawn),
        len(known),
    )
    for rate, pairs in [(summary.sampled_agreement, drawn), (summary.greedy_agreement, known)]:
        same = [was == now for was, now in pairs]
        assert rate == (sum(same) / len(same) if same else None)
    divergences = [place.kl for place in found]
    assert summary.kl_mean == pytest.approx(math.fsum(divergences) / len(found))
    assert summary.kl_max == max(divergences)
    assert summary.kl_exact == all(place.kl_exact for place in found)
    assert summary.max_logprob_delta == max(abs(b - a) for a, b in (p.logprobs for p in found))
    changed = [place for place in found if place.changed]
    first = min(changed, key=lambda place: (place.position, place.token_position), default=None)
    assert summary.first_changed == first


def test_without_places_there_is_no_summary() -> None:
    assert Tally().summary() is None


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 2), (99, 99), (100, 99), (101, 100)])
def test_the_99th_percentile_is_the_one_of_the_nearest_rank(count: int, rank: int) -> None:
    found = [a_place(kl=float(number)) for number in range(count, 0, -1)]
    assert summary_of(*found).kl_p99 == rank


# limits

BEYOND = summary_of(
    a_place(kl=0.5, logprobs=(-1.0, -1.25)),
    a_place(kl=0.25, sampled=(1, 2)),
    a_place(kl=0.0, greedy=(1, 2)),
    a_place(kl=0.25),
)


@pytest.mark.parametrize(
    ("limit", "value", "beyond", "message"),
    [
        ("min_sampled_agreement", 0.75, 0.76, "sampled agreement 0.75 is below 0.76"),
        ("min_greedy_agreement", 0.75, 0.8, "greedy agreement 0.75 is below 0.8"),
        ("max_kl_mean", 0.25, 0.2, "mean KL 0.25 is above 0.2"),
        ("max_kl_p99", 0.5, 0.4, "p99 KL 0.5 is above 0.4"),
        ("max_kl", 0.5, 0.25, "max KL 0.5 is above 0.25"),
        ("max_logprob_delta", 0.25, 0.0, "max |delta logprob| 0.25 is above 0.0"),
    ],
)
def test_a_limit_holds_up_to_its_value_and_is_named_beyond(
    limit: str, value: float, beyond: float, message: str
) -> None:
    none = dict.fromkeys(Limits.__struct_fields__)
    assert failures(BEYOND, Limits(**(none | {limit: value}))) == ()
    assert failures(BEYOND, Limits(**(none | {limit: beyond}))) == (message,)
    assert failures(BEYOND, Limits(**none)) == ()


def test_by_default_no_choice_may_change_and_numbers_may() -> None:
    assert len(failures(BEYOND, Limits())) == 2
    assert failures(summary_of(a_place(kl=9.0, logprobs=(0.0, -9.0))), Limits()) == ()
    assert failures(summary_of(a_place(sampled=None, greedy=(None, 3))), Limits()) == ()


def test_what_is_no_number_is_beyond_every_limit_and_worse_than_any_number() -> None:
    line = [a_place(kl=3.0), *(a_place() for _ in range(40))]
    line[20] = a_place(kl=math.nan, logprobs=(-1.0, math.nan))
    found = summary_of(*line)
    assert (found.kl_mean, found.kl_max, found.max_logprob_delta) == (math.inf,) * 3
    for limit in ("max_kl_mean", "max_kl", "max_logprob_delta"):
        assert failures(found, Limits(**{limit: 1e300}))
    assert [span.worst for span in worst([line])] == [20, 0]


def test_a_token_that_was_impossible_and_is_so_still_has_not_moved() -> None:
    assert summary_of(a_place(logprobs=(-math.inf, -math.inf))).max_logprob_delta == 0
    assert summary_of(a_place(logprobs=(-1.0, -math.inf))).max_logprob_delta == math.inf


@pytest.mark.parametrize("name", Limits.__struct_fields__)
def test_a_limit_that_nothing_could_be_held_to_is_refused(name: str) -> None:
    for limit in (math.nan, math.inf, -0.1, *((1.01,) if name.startswith("min") else ())):
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            Limits(**{name: limit})


# the worst places


@given(st.lists(st.lists(some_places, max_size=60), max_size=3))
def test_the_worst_places_are_shown_with_those_around_them_and_none_twice(
    texts: list[list[Place]],
) -> None:
    spans = worst(texts)
    assert len(spans) <= STRIPS
    shown = [(span.text, at) for span in spans for at in range(span.start, span.stop)]
    assert len(set(shown)) == len(shown)
    for span in spans:
        assert 0 <= span.start <= span.worst < span.stop <= len(texts[span.text])
        assert span.worst - span.start <= AROUND
        assert span.stop - 1 - span.worst <= AROUND
    badness = [texts[span.text][span.worst] for span in spans]
    ranks = [(place.changed, place.kl) for place in badness]
    assert ranks == sorted(ranks, reverse=True)
    hidden = [
        (place.changed, place.kl)
        for text, line in enumerate(texts)
        for at, place in enumerate(line)
        if (text, at) not in shown
    ]
    if len(spans) < STRIPS:
        assert set(hidden) <= {(False, 0.0)}
    else:
        assert max(hidden, default=(False, 0.0)) <= ranks[-1]


def test_a_changed_choice_is_worse_than_any_divergence() -> None:
    line = [a_place() for _ in range(50)]
    line[5] = a_place(kl=3.0)
    line[30] = a_place(kl=0.1, sampled=(1, 2))
    line[33] = a_place(kl=5.0)
    line[40] = a_place(kl=1.0)
    found = [(span.start, span.stop, span.worst) for span in worst([line])]
    assert found == [(22, 39, 30), (0, 14, 5), (39, 49, 40)]


def test_where_nothing_changed_nothing_is_shown() -> None:
    assert worst([[a_place(), a_place()]]) == []


@given(st.lists(st.sampled_from([0.5, 1.0, -2.0, 7.25]), min_size=1, max_size=9), st.data())
def test_the_likeliest_of_a_row_are_those_of_its_largest_logits(
    row: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(row)))
    ranked = sorted(range(len(row)), key=lambda token: (-row[token], token))
    raw = struct.pack(f"<{len(row)}f", *row)
    top = struct.pack(f"<{len(row)}i", *ranked) + struct.pack(
        f"<{len(row)}f", *(row[token] for token in ranked)
    )
    expected = [(token, row[token]) for token in ranked[:count]]
    assert likeliest("raw", raw, count) == likeliest("top_k", top, count) == expected


# fingerprints


def test_differences_of_several_fingerprints_are_one() -> None:
    first = {"dtype": ("float32", "bfloat16"), "torch": ("2.11", "2.12")}
    second = {"dtype": ("float32", "bfloat16"), "torch": ("2.10", "2.12"), "cpu": (None, "new")}
    assert merged([first, second]) == {
        "cpu": (None, "new"),
        "dtype": ("float32", "bfloat16"),
        "torch": (["2.11", "2.10"], "2.12"),
    }
    assert merged([]) == {}
