"""Server-sent events (WHATWG HTML, section 9.2): one JSON document on one line per event."""

from typing import Any, Final

import msgspec

MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

HEARTBEAT: Final = b": nothing new\n\n"
"""A comment: it keeps a connection open, and finds out that nobody is there any more."""


def event(name: str, data: Any, event_id: int | None = None) -> bytes:
    """One event. JSON has no raw line breaks, so one ``data`` line holds it."""
    identity = b"" if event_id is None else b"id: %d\n" % event_id
    return b"event: %s\n%sdata: %s\n\n" % (name.encode(), identity, msgspec.json.encode(data))


def retry(after_ms: int) -> bytes:
    """How long a client waits before it connects again."""
    return b"retry: %d\n\n" % after_ms
