"""A history held against its re-execution: an honest one passes, any change of it is named."""

import hashlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from domain import replay
from domain.chain import blobs_digest
from domain.config import ConfigChanges, GenerationParameters, SamplingParameters
from domain.events import (
    Alternative,
    ConfigChanged,
    Event,
    Fingerprint,
    Fork,
    Fragment,
    HeadRewound,
    Recorded,
    Scores,
    StateDeleted,
    StoredLogits,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import TokenId, Version
from domain.ports import Drawing, Drawn, Scored
from domain.replay import Divergence, Passage, passages
from domain.state import fold
from tests.builders import (
    SAMPLING,
    config,
    created,
    forwarded,
    fragment,
    generated,
    histories,
    history,
    recorded,
    state_id,
)

EOS = frozenset({TokenId(0)})
PARAMETERS = GenerationParameters(
    sampling=SamplingParameters(temperature=0.7, top_k=40, top_p=0.9), max_tokens=4, top_logprobs=1
)


# given events / when they are cut into passages / then


def cut(*events: Event) -> list[tuple[str, list[int]]]:
    """The text of each passage, and the versions of its claims."""
    return [
        ("".join(map(chr, passage.tokens)), [claim.version for claim in passage.claims])
        for passage in passages(history(*events))
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


def test_what_a_deleted_state_held_is_still_checked() -> None:
    assert cut(created("abc"), generated(3, "d"), StateDeleted()) == [("abcd", [2])]


def test_the_tokens_of_a_fork_are_claimed_by_its_parent_alone() -> None:
    origin = Fork(state_id=state_id(1), version=Version(1), head_position=3)
    fork = msgspec.structs.replace(created("abc"), origin=origin)
    assert cut(fork) == []
    assert cut(fork, generated(3, "d")) == [("abcd", [2])]


def is_claim(one: Recorded) -> bool:
    return isinstance(one.event, TextForwarded | TokensGenerated) and bool(one.event.content.tokens)


@given(histories())
def test_every_claim_lies_in_one_passage_in_order(events: list[Recorded]) -> None:
    claimed = [claim for passage in passages(events) for claim in passage.claims]
    assert claimed == [one for one in events if is_claim(one)]


@given(histories())
def test_a_passage_holds_the_tokens_that_its_claims_are_about(events: list[Recorded]) -> None:
    for passage in passages(events):
        for claim in passage.claims:
            before = replay.tokens_of(fold(events[: claim.version - 1]))
            start, content = replay.claim_of(claim).start, replay.claim_of(claim).content
            assert passage.tokens[: start + len(content.tokens)] == before + content.tokens


@given(histories())
def test_the_redraws_of_a_passage_are_its_generations_and_do_not_overlap(
    events: list[Recorded],
) -> None:
    for passage in passages(events):
        redraws = passage.redraws()
        generations = [c for c in passage.claims if isinstance(c.event, TokensGenerated)]
        assert len(redraws) == len(generations)
        positions = [p for redraw in redraws for p in range(redraw.start, redraw.stop)]
        assert positions == sorted(set(positions))
        assert all(passage.start <= p < len(passage.tokens) for p in positions)


@given(histories())
def test_there_is_one_passage_more_than_there_are_rewinds_at_most(events: list[Recorded]) -> None:
    rewinds = sum(isinstance(one.event, HeadRewound) for one in events)
    assert len(passages(events)) <= rewinds + 1


# An oracle in place of the model: some pure function of the tokens before and of how to draw.


def noise(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def draw(before: tuple[TokenId, ...], drawing: Drawing) -> Drawn:
    token = TokenId(noise(before, drawing.seed, drawing.sampling) % 512)
    scores = score(before, token)
    alternative = Alternative(token_id=token, text="", logprob=noise(before, "best") / 7)
    return Drawn(
        token_id=token,
        logprob=scores.logprobs[0],
        rank=scores.ranks[0],
        entropy=scores.entropies[0],
        logsumexp=scores.logsumexps[0],
        logits_digest=scores.logits_digests[0],
        sampling_probability=1 / (1 + noise(before, drawing.seed)),
        alternatives=(alternative,) * drawing.top_logprobs,
        logits=None if drawing.store_logits == "none" else b"%d" % noise(before, drawing.seed),
    )


def score(before: tuple[TokenId, ...], token: TokenId) -> Scores:
    return Scores(
        logprobs=(-noise(before, token) / 8,),
        ranks=(noise(before, token) % 512,),
        entropies=(noise(before) / 7,),
        logsumexps=(noise(before) / 9,),
        logits_digests=(f"{noise(before):016x}",),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    fields = Scores.__struct_fields__
    return Scores(**{f: tuple(v for part in parts for v in getattr(part, f)) for f in fields})


def scores_at(tokens: tuple[TokenId, ...], start: int) -> Scores:
    return joined([score(tokens[:p], tokens[p]) for p in range(start, len(tokens))])


def execute(passage: Passage) -> Scored:
    tokens = passage.tokens
    redrawn = [
        draw(tokens[:position], redraw.drawing)
        for redraw in passage.redraws()
        for position in range(redraw.start, redraw.stop)
    ]
    scores = scores_at(tokens, passage.start)
    return Scored(scores=scores, redrawn=tuple(redrawn), tokens_computed=0, tokens_reused=0)


def forward(held: tuple[TokenId, ...], text: str) -> TextForwarded:
    content = fragment(text)
    scores = scores_at(held + content.tokens, len(held))
    return TextForwarded(start=len(held), content=content, scores=scores)


def generate(held: tuple[TokenId, ...], count: int, seed: int) -> TokensGenerated:
    drawing = Drawing(
        sampling=PARAMETERS.sampling,
        seed=seed,
        top_logprobs=1,
        store_logits="top_k",
        top_k_logits=2,
    )
    drawn: list[Drawn] = []
    for _ in range(count):
        drawn.append(draw(held + tuple(d.token_id for d in drawn), drawing))
    tokens = tuple(d.token_id for d in drawn)
    blobs = tuple(d.logits or b"" for d in drawn)
    return TokensGenerated(
        parameters=PARAMETERS,
        seed=seed,
        start=len(held),
        content=Fragment.of(tokens, ["x"] * count),
        scores=scores_at(held + tokens, len(held)),
        sampling_probabilities=tuple(d.sampling_probability for d in drawn),
        alternatives=tuple(d.alternatives for d in drawn),
        stored_logits=StoredLogits(kind="top_k", k=2, digest=blobs_digest(blobs)),
        finish_reason=None if count == PARAMETERS.max_tokens else "cancelled",
    )


@st.composite
def honest_events(draw_: st.DrawFn) -> list[Event]:
    """A state as the oracle makes it: some of everything that claims or drops tokens."""
    events: list[Event] = [created("abc")]
    for kind in draw_(st.lists(st.sampled_from(["forward", "generate", "rewind"]), max_size=6)):
        held = replay.tokens_of(fold(history(*events)))
        if kind == "forward":
            events.append(forward(held, draw_(st.text("abc", min_size=1, max_size=3))))
        elif kind == "generate":
            events.append(generate(held, draw_(st.integers(1, 4)), draw_(st.integers(0, 99))))
        else:
            events.append(HeadRewound(to_position=draw_(st.integers(1, len(held)))))
    return events


def divergences(events: Sequence[Event]) -> list[Divergence]:
    found = []
    for passage in passages(history(*events)):
        scored = execute(passage)
        found += [replay.compare(passage, claim, scored) for claim in passage.claims]
    return [one for one in found if one is not None]


def the_first(events: Sequence[Event]) -> tuple[int | None, str, int | None]:
    found = divergences(events)[0]
    return (found.version, found.field, found.token_position)


@given(honest_events())
def test_an_honest_history_is_as_recorded(events: list[Event]) -> None:
    assert divergences(events) == []


def replaced(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def other(value: Any) -> Any:
    """A value of the same type that is as near as can be."""
    match value:
        case int():
            return value ^ 1
        case float():
            return value + max(1.0, abs(value)) * 2**-52
        case str():
            return ("1" if value[0] == "0" else "0") + value[1:]
        case _:
            return ()


Where = tuple[int, int]
"""Index of an event, and of a token in it."""


def claims(events: Sequence[Event]) -> list[Where]:
    return [
        (place, index)
        for place, event in enumerate(events)
        if isinstance(event, TextForwarded | TokensGenerated)
        for index in range(len(event.content.tokens))
    ]


def change_with(event: Any, field: str, make: Callable[[Any], Any]) -> Any:
    """An event with another value in one of its fields."""
    name, _, inner = field.partition(".")
    old = getattr(event, name)
    new = change_with(old, inner, make) if inner else make(old)
    return msgspec.structs.replace(event, **{name: new})


def change(event: Any, field: str, index: int) -> Any:
    """An event with one value of one of its fields changed."""
    return change_with(event, field, lambda old: replaced(old, index, other(old[index])))


@given(events=honest_events(), data=st.data(), score_=st.sampled_from(Scores.__struct_fields__))
def test_any_changed_score_is_named_with_its_place(
    events: list[Event], data: st.DataObject, score_: str
) -> None:
    assume(claims(events))
    place, index = data.draw(st.sampled_from(claims(events)))
    start = getattr(events[place], "start", 0)
    events[place] = change(events[place], f"scores.{score_}", index)
    assert the_first(events) == (place + 1, f"scores.{score_}", start + index)
    assert len(divergences(events)) == 1


def drawn_tokens(events: Sequence[Event]) -> list[Where]:
    return [where for where in claims(events) if isinstance(events[where[0]], TokensGenerated)]


@given(events=honest_events(), data=st.data())
def test_a_changed_drawn_token_is_named_as_the_token(
    events: list[Event], data: st.DataObject
) -> None:
    assume(drawn_tokens(events))
    place, index = data.draw(st.sampled_from(drawn_tokens(events)))
    start = getattr(events[place], "start", 0)
    events[place] = change(events[place], "content.tokens", index)
    assert the_first(events) == (place + 1, "content.tokens", start + index)


@given(events=honest_events(), data=st.data())
def test_of_a_changed_logprob_and_a_changed_token_after_it_the_first_is_named(
    events: list[Event], data: st.DataObject
) -> None:
    later = [(place, index) for place, index in drawn_tokens(events) if index > 0]
    assume(later)
    place, index = data.draw(st.sampled_from(later))
    start = getattr(events[place], "start", 0)
    events[place] = change(events[place], "content.tokens", index)
    events[place] = change(events[place], "scores.logprobs", index - 1)
    assert the_first(events) == (place + 1, "scores.logprobs", start + index - 1)


@given(events=honest_events(), data=st.data())
def test_a_changed_forwarded_token_is_found_in_its_logprob(
    events: list[Event], data: st.DataObject
) -> None:
    given_ = [where for where in claims(events) if isinstance(events[where[0]], TextForwarded)]
    assume(given_)
    place, index = data.draw(st.sampled_from(given_))
    start = getattr(events[place], "start", 0)
    events[place] = change(events[place], "content.tokens", index)
    assert the_first(events) == (place + 1, "scores.logprobs", start + index)


@given(events=honest_events(), index=st.integers(0, 2))
def test_a_changed_token_of_the_beginning_is_found_in_the_first_claim_after_it(
    events: list[Event], index: int
) -> None:
    first = next(iter(passages(history(*events))), None)
    assume(first is not None and first.start > index)
    assert first is not None
    events[0] = change(events[0], "content.tokens", index)
    claim = min(first.claims, key=lambda claim: claim.version)
    assert the_first(events)[::2] == (claim.version, replay.claim_of(claim).start)


@given(events=honest_events(), data=st.data(), seed=st.integers(100, 199))
def test_a_changed_seed_is_found(events: list[Event], data: st.DataObject, seed: int) -> None:
    assume(drawn_tokens(events))
    place, _ = data.draw(st.sampled_from(drawn_tokens(events)))
    events[place] = msgspec.structs.replace(events[place], seed=seed)
    version, field, _ = the_first(events)
    assert (version, field) in [
        (place + 1, "content.tokens"),
        (place + 1, "sampling_probabilities"),
    ]


@pytest.mark.parametrize("field", ["sampling_probabilities", "alternatives"])
@given(events=honest_events(), data=st.data())
def test_what_is_recorded_of_a_draw_is_compared(
    field: str, events: list[Event], data: st.DataObject
) -> None:
    assume(drawn_tokens(events))
    place, index = data.draw(st.sampled_from(drawn_tokens(events)))
    start = getattr(events[place], "start", 0)
    events[place] = change(events[place], field, index)
    assert the_first(events) == (place + 1, field, start + index)


GENERATION = [created("abc"), generate(tuple(map(TokenId, b"abc")), 3, seed=5)]


def generation_with(**fields: Any) -> list[Event]:
    return [GENERATION[0], msgspec.structs.replace(GENERATION[1], **fields)]


def test_another_digest_of_the_stored_logits_is_named() -> None:
    stored = StoredLogits(kind="top_k", k=2, digest="00" * 32)
    found = divergences(generation_with(stored_logits=stored))
    assert [(one.field, one.expected) for one in found] == [("stored_logits.digest", "00" * 32)]


def test_values_that_are_missing_are_named_by_their_number() -> None:
    scores = GENERATION[1].scores
    short = msgspec.structs.replace(scores, entropies=scores.entropies[:2])
    found = divergences(generation_with(scores=short))
    assert [(one.field, one.expected, one.actual) for one in found] == [
        ("len(scores.entropies)", 2, 3)
    ]
    assert divergences(generation_with(alternatives=()))[0].field == "len(alternatives)"


def test_a_divergence_says_what_was_recorded_and_what_came_out() -> None:
    events = generation_with(sampling_probabilities=(0.5, 0.25, 0.125))
    assert divergences(events) == [
        Divergence(
            position=2,
            state_id=state_id(),
            version=2,
            field="sampling_probabilities",
            expected=0.5,
            actual=GENERATION[1].sampling_probabilities[0],
            token_position=3,
        )
    ]


# given a generation / when its end is checked / then


def finish(
    text: str, *, context: int = 64, start: int = 3, **fields: Any
) -> tuple[str, Any, int | None] | None:
    """What is wrong with how a generation of ``text`` ended; "0" stands for end-of-sequence."""
    content = Fragment.of([TokenId(0 if letter == "0" else ord(letter)) for letter in text], text)
    event = generated(start, content, **fields)
    found = replay.compare_finish(recorded(event), EOS, context)
    return None if found is None else (found.field, found.actual, found.token_position)


def parameters(**fields: Any) -> GenerationParameters:
    return GenerationParameters(**({"sampling": SAMPLING, "max_tokens": 4} | fields))


ENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all its tokens": ("abcd", {"finish_reason": None}),
    "end-of-sequence": ("ab0", {"finish_reason": "eos"}),
    "end-of-sequence as its last token": ("abc0", {"finish_reason": "eos"}),
    "a stop token": (
        "ab",
        {"finish_reason": "stop_token", "parameters": parameters(stop_token_ids=(ord("b"),))},
    ),
    "a stop sequence": (
        "abc",
        {"finish_reason": "stop_sequence", "parameters": parameters(stop_sequences=("bc",))},
    ),
    "a full context": ("ab", {"finish_reason": "context_full", "context": 5}),
    "a context that was full before": ("", {"finish_reason": "context_full", "context": 3}),
    "a client that left": ("ab", {"finish_reason": "cancelled"}),
    "a client that left at the last token": ("abcd", {"finish_reason": "cancelled"}),
    "a client that left with nothing to draw": ("", {"finish_reason": "cancelled", "context": 3}),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_generation_may_end_with(name: str) -> None:
    text, fields = ENDS[name]
    assert finish(text, **({"parameters": parameters()} | fields)) is None


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(
    "reason", [None, "eos", "stop_token", "stop_sequence", "context_full", "cancelled"]
)
def test_no_other_reason_passes_for_it(name: str, reason: str | None) -> None:
    text, fields = ENDS[name]
    right: set[Any] = {fields["finish_reason"]}
    if name in ("all its tokens", "a client that left at the last token"):
        right = {None, "cancelled"}
    if not text:
        right = {"context_full", "cancelled"}
    found = finish(text, **({"parameters": parameters()} | fields | {"finish_reason": reason}))
    assert (found is None) == (reason in right)
    assert found is None or (found[0] == "finish_reason" and found[1] in right)


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ("a0b", {}, "eos"),
        ("abcd", {"parameters": parameters(stop_token_ids=(98,))}, "stop_token"),
        ("abcd", {"parameters": parameters(stop_sequences=("ab",))}, "stop_sequence"),
        ("abcd", {"context": 5}, "context_full"),
    ],
)
def test_a_generation_that_went_on_past_its_end_is_named_where_it_should_have_ended(
    text: str, fields: dict[str, Any], reason: str
) -> None:
    found = finish(text, **({"parameters": parameters(), "finish_reason": None} | fields))
    assert found == ("finish_reason", reason, 4)


def test_more_tokens_than_were_asked_for_are_found() -> None:
    found = finish("abcde", parameters=parameters(), finish_reason=None)
    assert found == ("len(content.tokens)", 4, None)


def test_nothing_drawn_where_there_was_room_is_found() -> None:
    assert finish("", parameters=parameters(), finish_reason="context_full", context=4) == (
        "finish_reason",
        "cancelled",
        None,
    )


def test_only_generations_end() -> None:
    assert replay.compare_finish(recorded(forwarded(3, "a0b")), EOS, context=3) is None


# given an event / when it is asked whether a model can be asked about it / then


@given(histories())
def test_what_happened_can_be_asked_about(events: list[Recorded]) -> None:
    for one in events:
        assert replay.compare_form(one, vocabulary_size=512, context_size=64) is None


def form(event: Event) -> tuple[str, Any, Any, int | None] | None:
    found = replay.compare_form(recorded(event), vocabulary_size=128, context_size=6)
    if found is None:
        return None
    return (found.field, found.expected, found.actual, found.token_position)


@pytest.mark.parametrize("token", [-1, 128, 10**6])
@pytest.mark.parametrize(("event", "at"), [(created("abc"), 1), (forwarded(3, "abc"), 4)])
def test_a_token_outside_the_vocabulary_is_named(event: Any, at: int, token: int) -> None:
    content = msgspec.structs.replace(
        event.content, tokens=replaced(event.content.tokens, 1, token)
    )
    changed = msgspec.structs.replace(event, content=content)
    assert form(changed) == ("content.tokens", token, "a token from 0 to 127", at)


@pytest.mark.parametrize(
    ("event", "room"), [(created("abcdefg"), 6), (forwarded(4, "abc"), 2), (generated(7, "a"), -1)]
)
def test_more_tokens_than_the_context_holds_are_named(event: Any, room: int) -> None:
    count = len(event.content.tokens)
    assert form(event) == ("len(content.tokens)", count, f"at most {room}", None)


OF_EACH_TOKEN = [
    "content.ends",
    *(f"scores.{field}" for field in Scores.__struct_fields__),
    "sampling_probabilities",
    "alternatives",
]


@pytest.mark.parametrize("field", OF_EACH_TOKEN)
@pytest.mark.parametrize("text", ["", "abc"])
def test_every_list_has_one_value_for_each_token(field: str, text: str) -> None:
    event = generated(3, text)
    more = attrgetter(field)(generated(3, text + "x"))
    longer = change_with(event, field, lambda _: more)
    assert form(event) is None
    assert form(longer) == (f"len({field})", len(text) + 1, len(text), None)


def test_every_list_of_an_event_is_one_of_these() -> None:
    event: Any = generated(3, "abc")
    lists = {name for name in event.__struct_fields__ if isinstance(getattr(event, name), tuple)}
    lists |= {f"scores.{field}" for field in Scores.__struct_fields__}
    assert lists | {"content.ends"} == set(OF_EACH_TOKEN)


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
    asked = config(store_logits=kind, top_k_logits=k)
    every = [None, ("top_k", 10), ("top_k", 9), ("full", 10), ("full", 9)]
    for stored in every:
        digest = stored and StoredLogits(kind=stored[0], k=stored[1], digest="00" * 32)
        event = recorded(generated(3, text, stored_logits=digest))
        found = replay.compare_storage(event, asked)
        assert (found is None) == (stored == kept)
        assert found is None or (found.field, found.expected, found.actual) == (
            "stored_logits",
            stored,
            kept,
        )


def test_only_generations_keep_logits() -> None:
    assert replay.compare_storage(recorded(forwarded(3)), config(store_logits="full")) is None


# given an event / when its text is compared / then


@given(histories())
def test_a_text_that_is_that_of_its_tokens_passes(events: list[Recorded]) -> None:
    for one in events:
        actual = getattr(one.event, "content", fragment(""))
        assert replay.compare_text(one, actual) is None


@pytest.mark.parametrize("event", [created("abc"), forwarded(3, "abc"), generated(3, "abc")])
@pytest.mark.parametrize("fields", [{"text": "abd"}, {"ends": (1, 1, 3)}])
def test_another_text_or_other_ends_are_found(event: Any, fields: dict[str, Any]) -> None:
    content = msgspec.structs.replace(event.content, **fields)
    found = replay.compare_text(
        recorded(msgspec.structs.replace(event, content=content)), event.content
    )
    assert found is not None
    assert (found.field, found.expected, found.actual) == ("content.text", content.text, "abc")


def test_events_without_text_have_nothing_to_compare() -> None:
    assert replay.compare_text(recorded(HeadRewound(to_position=1)), fragment("abc")) is None


# given a history of another machine / when it is executed here / then


def test_the_drift_is_the_largest_change_of_a_logprob_and_the_first_changed_token() -> None:
    held = (*map(TokenId, b"abc"), TokenId(ord("d")))
    events = [created("abc"), forward(held[:3], "d"), generate(held, 3, seed=5)]
    rows = history(*events, fingerprint="ab" * 32)
    (passage,) = passages(rows)
    here = execute(passage)
    logprobs = here.scores.logprobs
    moved = (logprobs[0] + 2**20, logprobs[1], logprobs[2] - 2**10, logprobs[3] + 2**4)
    other_token = msgspec.structs.replace(here.redrawn[1], token_id=TokenId(600))
    there = msgspec.structs.replace(
        here,
        scores=msgspec.structs.replace(here.scores, logprobs=moved),
        redrawn=(here.redrawn[0], other_token, here.redrawn[2]),
    )
    drift = replay.drift(rows[2], passage, there, {"torch": ("1", "2")})
    assert drift == replay.Drift(
        position=3,
        state_id=state_id(),
        version=3,
        recorded_fingerprint="ab" * 32,
        max_logprob_delta=2.0**10,
        first_changed=5,
        differences={"torch": ("1", "2")},
    )
    assert replay.drift(rows[1], passage, there, {}).max_logprob_delta == 2.0**20


def test_there_is_no_drift_between_equal_results() -> None:
    rows = history(*GENERATION)
    (passage,) = passages(rows)
    drift = replay.drift(rows[1], passage, execute(passage), {})
    assert (drift.max_logprob_delta, drift.first_changed) == (0.0, None)


def test_the_differences_of_two_fingerprints_are_named() -> None:
    old = Fingerprint.of({"torch": "1", "dtype": "float32", "gone": 1, "deterministic": True})
    new = Fingerprint.of({"torch": "2", "dtype": "float32", "came": 2, "deterministic": True})
    assert replay.differences(old, new) == {
        "came": (None, 2),
        "gone": (1, None),
        "torch": ("1", "2"),
    }
    assert replay.differences(old, old) == {}
