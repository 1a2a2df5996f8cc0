"""A history is cut into passages: each claim of its events lies in one, with what it is about."""

from collections import Counter
from functools import reduce
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.config import ConfigChanges, Constraint
from domain.events import (
    BeamsGenerated,
    BeamStep,
    ConfigChanged,
    ContextSlid,
    ContinuationsGenerated,
    Event,
    HeadRewound,
    Recorded,
    StateDeleted,
    TokensGenerated,
)
from domain.ids import Position, TokenId, Version
from domain.log_errors import UnknownEvent
from domain.origin import Fork
from domain.replay import (
    BEGINNING,
    Course,
    Occurrence,
    Passage,
    claims_of,
    occurrences,
    passages,
    place_of,
    runs_of,
)
from domain.search_tree import ROOT, SearchTree
from domain.state import Live, fold
from domain.work import Drawing, Redraw
from tests.builders import created, forwarded, generated, history, state_id
from tests.domain.replaying import Story, Tokens, beams, generation, stories


def placed(events: list[Event]) -> list[Occurrence]:
    return list(occurrences(history(*events)))


# given events / when each is put in its place / then


@given(stories())
def test_every_event_knows_what_it_happened_to_and_what_came_after_it(story: Story) -> None:
    rows = history(*story.events)
    found = list(occurrences(rows))
    assert [one.recorded for one in found] == rows
    assert [one.following for one in found] == [*rows[1:], None]
    assert found[0].before is None
    for index, one in enumerate(found[1:], start=1):
        assert one.before == fold(rows[:index])


@given(story=stories(), data=st.data())
def test_a_history_can_be_cut_anywhere_and_gone_on_with(story: Story, data: st.DataObject) -> None:
    rows = history(*story.events)
    at = data.draw(st.integers(0, len(rows)))
    before = reduce(Course.after, rows[:at], BEGINNING)
    assert before.version == at
    following = rows[at] if at < len(rows) else None
    parts = [*occurrences(rows[:at], following=following), *occurrences(rows[at:], before)]
    assert parts == list(occurrences(rows))


def test_no_event_was_recorded_before_the_one_that_it_follows() -> None:
    first, second = history(created("abc"), forwarded(3, "d"))
    row = msgspec.structs.replace(second.row, position=Position(first.position - 1))
    with pytest.raises(UnknownEvent, match="recorded before the version it follows"):
        BEGINNING.after(first).after(Recorded(row, second.event))


@given(stories())
def test_a_passage_says_which_events_it_is_evidence_of(story: Story) -> None:
    rows = history(*story.events)
    found = passages(occurrences(rows))
    for passage in found:
        claimed = {claim.recorded.position for claim in passage.claims}
        searched = {passage.search.position} if passage.search else set()
        assert passage.about == tuple(sorted(claimed | searched))
    rooms = {one.recorded.position: one.before.room for one in occurrences(rows) if one.before}
    assert all(one.room == rooms[one.search.position] for one in found if one.search)


def test_a_resumed_call_knows_all_its_earlier_parts_across_slides() -> None:
    story = Story("a", context_size=6, on_full="slide")
    story.generate(generation(max_tokens=12), seed=5, leaves_after=9)
    story.resume()
    parts = [one for one in placed(story.events) if isinstance(one.recorded.event, TokensGenerated)]
    assert any(isinstance(event, ContextSlid) for event in story.events)
    assert len(parts) == 5
    drawn: Tokens = ()
    for index, part in enumerate(parts):
        event = part.recorded.event
        assert isinstance(event, TokensGenerated)
        assert list(part.earlier) == [one.recorded.event for one in parts[:index]]
        assert (part.prior, event.resumes) == (drawn, len(drawn))
        assert part.said == "".join(one.content.text for one in part.earlier)
        drawn += event.content.tokens


def test_a_call_that_resumes_none_has_no_earlier_parts() -> None:
    parts = generated(3, "d"), generated(4, "e")
    assert [one.earlier for one in placed([created("abc"), *parts])] == [(), (), ()]


@pytest.mark.parametrize(
    "between", [ConfigChanged(changes=ConfigChanges(top_k=1)), HeadRewound(to_position=4)]
)
def test_only_a_slide_may_come_between_the_parts_of_a_call(between: Event) -> None:
    parts = generated(3, "d", finish_reason="cancelled"), generated(4, "e", resumes=1)
    *_, last = placed([created("abc"), parts[0], parts[1]])
    assert last.earlier == parts[:1]
    *_, last = placed([created("abc"), parts[0], between, parts[1]])
    assert last.earlier == ()


# given events / when they are cut into passages / then


def cut(*events: Event) -> list[tuple[str, list[int]]]:
    """The text of each passage, and the versions of its claims."""
    return [
        ("".join(map(chr, passage.tokens)), [one.recorded.version for one in passage.claims])
        for passage in passages(occurrences(history(*events)))
    ]


def test_a_state_that_only_began_claims_nothing() -> None:
    assert cut(created("abc")) == []


def test_claims_that_follow_each_other_are_one_passage() -> None:
    events = (created("abc"), forwarded(3, "d"), generated(4, "ef"))
    assert cut(*events) == [("abcdef", [2, 3])]


def test_a_passage_goes_on_through_events_that_claim_nothing() -> None:
    change = ConfigChanged(changes=ConfigChanges(temperature=1.0))
    events = (created("abc"), forwarded(3, "d"), change, generated(4, ""), generated(4, "e"))
    assert cut(*events) == [("abcde", [2, 5])]


def test_a_rewind_into_claimed_tokens_ends_a_passage() -> None:
    events = (created("abc"), generated(3, "de"), HeadRewound(to_position=4), generated(4, "f"))
    assert cut(*events) == [("abcde", [2]), ("abcdf", [4])]


def test_a_rewind_to_before_every_claim_ends_a_passage() -> None:
    events = (created("abc"), generated(3, "de"), HeadRewound(to_position=1), forwarded(1, "z"))
    assert cut(*events) == [("abcde", [2]), ("az", [4])]


def test_a_rewind_that_drops_no_claimed_token_ends_nothing() -> None:
    events = (created("abc"), HeadRewound(to_position=2), forwarded(2, "x"), generated(3, "y"))
    assert cut(*events) == [("abxy", [3, 4])]
    stays = (created("abc"), forwarded(3, "x"), HeadRewound(to_position=4), generated(4, "y"))
    assert cut(*stays) == [("abcxy", [2, 4])]


def test_a_second_rewind_in_a_row_makes_no_passage_of_its_own() -> None:
    rewinds = (HeadRewound(to_position=4), HeadRewound(to_position=3))
    events = (created("abc"), generated(3, "de"), *rewinds, generated(3, "f"))
    assert cut(*events) == [("abcde", [2]), ("abcf", [5])]


def test_a_slide_ends_a_passage_and_the_next_holds_what_was_left() -> None:
    after = generated(5, "fg", dropped=2)
    events = (created("abc"), generated(3, "de"), ContextSlid(dropped=2), after)
    assert cut(*events) == [("abcde", [2]), ("cdefg", [4])]
    (_, slid) = passages(occurrences(history(*events)))
    assert (slid.start, slid.claims[0].place) == (3, 3)


def test_what_a_deleted_state_held_is_still_checked() -> None:
    assert cut(created("abc"), generated(3, "d"), StateDeleted()) == [("abcd", [2])]


def test_the_tokens_of_a_fork_are_claimed_by_its_parent_alone() -> None:
    origin = Fork(state_id=state_id(1), version=Version(1), head_position=3)
    fork = msgspec.structs.replace(created("abc"), origin=origin)
    assert cut(fork) == []
    assert cut(fork, generated(3, "d")) == [("abcd", [2])]


def test_every_continuation_is_a_passage_of_its_own() -> None:
    story = Story()
    story.generate(generation(), seed=1)
    story.multi(generation(), seed=1, count=3)
    story.generate(generation(), seed=2)
    several = story.events[2]
    assert isinstance(several, ContinuationsGenerated)
    held = story.state.content.tokens[:7]
    found = passages(occurrences(history(*story.events)))
    branches = [one for one in found if one.claims[0].recorded.version == 3]
    assert [one.tokens for one in branches] == [
        held + one.content.tokens for one in several.continuations
    ]
    assert [one.claims[0].name for one in branches] == [f"continuations[{i}]." for i in range(3)]
    (line,) = (one for one in found if one not in branches)
    assert [claim.recorded.version for claim in line.claims] == [2, 4]


def test_a_continuation_of_no_token_claims_nothing() -> None:
    story = Story("abc", context_size=3)
    story.multi(generation(), seed=1, count=2)
    assert passages(occurrences(history(*story.events))) == []


def claimed(one: Recorded) -> list[Tokens]:
    return [run.content.tokens for _, run in runs_of(one) if run.content.tokens]


@given(stories())
def test_every_claim_lies_in_one_passage_with_the_tokens_it_is_about(story: Story) -> None:
    rows = history(*story.events)
    found = passages(occurrences(rows))
    for passage in found:
        for claim in passage.claims:
            before = fold(rows[: claim.recorded.version - 1])
            assert isinstance(before, Live)
            assert claim.place == len(before.content.tokens) == place_of(claim.recorded)
            assert passage.tokens[: claim.end] == before.content.tokens + claim.tokens
    for one in rows:
        claims = [claim for passage in found for claim in passage.claims if claim.recorded == one]
        assert [claim.tokens for claim in claims] == claimed(one)


@given(stories())
def test_a_state_of_few_rewinds_and_slides_has_few_passages(story: Story) -> None:
    ends = sum(isinstance(event, HeadRewound | ContextSlid) for event in story.events)
    found = passages(occurrences(history(*story.events)))
    line = [one for one in found if one.search is None and "[" not in one.claims[0].name]
    assert len(line) <= ends + 1


# given a passage / when a model is asked about it / then


@given(stories())
def test_what_is_asked_lies_in_the_passage_and_does_not_overlap(story: Story) -> None:
    for passage in passages(occurrences(history(*story.events))):
        request = passage.request()
        assert 1 <= request.start < len(request.tokens) == len(passage.tokens)
        spans = [(redraw.start, redraw.stop) for redraw in request.redraws]
        assert all(request.start <= start < stop <= len(request.tokens) for start, stop in spans)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def redraws_of(story: Story, version: int) -> list[Redraw]:
    found = passages(occurrences(history(*story.events)))
    return [
        redraw
        for passage in found
        if passage.claims and passage.claims[-1].recorded.version == version
        for redraw in passage.request().redraws[-1:]
    ]


def test_a_branch_is_drawn_again_as_what_it_was() -> None:
    story = Story(store_logits="full")
    constraint = Constraint(kind="lark", text="9")
    asked = generation(constraint=constraint)
    story.multi(asked, seed=11, count=2)
    assert [redraw.drawing for redraw in redraws_of(story, 2)] == [
        Drawing(
            sampling=asked.sampling,
            seed=11,
            branch=branch,
            constraint=constraint,
            top_logprobs=1,
            store_logits="full",
            top_k_logits=2,
        )
        for branch in (0, 1)
    ]


def test_a_part_of_a_call_is_drawn_again_after_what_came_before_and_was_dropped() -> None:
    story = Story("abc", context_size=6, on_full="slide")
    story.generate(generation(max_tokens=5, ignore_eos=True), seed=11)
    first, slid, second = story.events[1:]
    assert isinstance(first, TokensGenerated)
    assert isinstance(second, TokensGenerated)
    assert slid == ContextSlid(dropped=3)
    (redraw,) = redraws_of(story, 4)
    assert (redraw.start, redraw.stop) == (3, 5)
    assert (redraw.drawing.dropped, redraw.drawing.prior) == (3, first.content.tokens)


@given(stories())
def test_a_passage_taken_apart_asks_the_same_of_each_claim(story: Story) -> None:
    for passage in passages(occurrences(history(*story.events))):
        apart = passage.apart()
        assert [claim for part in apart for claim in part.claims] == list(passage.claims)
        redraws = [redraw for part in apart for redraw in part.request().redraws]
        assert redraws == list(passage.request().redraws)
        for part in apart:
            assert len(part.claims) <= 1
            assert part.tokens == passage.tokens[: len(part.tokens)]


# given a beam search / when its beams are laid out as texts / then


def step(*beams_: tuple[int, str]) -> BeamStep:
    return BeamStep(
        parents=tuple(parent for parent, _ in beams_),
        tokens=tuple(TokenId(ord(letter)) for _, letter in beams_),
    )


def letters(tokens: Tokens) -> str:
    return "".join(map(chr, tokens))


def test_a_tree_has_a_node_for_each_text_that_ran_as_a_beam() -> None:
    tree = SearchTree([step((0, "a"), (0, "b")), step((1, "a"), (1, "c"), (0, "a"))])
    assert [[letters(tree.tokens(node)) for node in nodes] for nodes in tree.running] == [
        [""],
        ["a", "b"],
        ["ba", "bc", "aa"],
    ]
    last = tree.running[2][0]
    assert tree.lineage(last) == [last, tree.running[1][1], ROOT]
    text = tuple(map(TokenId, b"bax"))
    assert list(tree.walk(text)) == [ROOT, tree.running[1][1], last]
    assert list(tree.walk(tuple(map(TokenId, b"xa")))) == [ROOT]


def test_beams_of_two_groups_that_are_the_same_text_are_one_node() -> None:
    tree = SearchTree([step((0, "a"), (0, "a")), step((0, "b"), (1, "b"))])
    assert [len(set(nodes)) for nodes in tree.running] == [1, 1, 1]


def asked_of(passage: Passage, held: int, tree: SearchTree) -> list[int]:
    """The nodes whose rows a passage asks for."""
    nodes = list(tree.walk(passage.tokens[held:]))
    return nodes[passage.start - held :]


@given(stories())
def test_the_row_of_every_beam_is_asked_for_and_few_of_them_twice(story: Story) -> None:
    for one in placed(story.events):
        event = one.recorded.event
        if not isinstance(event, BeamsGenerated):
            continue
        tree, held = SearchTree(event.steps), place_of(one.recorded)
        found = [p for p in passages(occurrences(history(*story.events))) if p.search]
        found = [p for p in found if p.search == one.recorded]
        nodes = {node for running in tree.running for node in running}
        assert {node for passage in found for node in asked_of(passage, held, tree)} == nodes
        # beyond the beams that were found, each row is asked for once
        others = Counter(n for p in found if not p.claims for n in asked_of(p, held, tree))
        assert set(others.values()) <= {1}
        beside = {n for p in found if p.claims for n in asked_of(p, held, tree)}
        assert not beside & set(others)
        assert one.before is not None
        assert all(len(p.tokens) <= one.before.config.context_size for p in found)
        assert all(p.request().candidates == event.parameters for p in found)


def test_a_search_that_found_nothing_still_asks_for_its_first_row() -> None:
    nothing = BeamsGenerated(parameters=beams(), start=3, steps=(), beams=())
    (found,) = passages(occurrences(history(created("abc"), nothing)))
    assert (letters(found.tokens), found.start, found.claims) == ("abcc", 3, ())


def test_each_beam_that_was_found_is_a_claim() -> None:
    story = Story()
    story.search(beams(num_return=3))
    (*_, one) = placed(story.events)
    assert [claim.name for claim in claims_of(one)] == ["beams[0].", "beams[1].", "beams[2]."]
    assert all(claim.drawing is None for claim in claims_of(one))
