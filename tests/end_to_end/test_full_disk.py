"""A server whose disk is full refuses to write, goes on reading, and writes when space is back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import httpx
import pytest

from tests.end_to_end.calls import OPENING, Ask, events_of, token_ids, verified
from tests.faults.vfs import needs_vfs
from tests.faults.whole import check_whole
from tests.forking import FastServer, Nursery

pytestmark = needs_vfs

BODIES: Final = {
    "/v1/states": {"text": OPENING},
    "/v1/forward": {"text": "One day"},
    "/v1/generate/token": {"max_tokens": 3},
    "/v1/generate/multi": {"max_tokens": 3, "n": 2},
    "/v1/generate/beam": {"max_length": 3, "num_beams": 2},
    "/v1/states/config": {"config": {"temperature": 0.5}},
    "/v1/states/fork": {},
    "/v1/states/rewind": {"position": 5},
}


class Served(NamedTuple):
    """A server with a state, and the file that fills its disk."""

    server: FastServer
    client: httpx.Client
    full: Path
    state_id: str

    def asks(self) -> list[Ask]:
        """Every kind of write."""
        of = {"state_id": self.state_id}
        asks = [
            Ask("POST", path, body if path == "/v1/states" else body | of, path)
            for path, body in BODIES.items()
        ]
        stream = {"max_tokens": 3, "stream": True} | of
        asks.insert(3, Ask("POST", "/v1/generate/token", stream, "stream"))
        return [*asks, Ask("DELETE", f"/v1/states/{self.state_id}", None, "delete")]

    def reads(self) -> dict[str, bytes]:
        """What readers see."""
        of = f"/v1/states/{self.state_id}"
        paths = [of, f"{of}/events", f"{of}?version=1", "/v1/states", "/v1/audit/head", "/ready"]
        return {path: self.client.get(path).raise_for_status().content for path in paths}


@pytest.fixture
def served(nursery: Nursery, tmp_path: Path) -> Iterator[Served]:
    full = tmp_path / "full"
    settings = {"PRELUDE": "tests.faults.switch", "FULL_DISK": str(full)}
    server = FastServer(nursery, tmp_path / "cacher.db", **settings)
    with server, server.client() as client:
        body = {"text": OPENING, "config": {"seed": None, "temperature": 1.0}}
        created = Ask("POST", "/v1/states", body, "created").send(client).raise_for_status()
        yield Served(server, client, full, created.json()["state_id"])


def test_a_full_disk_is_a_problem_that_passes(served: Served) -> None:
    before = served.reads()
    served.full.write_text("0")
    for ask in served.asks():
        refused = ask.send(served.client)
        assert (refused.status_code, ask) == (503, ask)
        assert refused.headers["content-type"].startswith("application/problem+json")
        assert int(refused.headers["retry-after"]) > 0
        problem = refused.json()
        assert problem["type"] == "/problems/log-unavailable"
        assert "full" in problem["detail"]
    assert served.reads() == before
    served.full.unlink()
    for ask in served.asks():
        answer = ask.send(served.client)
        assert answer.is_success, (ask, answer.text)
    assert check_whole(served.server.database).position == len(served.asks()) + 1
    assert verified(served.client)["result"] == "equal"


def test_a_stream_whose_disk_fills_up_ends_in_the_problem_and_is_the_same_later(
    served: Served,
) -> None:
    before = served.reads()
    body = {"state_id": served.state_id, "max_tokens": 6, "stream": True}
    ask = Ask("POST", "/v1/generate/token", body, "stream")
    served.full.write_text("1")  # the intent of the stream, and no more
    cut = events_of(ask.send(served.client))
    assert [event.name for event in cut] == ["token"] * 6 + ["error"]
    assert cut[-1].data["type"] == "/problems/log-unavailable"
    assert served.reads() == before
    served.full.unlink()
    whole = events_of(ask.send(served.client))
    assert whole[-1].name == "done"
    assert whole[:6] == cut[:6]
    assert token_ids(whole) == whole[-1].data["token_ids"]
