"""Requests that can be sent again, and looks into a database beside its server."""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from domain.chain import Head, follow, genesis
from infra.log.batch import as_row
from infra.log.queries import LOG_ID, ROWS

Json = dict[str, Any]

OPENING = "Once upon a time, there was a little bear who lived in the forest with his mother. "
LONG = OPENING * 3
"""More tokens than two blocks of the KV cache hold."""


class Ask(NamedTuple):
    """A request with its ``Idempotency-Key``, which is its ``X-Request-ID`` too."""

    method: str
    path: str
    body: Json | None
    key: str

    @property
    def options(self) -> Json:
        """Arguments for a request of httpx."""
        headers = {"Idempotency-Key": self.key, "X-Request-ID": self.key}
        return {"headers": headers} | ({} if self.body is None else {"json": self.body})

    def send(self, client: httpx.Client) -> httpx.Response:
        return client.request(self.method, self.path, **self.options)


class ServerSentEvent(NamedTuple):
    name: str
    data: Json


def server_sent(lines: Iterator[str]) -> Iterator[ServerSentEvent]:
    """The events of a stream as they come."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield ServerSentEvent(name, json.loads(value))


def events_of(answer: httpx.Response) -> list[ServerSentEvent]:
    """The events of a stream that has ended."""
    return list(server_sent(iter(answer.text.split("\n"))))


def token_ids(events: list[ServerSentEvent]) -> list[int]:
    return [event.data["token_id"] for event in events if event.name == "token"]


def verified(client: httpx.Client) -> Json:
    """The report on the whole log, however long it takes."""
    answer = client.post("/v1/replay/verify", json={"all": True})
    found: Json = answer.raise_for_status().json()
    while answer.status_code == 202 and found["status"] in ("waiting", "running"):
        time.sleep(0.05)
        found = client.get(answer.headers["Location"]).raise_for_status().json()
    report: Json = found["report"] if answer.status_code == 202 else found
    return report


def query(database: Path, sql: str, *parameters: Any) -> list[Any]:
    """Read a database, also beside a server."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, parameters).fetchall()


def walk_chain(database: Path, head: Head | None = None) -> Head:
    """The newest head, reached over an unbroken chain from ``head`` or from the genesis."""
    head = head or genesis(*query(database, LOG_ID)[0])
    for columns in query(database, ROWS, head.position, 2**63 - 1, -1):
        head = follow(head, as_row(columns))
    return head
