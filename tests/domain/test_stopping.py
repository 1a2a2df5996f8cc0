"""A generation ends with the first token that gives it a reason to, and no sooner."""

from itertools import accumulate, pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from domain.events import FinishReason
from domain.ids import TokenId
from domain.stopping import Stopping
from tests.builders import PARAMETERS

EOS = TokenId(0)
PLAIN = TokenId(5)
ROOM = 1000

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
"""One character to a reader, five code points."""
CHARACTERS = st.sampled_from(["a", "b", "\n", "日", "🙂", "e", "\u0301", FAMILY])
TEXTS = st.lists(CHARACTERS, max_size=16).map("".join)
STOPS = st.lists(st.lists(CHARACTERS, min_size=1, max_size=3).map("".join), max_size=4)


@st.composite
def split_texts(draw: st.DrawFn) -> list[str]:
    """What tokens add to a text: any split of it, tokens that add nothing among them."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=24)))
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def stopping(
    stops: list[str] | tuple[str, ...] = (),
    *,
    eos: tuple[TokenId, ...] = (EOS,),
    held: int = 0,
    context_size: int = ROOM,
    said: str = "",
    **parameters: Any,
) -> Stopping:
    return Stopping(
        msgspec.structs.replace(PARAMETERS, stop_sequences=tuple(stops), **parameters),
        eos_token_ids=frozenset(eos),
        held=held,
        context_size=context_size,
        said=said,
    )


def drawn(watch: Stopping, pieces: list[str]) -> tuple[list[str], FinishReason | None]:
    """The pieces until there is a reason to end, and the reason."""
    for count, piece in enumerate(pieces, start=1):
        if reason := watch.push(PLAIN, piece):
            return pieces[:count], reason
    return pieces, None


def first_end(text: str, stops: list[str], *, after: int = 0) -> int | None:
    """Where the first occurrence of any stop ends, of those that end after a place."""
    ends = [
        start + len(stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > after
    ]
    return min(ends, default=None)


@given(pieces=split_texts(), stops=STOPS)
@example(pieces=["aa", "ab"], stops=["aab"])
@example(pieces=["abab", "ab"], stops=["bb", "abb", "babab"])
@example(pieces=["", "🙂🙂", "", "日"], stops=["🙂日"])
def test_a_text_ends_at_the_first_token_that_completes_a_stop_however_it_is_split(
    pieces: list[str], stops: list[str]
) -> None:
    kept, reason = drawn(stopping(stops), pieces)
    text = "".join(pieces)
    end = first_end(text, stops)
    if end is None:
        assert (kept, reason) == (pieces, None)
    else:
        reached = next(length for length in accumulate(map(len, pieces)) if length >= end)
        assert ("".join(kept), reason) == (text[:reached], "stop_sequence")


@given(pieces=split_texts(), stops=STOPS)
def test_a_kept_text_holds_a_stop_exactly_if_a_stop_ended_it_and_needed_its_last_token(
    pieces: list[str], stops: list[str]
) -> None:
    kept, reason = drawn(stopping(stops), pieces)
    assert any(stop in "".join(kept) for stop in stops) == (reason == "stop_sequence")
    assert not any(stop in "".join(kept[:-1]) for stop in stops)


@given(text=TEXTS, stops=STOPS, data=st.data())
def test_two_splits_of_a_text_end_within_the_tokens_that_complete_the_same_stop(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    singly, _ = drawn(stopping(stops), list(text))
    at = data.draw(st.integers(0, len(text)))
    halves = [text[:at], text[at:]]
    kept, _ = drawn(stopping(stops), halves)
    assert "".join(kept).startswith("".join(singly))
    assert len("".join(kept)) in (at, len(text))


@given(pieces=split_texts(), stops=STOPS, data=st.data())
def test_a_text_cut_at_any_token_and_gone_on_with_ends_where_it_would_have(
    pieces: list[str], stops: list[str], data: st.DataObject
) -> None:
    kept, reason = drawn(stopping(stops), pieces)
    cut = data.draw(st.integers(0, max(0, len(kept) - 1)))
    before, _ = drawn(stopping(stops), pieces[:cut])
    rest, again = drawn(stopping(stops, said="".join(before)), pieces[cut:])
    assert (before + rest, again) == (kept, reason)


@given(said=TEXTS, pieces=split_texts(), stops=STOPS)
def test_a_stop_may_begin_in_what_was_said_before_but_does_not_end_there(
    said: str, pieces: list[str], stops: list[str]
) -> None:
    kept, _ = drawn(stopping(stops, said=said), pieces)
    end = first_end(said + "".join(pieces), stops, after=len(said))
    lengths = list(accumulate(map(len, pieces), initial=len(said)))
    reached = next((each for each in lengths if end is not None and each >= end), lengths[-1])
    assert len(said + "".join(kept)) == reached


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        ("🙂", ["so ", "🙂"]),
        (FAMILY, ["\U0001f468\u200d", "\U0001f469\u200d", "\U0001f467"]),
        ("日本", ["a日", "本b"]),
        ("e\u0301", ["e", "\u0301"]),
        ("\n\n", ["x\n", "\ny"]),
        ("b", ["abc"]),
        ("abc", ["a", "b", "c"]),
        ("aab", ["aa", "ab"]),
    ],
)
def test_a_stop_may_be_any_text_within_a_token_or_over_several(
    stop: str, pieces: list[str]
) -> None:
    assert drawn(stopping([stop]), [*pieces, "x"]) == (pieces, "stop_sequence")


@pytest.mark.parametrize(("stop", "piece"), [("é", "e\u0301"), ("e\u0301", "é"), ("A", "a")])
def test_stops_are_compared_by_code_points_and_nothing_is_normalized(stop: str, piece: str) -> None:
    assert drawn(stopping([stop]), [piece])[1] is None


def test_a_piece_that_adds_nothing_ends_nothing_a_second_time() -> None:
    assert drawn(stopping(["a"], said="a"), ["", "", "b"])[1] is None


# other reasons


def test_the_reasons_to_end_have_an_order() -> None:
    everything: dict[str, Any] = {
        "stops": ["a"],
        "stop_token_ids": (EOS, PLAIN),
        "held": 9,
        "context_size": 10,
    }
    assert stopping(**everything).push(EOS, "a", fulfilled=True) == "eos"
    assert stopping(**everything).push(PLAIN, "a", fulfilled=True) == "stop_token"
    del everything["stop_token_ids"]
    assert stopping(**everything).push(PLAIN, "a", fulfilled=True) == "stop_sequence"
    assert stopping(**everything).push(PLAIN, "b", fulfilled=True) == "constraint"
    assert stopping(**everything).push(PLAIN, "b") == "context_full"
    assert stopping(**everything | {"held": 8}).push(PLAIN, "b") is None


def test_an_ignored_end_of_text_is_a_token_like_others() -> None:
    assert stopping(ignore_eos=True).push(EOS, "") is None
    assert stopping(ignore_eos=True, stop_token_ids=(EOS,)).push(EOS, "") == "stop_token"


def test_any_of_several_ends_of_text_is_one() -> None:
    both = (EOS, TokenId(3))
    assert [stopping(eos=both).push(token, "") for token in both] == ["eos", "eos"]
    assert stopping(eos=both).push(PLAIN, "") is None


@given(held=st.integers(0, 5), context_size=st.integers(1, 12))
def test_a_text_goes_on_until_the_context_is_full(held: int, context_size: int) -> None:
    watch = stopping(held=held, context_size=context_size)
    kept, reason = drawn(watch, ["x"] * 20)
    assert (len(kept), reason) == (max(1, context_size - held), "context_full")
