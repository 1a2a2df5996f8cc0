"""Logs that earlier releases wrote open, fold, verify and go on.

Each was written over HTTP by the last release of its schema, on ``cacher-tiny``, with every kind of
operation that there was; then the server was stopped.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import pytest

from domain.chain import COLUMNS, Head
from domain.events import SCHEMA
from tests.end_to_end.calls import Json, query, verified, walk_chain
from tests.faults.whole import HALF_THERE
from tests.forking import FastServer, Nursery

DATA: Final = Path(__file__).parent / "data"
HEADS: Final = {
    1: "21:ecae4f91574629822202227d2c1789e0387fc678f2ed951ec8f9089aa63408e0",
    2: "42:d1c37220aad9e34e894eb029b5af668bb3cbb678968bb744977d0e09d6ca8f25",
    3: "45:717ec4c50942e2469fc2928a4c1c6491ea2d01766a9b1f8c71dc064feabbc415",
}
"""By schema, the head as it was when the log was written."""
MIGRATED: Final = {1: 1, 2: 1, 3: 2}
"""By schema, the newest migration that there was."""
NO_KEYS: Final = {"an event whose key is not there"}
"""What these logs' clients did not send."""


class Old(NamedTuple):
    """An old log, as it was, and a server of this release on a copy of it."""

    schema: int
    original: Path
    server: FastServer
    client: httpx.Client

    @property
    def database(self) -> Path:
        return self.server.database

    def read(self, sql: str) -> list[Any]:
        return query(self.database, sql)

    def get(self, path: str) -> Json:
        found: Json = self.client.get(path).raise_for_status().json()
        return found


@pytest.fixture(scope="module", params=HEADS)
def old(
    request: pytest.FixtureRequest, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Old]:
    folder = tmp_path_factory.mktemp("old")
    content = gzip.decompress((DATA / f"schema_{request.param}.db.gz").read_bytes())
    original, database = folder / "original.db", folder / "cacher.db"
    original.write_bytes(content)
    database.write_bytes(content)
    with FastServer(nursery, database) as server, server.client() as client:
        yield Old(request.param, original, server, client)


def head_of(text: str) -> Head:
    position, _, digest = text.partition(":")
    return Head(position=int(position), hash=bytes.fromhex(digest))  # type: ignore[arg-type]


def test_an_old_log_is_of_its_schema(old: Old) -> None:
    assert query(old.original, "SELECT DISTINCT schema FROM events") == [(old.schema,)]
    newest = [(MIGRATED[old.schema],)]
    assert query(old.original, "SELECT max(number) FROM schema_migrations") == newest


def test_an_old_log_is_migrated_after_a_copy_was_made_of_it(old: Old) -> None:
    number = MIGRATED[old.schema]
    copy = Path(f"{old.database}.backup-{number}")
    assert query(copy, "SELECT max(number) FROM schema_migrations") == [(number,)]
    events = "SELECT * FROM events ORDER BY position"
    assert query(copy, events) == query(old.original, events)
    assert old.read("SELECT max(number) >= 3 FROM schema_migrations") == [(1,)]


def test_an_old_log_keeps_its_events_and_its_head(old: Old) -> None:
    columns = ", ".join(set(COLUMNS) - {"source"})
    events = f"SELECT {columns} FROM events ORDER BY position LIMIT ?"
    head = head_of(HEADS[old.schema])
    assert query(old.original, events, -1) == query(old.database, events, head.position)
    found = old.get(f"/v1/audit/head?size={head.position}")
    assert (found["position"], found["hash"]) == (head.position, head.hash.hex())


def test_the_tables_of_this_release_are_made_from_the_events_of_an_old_log(old: Old) -> None:
    for fault in HALF_THERE.keys() - NO_KEYS:
        assert (fault, old.read(HALF_THERE[fault])) == (fault, [])
    assert old.read("SELECT count(*) > 0 FROM parents") == [(1,)]
    assert old.read("SELECT bytes > 0, released_until FROM logits_kept") == [(1, 0)]


def test_every_state_of_an_old_log_is_listed_and_folds(old: Old) -> None:
    states = "SELECT state_id, max(version), max(type = 'state_deleted') FROM events"
    found = old.read(f"{states} GROUP BY state_id")
    listed = {state["state_id"] for state in old.get("/v1/states?limit=100")["states"]}
    assert listed == {state_id for state_id, _, deleted in found if not deleted}
    for state_id, version, deleted in found:
        events = old.get(f"/v1/states/{state_id}/events?limit=1000")["events"]
        assert [event["version"] for event in events] == list(range(1, version + 1))
        if not deleted:
            state = old.get(f"/v1/states/{state_id}?include=tokens")
            assert (state["version"], len(state["tokens"])) == (version, state["head_position"])


def test_an_old_log_is_verified(old: Old) -> None:
    report = verified(old.client)
    assert report["divergences"] == []
    assert report["events_checked"] == head_of(HEADS[old.schema]).position
    assert report["tokens_recomputed"] > 0
    fingerprints = {drift["recorded_fingerprint"] for drift in report["drifts"]}
    if report["result"] == "equal":
        assert not fingerprints
    else:  # written on another machine or with other libraries
        assert (report["result"], report["notes"]) == ("unverified", [])
        assert fingerprints == {name for (name,) in old.read("SELECT id FROM fingerprints")}
        assert {drift["first_changed"] for drift in report["drifts"]} == {None}
        assert max(drift["max_logprob_delta"] for drift in report["drifts"]) < 1e-4


def test_an_old_log_goes_on(old: Old) -> None:
    before = walk_chain(old.database)
    sql = "SELECT state_id FROM states WHERE deleted = 0 ORDER BY created_position LIMIT 1"
    ((state_id,),) = old.read(sql)
    body = {"state_id": state_id, "max_tokens": 3}
    answer = old.client.post("/v1/generate/token", json=body).raise_for_status().json()
    assert len(answer["token_ids"]) >= 1
    assert walk_chain(old.database, before).position == before.position + 1
    newest = "SELECT schema FROM events ORDER BY position DESC LIMIT 1"
    assert old.read(newest) == [(SCHEMA,)]


def test_an_old_log_can_be_looked_into(old: Old) -> None:
    sql = "SELECT state_id FROM states WHERE deleted = 0 ORDER BY created_position DESC LIMIT 1"
    ((state_id,),) = old.read(sql)
    old.get(f"/v1/analyze/next/{state_id}?version=1")
    newest = "SELECT type, version, at_version, schema FROM events ORDER BY position DESC LIMIT 1"
    assert old.read(newest) == [("state_analyzed", None, 1, SCHEMA)]
    assert len(old.get(f"/v1/states/{state_id}/analyses")["events"]) == 1
    report = verified(old.client)
    assert (report["divergences"], report["analyses"]) == ([], 1)
