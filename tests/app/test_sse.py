"""Server-sent events, read back by the rules of the standard."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from app import sse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def _parsed(stream: str) -> list[dict[str, str]]:
    """Events as a browser dispatches them (WHATWG HTML, 9.2.6)."""
    events: list[dict[str, str]] = []
    current: dict[str, str] = {}
    for line in re.split("\r\n|\n|\r", stream):
        if not line:
            if "data" in current:
                events.append(current)
            current = {}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        current[name] = f"{current[name]}\n{value}" if name in current else value
    return events


class Answer(Struct):
    text: str


def test_an_event_is_its_name_its_id_and_one_line_of_json() -> None:
    written = sse.event("token", Answer(text="a\nb"), 3)
    assert written == b'event: token\nid: 3\ndata: {"text":"a\\nb"}\n\n'


def test_an_event_without_an_id_has_none() -> None:
    assert sse.event("done", {}) == b"event: done\ndata: {}\n\n"


def test_the_first_id_is_zero_and_not_left_out() -> None:
    assert b"id: 0\n" in sse.event("token", {}, 0)


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["token", "done", "error"]), JSON, st.none() | st.integers(0, 2**53)
        )
    )
)
def test_whatever_is_written_can_be_read_back(events: list[tuple[str, Any, int | None]]) -> None:
    stream = b"".join(sse.event(*event) for event in events).decode()
    read = [
        (one["event"], json.loads(one["data"]), int(one["id"]) if "id" in one else None)
        for one in _parsed(stream)
    ]
    assert read == events


def test_what_is_no_event_is_read_as_none() -> None:
    assert sse.retry(2000) == b"retry: 2000\n\n"
    stream = sse.retry(2000) + sse.HEARTBEAT + sse.event("done", {}) + sse.HEARTBEAT
    assert _parsed(stream.decode()) == [{"event": "done", "data": "{}"}]


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\rb", "data: x\n\nevent: done"])
def test_a_line_break_in_a_text_does_not_break_its_event(text: str) -> None:
    (one,) = _parsed(sse.event("token", {"text": text}).decode())
    assert json.loads(one["data"]) == {"text": text}


def test_streams_are_not_kept_by_anyone_on_the_way() -> None:
    assert sse.MEDIA_TYPE == "text/event-stream"
    assert sse.HEADERS["Cache-Control"] == "no-cache"
    assert sse.HEADERS["X-Accel-Buffering"] == "no"
