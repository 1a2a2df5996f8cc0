"""Eight clients at work, the server killed again and again at any moment: nothing is lost.

``python -m tests.end_to_end.random_kills --rounds 500`` prints the figures of a long run.
"""

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from domain.chain import Head, blobs_digest
from tests.end_to_end.calls import Json, ServerSentEvent, query, verified
from tests.end_to_end.clients import (
    Acknowledged,
    RandomClient,
    Shared,
    streamed,
)
from tests.faults.whole import check_whole
from tests.forking import FastServer, Nursery

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
    "analyze": "state_analyzed",
    "delete": "state_deleted",
}


class Row(NamedTuple):
    """An event as the database has it; ``version`` is that which an analysis saw."""

    position: int
    request_id: str
    state_id: str
    version: int
    type: str
    payload: dict[str, Any]


def rows(database: Path, after: int) -> list[Row]:
    columns = "position, request_id, state_id, coalesce(version, at_version), type, payload"
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
        self._remembered: dict[str, Any] | None = None
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
            self._remembered = http.get("/v1/audit/head").json()
            self.server.kill()
            for thread in threads:
                thread.join()
        self.kills += 1

    def check(self) -> None:
        """Everything acknowledged is there, nothing is half there, and a reader sees just that."""
        database = self.server.database
        assert [client.unexpected for client in self.clients] == [[]] * CLIENTS
        for row in rows(database, self._head.position if self._head else 0):
            check_stored_logits(database, row)
            self._rows[row.request_id].append(row)
        self._head = check_whole(database, self._head)
        self.lost = [one for one in self.acknowledged if not self._rows[one.request.ask.key]]
        assert self.lost == []
        for one in self.acknowledged:
            check_recorded(one, self._rows[one.request.ask.key])
        with self.server.client() as http:
            self._check_remembered(http)
            self._check_list(http)
            self._send_again(http)

    def _check_remembered(self, http: httpx.Client) -> None:
        """The log as it stood just before the kill is what the one that stands now began as."""
        if self._remembered is not None:
            size = self._remembered["size"]
            then = http.get("/v1/audit/head", params={"size": size}).json()
            assert (size, then) == (size, self._remembered)

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
        assert (head["position"], head["hash"]) == (self._head.position, self._head.hash.hex())

    def finish(self) -> None:
        """Send what the last kill cut off once more."""
        with self.server.client() as http:
            for client in self.clients:
                client.finish(http)

    def verify(self) -> Json:
        with self.server.client() as http:
            return verified(http)

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


def run(
    server: FastServer,
    *,
    kills: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda kills, acknowledged: None,
) -> dict[str, Any]:
    """Kill so many times, check after each start, verify at the end; returns the figures."""
    began, trial = time.monotonic(), Trial(server, seed)
    for done in range(kills):
        server.start()
        trial.check()
        trial.work_and_kill()
        progress(done + 1, len(trial.acknowledged))
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


def main() -> None:
    """Run as often as is asked for, on a database in a new folder, which is kept if it fails."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=500, help="kills (default: 500)")
    options.add_argument("--seed", type=int, default=random.randrange(2**32))
    asked = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cacher-kills-"))

    def say(kills: int, acknowledged: int) -> None:
        sys.stdout.write(f"{kills} of {asked.rounds} kills, {acknowledged} acknowledged\n")
        sys.stdout.flush()

    sys.stdout.write(f"seed {asked.seed}, database {folder / 'cacher.db'}\n")
    with Nursery() as nursery:
        server = FastServer(nursery, folder / "cacher.db")
        try:
            figures = run(server, kills=asked.rounds, seed=asked.seed, progress=say)
        finally:
            server.kill()
    sys.stdout.write(f"{figures}\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
