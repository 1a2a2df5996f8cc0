"""Eight clients at work, the server killed again and again at any moment: nothing is lost."""

import os
import random
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from domain.chain import Head, blobs_digest
from tests.end_to_end.calls import ServerSentEvent, query, walk_chain
from tests.end_to_end.clients import (
    Acknowledged,
    RandomClient,
    Shared,
    streamed,
)
from tests.end_to_end.forking import FastServer, Nursery

CLIENTS = 8
MOST_BETWEEN_KILLS = 40
"""Requests acknowledged between two kills, at most (about)."""
SENT_AGAIN = 5
"""Acknowledged requests that are sent once more after each start."""
TYPES = {
    "create": "state_created",
    "forward": "text_forwarded",
    "generate": "tokens_generated",
    "stream": "tokens_generated",
    "config": "config_changed",
    "fork": "state_created",
    "rewind": "head_rewound",
    "delete": "state_deleted",
}

# Each finds what must not be there.
HALF_THERE = {
    "versions with a gap": """
        SELECT state_id FROM events GROUP BY state_id
        HAVING count(*) != max(version) OR min(version) != 1""",
    "a state that does not begin with its creation": """
        SELECT position FROM events WHERE (version = 1) != (type = 'state_created')""",
    "an event after the deletion": """
        SELECT e.position FROM events e JOIN events d USING (state_id)
        WHERE d.type = 'state_deleted' AND e.version > d.version""",
    "a projection that is not that of the events": """
        SELECT state_id, min(position), max(version), max(type = 'state_deleted') FROM events
        GROUP BY state_id
        EXCEPT SELECT state_id, created_position, version, deleted FROM states""",
    "a projection of no events": """
        SELECT state_id FROM states EXCEPT SELECT state_id FROM events""",
    "a key whose events are not there": """
        SELECT k.key FROM idempotency_keys k WHERE last_position - first_position + 1 !=
        (SELECT count(*) FROM events e WHERE e.request_id = k.key
         AND e.position BETWEEN k.first_position AND k.last_position)""",
    "an event whose key is not there": """
        SELECT request_id FROM events EXCEPT SELECT key FROM idempotency_keys""",
    "a fingerprint that is not there": """
        SELECT fingerprint FROM events WHERE fingerprint IS NOT NULL
        EXCEPT SELECT id FROM fingerprints""",
    "logits of no event": """
        SELECT position FROM logits EXCEPT SELECT position FROM events""",
}


class Row(NamedTuple):
    """An event as the database has it."""

    position: int
    request_id: str
    state_id: str
    version: int
    type: str
    payload: dict[str, Any]


def rows(database: Path, after: int) -> list[Row]:
    columns = "position, request_id, state_id, version, type, payload"
    found = query(database, f"SELECT {columns} FROM events WHERE position > ?", after)
    return [Row(*columns, msgspec.json.decode(payload)) for *columns, payload in found]


def check_stored_logits(database: Path, row: Row) -> None:
    stored = row.payload.get("stored_logits")
    if stored:
        sql = "SELECT data FROM logits WHERE position = ? ORDER BY step"
        blobs = tuple(data for (data,) in query(database, sql, row.position))
        assert len(blobs) == len(row.payload["content"]["tokens"])
        assert blobs_digest(blobs) == stored["digest"]


def check_recorded(acknowledged: Acknowledged, recorded: list[Row]) -> None:
    """What an answer said is what the events of its request say."""
    kind, answer = acknowledged.request.kind, acknowledged.answer
    assert [row.state_id for row in recorded] == acknowledged.state_ids
    assert {row.type for row in recorded} == {TYPES[kind]}
    versions = {row.version for row in recorded}
    if kind in ("create", "fork"):
        assert versions == {1}
    elif kind != "delete":
        assert versions == {answer["version"]}
    said: dict[str, Any] = {}
    match kind:
        case "generate" | "stream":
            said = {"tokens": answer["token_ids"], "text": answer["text"]}
        case "forward":
            said = {"tokens": [token["token_id"] for token in answer["tokens"]]}
        case "create":
            said = {"text": answer["text"]}
    for field, value in said.items():
        assert recorded[0].payload["content"][field] == value


def tokens_of(received: bytes | bytearray) -> list[ServerSentEvent]:
    return [event for event in streamed(received) if event.name == "token"]


class Trial:
    """One database, its server, its clients, and what has been found to be in order so far."""

    def __init__(self, server: FastServer, seed: int) -> None:
        shared = Shared()
        self.server = server
        self.clients = [RandomClient(f"client-{n}", seed, shared) for n in range(CLIENTS)]
        self.kills = 0
        self.lost: list[Acknowledged] = []
        self._chance = random.Random(seed)
        self._head: Head | None = None
        self._rows: dict[str, list[Row]] = defaultdict(list)

    @property
    def acknowledged(self) -> list[Acknowledged]:
        return [one for client in self.clients for one in client.acknowledged]

    def work_and_kill(self) -> None:
        """Let the clients work until the server is killed under them."""
        wanted = self._chance.randint(-MOST_BETWEEN_KILLS // 4, MOST_BETWEEN_KILLS)
        wanted += len(self.acknowledged)
        with self.server.client() as http:
            threads = [threading.Thread(target=c.run, args=[http]) for c in self.clients]
            for thread in threads:
                thread.start()
            while len(self.acknowledged) < wanted and any(t.is_alive() for t in threads):
                time.sleep(0.01)
            time.sleep(self._chance.uniform(0, 0.3))
            self.server.kill()
            for thread in threads:
                thread.join()
        self.kills += 1

    def check(self) -> None:
        """Everything acknowledged is there, nothing is half there, and a reader sees just that."""
        database = self.server.database
        assert [client.unexpected for client in self.clients] == [[]] * CLIENTS
        assert query(database, "PRAGMA integrity_check") == [("ok",)]
        for fault, sql in HALF_THERE.items():
            assert (fault, query(database, sql)) == (fault, [])
        for row in rows(database, self._head.position if self._head else 0):
            check_stored_logits(database, row)
            self._rows[row.request_id].append(row)
        self._head = walk_chain(database, self._head)
        self.lost = [one for one in self.acknowledged if not self._rows[one.request.ask.key]]
        assert self.lost == []
        for one in self.acknowledged:
            check_recorded(one, self._rows[one.request.ask.key])
        with self.server.client() as http:
            self._check_list(http)
            self._send_again(http)

    def _check_list(self, http: httpx.Client) -> None:
        """The list of states, page by page, is that of the events."""
        listed: dict[str, int] = {}
        parameters: dict[str, Any] = {"limit": 20}
        while True:
            page = http.get("/v1/states", params=parameters).json()
            listed |= {state["state_id"]: state["version"] for state in page["states"]}
            if page["next_cursor"] is None:
                break
            parameters["cursor"] = page["next_cursor"]
        live = "GROUP BY state_id HAVING max(type = 'state_deleted') = 0"
        sql = f"SELECT state_id, max(version) FROM events {live}"
        assert listed == dict(query(self.server.database, sql))

    def _send_again(self, http: httpx.Client) -> None:
        """Some acknowledged requests: the same bytes, and no event."""
        some = self._chance.sample(self.acknowledged, min(SENT_AGAIN, len(self.acknowledged)))
        for one in some:
            again = one.request.ask.send(http)
            assert (again.is_success, again.content) == (True, one.body), one.request
        head = http.get("/v1/audit/head").json()
        assert self._head is not None
        assert head == {"position": self._head.position, "hash": self._head.hash.hex()}

    def finish(self) -> None:
        """Send what the last kill cut off once more."""
        with self.server.client() as http:
            for client in self.clients:
                client.finish(http)

    def verify(self) -> dict[str, Any]:
        with self.server.client() as http:
            answer = http.post("/v1/replay/verify", json={"all": True}, timeout=1800)
        report: dict[str, Any] = answer.json()
        return report

    def check_resumed_streams(self) -> int:
        """Streams that were cut and not overtaken gave the same tokens again; how many."""
        checked = 0
        sql = "SELECT count(DISTINCT base_version) FROM generations_started WHERE key = ?"
        for before, after in [pair for client in self.clients for pair in client.resumed]:
            first, again = tokens_of(before.received), tokens_of(after.body)
            if first and query(self.server.database, sql, before.request.ask.key) == [(1,)]:
                # Another client's deletion may have ended the second one before that point.
                ended_early = after.answer["finish_reason"] == "cancelled"
                compared = min(len(first), len(again)) if ended_early else len(first)
                assert again[:compared] == first[:compared]
                checked += 1
        return checked


def run(server: FastServer, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill so many times, check after each start, verify at the end; returns the figures."""
    began, trial = time.monotonic(), Trial(server, seed)
    for _ in range(kills):
        server.start()
        trial.check()
        trial.work_and_kill()
    server.start()
    trial.check()
    trial.finish()
    trial.check()
    report = trial.verify()
    assert (report["result"], report["divergences"]) == ("equal", [])
    assert report["tokens_reused"] == 0
    assert report["events_checked"] == report["head"]["position"]
    return {
        "kills": trial.kills,
        "requests acknowledged": len(trial.acknowledged),
        "of them lost": len(trial.lost),
        "requests cut off by a kill": sum(client.cut_off for client in trial.clients),
        "cut streams that gave the same tokens again": trial.check_resumed_streams(),
        "events verified": report["events_checked"],
        "tokens recomputed": report["tokens_recomputed"],
        "seconds": round(time.monotonic() - began),
    }


def test_nothing_is_lost_in_three_kills(nursery: Nursery, tmp_path: Path) -> None:
    server = FastServer(nursery, tmp_path / "cacher.db")
    try:
        figures = run(server, kills=3, seed=1)
    finally:
        server.kill()
    assert figures["kills"] == 3
    assert figures["requests acknowledged"] > 0
    assert figures["requests cut off by a kill"] > 0


@pytest.mark.soak
def test_nothing_is_lost_in_many_kills(
    nursery: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FastServer(nursery, tmp_path / "cacher.db")
    kills = int(os.environ.get("SOAK_KILLS", "60"))
    try:
        figures = run(server, kills=kills, seed=2)
    finally:
        server.kill()
    with capsys.disabled():
        sys.stdout.write(f"\n{figures}\n")
    assert figures["kills"] == kills >= 50
    assert set(TYPES.values()) == {
        kind for (kind,) in query(server.database, "SELECT DISTINCT type FROM events")
    }
