"""States that leave one server and go on at another."""

import gzip
import json
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from domain.chain import Row
from domain.export import Line
from domain.packing import Packer
from domain.reading import Reading
from infra.log.restore import restore
from tests.app.api import (
    LONG_TEXT,
    Json,
    assert_problem,
    assert_verified,
    beams,
    configure,
    create,
    delete,
    events,
    fork,
    forward,
    generate,
    head,
    multi,
    nothing_recorded,
    ok,
    read,
    rewind,
)
from tests.builders import created, forwarded, state_id
from tests.domain.exporting import chained, ended, forked, lines_of_log, lines_of_states
from tests.forking import FastServer, Nursery

GZIP = {"Content-Type": "application/gzip"}
MAX_IMPORT_BYTES = 200_000
SAMPLED = {"temperature": 1.5, "seed": 11}


@pytest.fixture(scope="module")
def elsewhere(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Another server, with a log of its own, that takes in files of a certain size."""
    database = tmp_path_factory.mktemp("elsewhere") / "cacher.db"
    settings = {
        "CACHER_MAX_IMPORT_BYTES": str(MAX_IMPORT_BYTES),
        "CACHER_MAX_BODY_BYTES": "1024",
    }
    with FastServer(nursery, database, **settings) as running, running.client() as connected:
        yield connected


def export(client: httpx.Client, name: str, **parameters: Any) -> bytes:
    answer = client.get(f"/v1/states/{name}/export", params=parameters)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/gzip"
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}.jsonl.gz"'
    return answer.content


def send(client: httpx.Client, file: bytes, **headers: str) -> httpx.Response:
    return client.post("/v1/states/import", content=file, headers=GZIP | headers)


def lines_in(file: bytes) -> list[Json]:
    return [json.loads(line) for line in gzip.decompress(file).splitlines()]


def states_in(file: bytes) -> dict[str, int]:
    """The states in a file, each with the number of its events."""
    found: dict[str, int] = {}
    for line in lines_in(file):
        if line["line"] == "event":
            found[line["state_id"]] = found.get(line["state_id"], 0) + 1
    return found


def packed(lines: Sequence[bytes]) -> bytes:
    packer = Packer()
    return packer.pack(b"".join(lines)) + packer.end()


def a_family(client: httpx.Client) -> tuple[str, str, str]:
    """A state, one forked from a continuation of it, and one that both were merged to."""
    parent: str = create(client, config={**SAMPLED, "store_logits": "top_k"})["state_id"]
    generate(client, parent, top_logprobs=2)
    configure(client, parent, store_logits="full")
    multi(client, parent, n=2, max_tokens=4)
    child: str = fork(client, parent, continuation={"version": 4, "index": 1})[0]["state_id"]
    beams(client, parent, num_beams=2, max_length=4)
    rewind(client, parent, version=1)
    generate(client, child, max_tokens=4)
    merged = client.post("/v1/states/merge", json={"state_ids": [child, parent]})
    grandchild: str = ok(merged)["state_id"]
    forward(client, grandchild)
    return parent, child, grandchild


# there and back


def test_a_state_goes_on_elsewhere_exactly_as_it_would_have_here(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    family = a_family(client)
    file = export(client, family[-1])
    answer = ok(send(elsewhere, file))
    assert answer["imported"] == list(family)
    assert answer["events"] == sum(states_in(file).values())
    assert answer["state"] == read(client, family[-1]) == read(elsewhere, family[-1])
    for name in family:
        assert read(elsewhere, name, include="tokens") == read(client, name, include="tokens")
        moved, stayed = events(elsewhere, name), events(client, name)
        for key in ("version", "type", "payload", "fingerprint"):
            assert [one[key] for one in moved] == [one[key] for one in stayed]
        assert generate(elsewhere, name, max_tokens=12) == generate(client, name, max_tokens=12)
    assert_verified(elsewhere, *family)


def test_a_state_that_slid_goes_on_elsewhere(client: httpx.Client, elsewhere: httpx.Client) -> None:
    config = {"context_size": 24, "on_full": "slide", **SAMPLED}
    name: str = create(client, config=config)["state_id"]
    generate(client, name, max_tokens=40, ignore_eos=True)
    assert read(client, name)["dropped"] > 0
    ok(send(elsewhere, export(client, name)))
    wish: Json = {"max_tokens": 20, "ignore_eos": True}
    assert generate(elsewhere, name, **wish) == generate(client, name, **wish)
    assert_verified(elsewhere, name)


def test_what_was_imported_can_be_exported_again_with_where_it_was_first(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    name: str = create(client)["state_id"]
    first = export(client, name)
    ok(send(elsewhere, first))
    generate(elsewhere, name, max_tokens=2)
    begun, grown = [line for line in lines_in(export(elsewhere, name)) if line["line"] == "event"]
    source = json.loads(begun["source"])
    assert source["log_id"] == head(client)["log_id"]
    assert source["hash"] == events(client, name)[0]["hash"]
    assert "source" not in grown
    with nothing_recorded(client):  # it never left
        assert_problem(send(client, export(elsewhere, name)), 409, "state-exists")


def test_the_same_state_makes_the_same_file_while_the_log_stands_still(
    client: httpx.Client,
) -> None:
    name: str = create(client)["state_id"]
    assert export(client, name) == export(client, name)


def test_a_file_can_be_read_without_this_program(client: httpx.Client) -> None:
    name: str = create(client, config={"store_logits": "top_k"})["state_id"]
    generated = generate(client, name, max_tokens=3, ignore_eos=True)
    header, *body, released, end = lines_in(export(client, name))
    assert (header["format"], header["version"], header["kind"]) == ("cacher-export", 1, "state")
    assert header["states"] == [{"state_id": name, "version": 2}]
    assert header["checkpoint"]["log_id"] == head(client)["log_id"]
    kinds = ["fingerprint", "event", "event", "logits", "logits", "logits"]
    assert [line["line"] for line in body] == kinds
    payload = json.loads(body[2]["payload"])
    assert payload["content"]["tokens"] == generated["token_ids"]
    assert payload == events(client, name)[1]["payload"]
    assert released == {"line": "released", "until": 0}
    assert (end["fingerprints"], end["events"], end["logits"]) == (1, 2, 3)


# what is in a file


def test_only_what_a_state_comes_from_is_exported_with_it(client: httpx.Client) -> None:
    parent: str = create(client)["state_id"]
    forward(client, parent)
    child: str = fork(client, parent)[0]["state_id"]
    forward(client, parent)
    sibling: str = fork(client, parent)[0]["state_id"]
    forward(client, child)
    assert states_in(export(client, child)) == {parent: 2, child: 2}
    assert states_in(export(client, child, version=1)) == {parent: 2, child: 1}
    assert states_in(export(client, sibling)) == {parent: 3, sibling: 1}
    assert states_in(export(client, parent)) == {parent: 3}


def test_a_state_as_it_was_at_a_version_is_imported_as_that(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    name: str = create(client)["state_id"]
    forward(client, name)
    generate(client, name)
    answer = ok(send(elsewhere, export(client, name, version=2)))
    assert answer["state"] == read(client, name, version=2)


def test_a_deleted_state_is_exported_and_stays_deleted(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    name: str = create(client)["state_id"]
    delete(client, name)
    answer = ok(send(elsewhere, export(client, name)))
    assert answer == {"state": None, "imported": [name], "events": 2}
    assert_problem(elsewhere.get(f"/v1/states/{name}"), 404, "state-deleted")


def test_what_is_not_there_is_not_exported(client: httpx.Client) -> None:
    assert_problem(client.get("/v1/states/state-0/export"), 404, "state-not-found")
    name: str = create(client)["state_id"]
    for version in (0, 2, -1):
        answer = client.get(f"/v1/states/{name}/export", params={"version": version})
        assert_problem(answer, 404, "version-not-found")


def test_an_export_is_of_one_moment_while_the_log_goes_on(client: httpx.Client) -> None:
    name: str = create(client)["state_id"]
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(lambda: [forward(client, name) for _ in range(20)])
        files = [export(client, name) for _ in range(10)]
        writing.result()
    sizes = [sum(states_in(file).values()) for file in files]
    assert sizes == sorted(sizes)
    for file, size in zip(files, sizes, strict=True):
        assert lines_in(file)[0]["states"] == [{"state_id": name, "version": size}]


# a log that is damaged


def damage(database: Path, position: int) -> None:
    """Overwrite what an event holds."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE events SET payload = '{' WHERE position = ?", (position,))
        connection.commit()


def test_an_export_of_damaged_events_begins_as_a_problem_or_is_cut_off_with_a_line_in_the_log(
    nursery: Nursery, tmp_path: Path
) -> None:
    database, errors, name = tmp_path / "cacher.db", tmp_path / "errors", state_id(0)
    rows = chained((0, created()), *((0, forwarded(3 + n)) for n in range(700)))
    restore(Reading(ended(lines_of_log(rows, {}))), database)
    with FastServer(nursery, database, errors) as server, server.client() as client:
        damage(database, 600)
        with client.stream("GET", f"/v1/states/{name}/export") as answer:
            assert answer.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()
        damage(database, 2)
        assert_problem(client.get(f"/v1/states/{name}/export"), 503, "log-damaged")
    logged = errors.read_text()
    assert logged.count("an export was cut off: position 600: not a known event") == 1
    begun, _, _ = logged.partition("the log is damaged")
    assert "Traceback" not in begun


# answers


def test_a_retry_with_the_same_key_gets_the_same_answer(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    name: str = create(client)["state_id"]
    file = export(client, name)
    key = {"Idempotency-Key": f"import-{name}"}
    first = send(elsewhere, file, **key)
    generate(elsewhere, name)
    with nothing_recorded(elsewhere):
        again = send(elsewhere, file, **key)
        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["location"] == first.headers["location"] == f"/v1/states/{name}"
        assert again.headers["etag"] == first.headers["etag"] == '"1"'
        other = send(elsewhere, export(client, create(client)["state_id"]), **key)
        assert_problem(other, 409, "idempotency-key-reused")


def test_of_two_imports_of_one_state_exactly_one_succeeds(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    file = export(client, create(client)["state_id"])
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: send(elsewhere, file), range(2)))
    assert sorted(answer.status_code for answer in answers) == [201, 409]


# what is here already


def family(number: int, *, text: str = "abc") -> list[Row]:
    """A state, two forks of it as it was at version 2, and one more event of it."""
    parent, first, second = 3 * number, 3 * number + 1, 3 * number + 2
    return chained(
        (parent, created(text)),
        (parent, forwarded(len(text))),
        (first, forked(parent, 2)),
        (second, forked(parent, 2)),
        (parent, forwarded(len(text) + 1)),
    )


def of(rows: Sequence[Row], asked: dict[int, int], *held: int) -> bytes:
    return packed(ended(lines_of_states(rows, asked, held, {})))


def test_an_ancestor_that_is_here_with_the_same_events_is_left_as_it_is(
    elsewhere: httpx.Client,
) -> None:
    rows = family(100)
    parent, first, second = (state_id(300 + n) for n in range(3))
    answer = ok(send(elsewhere, of(rows, {301: 1}, 1, 2, 3)))
    assert (answer["imported"], answer["events"]) == ([parent, first], 3)
    configure(elsewhere, parent, temperature=0.5)
    answer = ok(send(elsewhere, of(rows, {302: 1}, 1, 2, 4)))
    assert (answer["imported"], answer["events"]) == ([second], 1)
    assert read(elsewhere, parent)["version"] == 3


def test_an_ancestor_that_is_here_with_other_events_is_refused(elsewhere: httpx.Client) -> None:
    ok(send(elsewhere, of(family(101), {304: 1}, 1, 2, 3)))
    with nothing_recorded(elsewhere):
        forged = of(family(101, text="xyz"), {305: 1}, 1, 2, 4)
        problem = assert_problem(send(elsewhere, forged), 409, "state-exists")
        assert problem["state_id"] == state_id(303)
        shorter = chained((303, created()), (303, forwarded(3)), (305, forked(303, 3)))
        assert_problem(send(elsewhere, of(shorter, {305: 1}, 1, 2, 3)), 400, "broken-export")


def test_an_ancestor_that_is_here_with_fewer_events_is_refused(elsewhere: httpx.Client) -> None:
    rows = chained(
        (310, created()), (310, forwarded(3)), (311, forked(310, 1)), (312, forked(310, 2))
    )
    ok(send(elsewhere, of(rows, {311: 1}, 1, 3)))
    with nothing_recorded(elsewhere):
        refused = send(elsewhere, of(rows, {312: 1}, 1, 2, 4))
        assert assert_problem(refused, 409, "state-exists")["state_id"] == state_id(310)


# refusals change nothing


def test_a_body_of_another_type_is_refused(client: httpx.Client, elsewhere: httpx.Client) -> None:
    file = export(client, create(client)["state_id"])
    with nothing_recorded(elsewhere):
        for kind in ("application/json", "application/x-gzip", ""):
            answer = send(elsewhere, file, **{"Content-Type": kind})
            assert_problem(answer, 415, "unsupported-media-type")


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"{}",
        packed([]),
        packed([b"{}\n"]),
        packed(ended(lines_of_log(family(200), {}))),
        packed(ended(lines_of_states(family(200), {600: 2}, (1, 2), {}))[:-1]),
        packed(ended(lines_of_states(family(200), {600: 2}, (1, 2), {}, erasable=True))),
        packed(ended(lines_of_states(family(200), {601: 1}, (3,), {}))),
        packed(ended(lines_of_states(family(200), {600: 2}, (1, 2), {}, version=2))),
        packed(ended(lines_of_states(family(200), {600: 2}, (1, 2), {}))) + b"more",
        packed(ended(lines_of_states(family(200), {600: 2}, (1, 2), {})))[:-9],
    ],
    ids=[
        "nothing",
        "no gzip",
        "no lines",
        "no export",
        "a whole log",
        "cut off",
        "sealed",
        "without its ancestors",
        "a newer release",
        "more after it",
        "half a file",
    ],
)
def test_a_file_that_does_not_prove_what_it_holds_is_refused(
    elsewhere: httpx.Client, file: bytes
) -> None:
    with nothing_recorded(elsewhere):
        assert_problem(send(elsewhere, file), 400, "broken-export")


def changed(lines: list[Line], at: int) -> bytes:
    written = ended(lines)
    written[at] = written[at].replace(b"a", b"b", 1)
    return packed(written)


def test_the_file_that_is_refused_when_changed_is_taken_when_it_is_not(
    elsewhere: httpx.Client,
) -> None:
    lines = lines_of_states(family(201), {603: 2}, (1, 2), {})
    with nothing_recorded(elsewhere):
        for at in range(len(lines) + 2):
            assert_problem(send(elsewhere, changed(lines, at)), 400, "broken-export")
    ok(send(elsewhere, packed(ended(lines))))


def test_a_file_larger_than_any_other_body_is_taken_up_to_its_own_limit(
    client: httpx.Client, elsewhere: httpx.Client
) -> None:
    name: str = create(client, text=LONG_TEXT, config={"store_logits": "full"})["state_id"]
    generate(client, name, max_tokens=40, ignore_eos=True)
    file = export(client, name)
    assert 1024 < len(file) < MAX_IMPORT_BYTES
    assert elsewhere.post("/v1/forward", json={"text": "a" * 2000}).status_code == 413
    ok(send(elsewhere, file))
    with nothing_recorded(elsewhere):
        too_large = send(elsewhere, file.ljust(MAX_IMPORT_BYTES + 1, b"\0"))
        assert too_large.status_code == 413
        assert_problem(send(elsewhere, file.ljust(MAX_IMPORT_BYTES, b"\0")), 400, "broken-export")


def test_a_file_that_unpacks_to_too_much_is_refused(elsewhere: httpx.Client) -> None:
    lines = ended(lines_of_states(family(202), {606: 2}, (1, 2), {}))
    bomb = packed([*lines[:-1], b"0" * (4 * MAX_IMPORT_BYTES), b"\n"])
    assert len(bomb) < MAX_IMPORT_BYTES
    with nothing_recorded(elsewhere):
        assert_problem(send(elsewhere, bomb), 413, "too-large")


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (700, {"content": replace(created().content, tokens=(97, 10**6, 99))}),
        (701, {"content": replace(created().content, tokens=(97, -5, 99))}),
        (702, {"config": replace(created().config, context_size=100_000)}),
    ],
    ids=["a token beyond the vocabulary", "no token at all", "a longer context"],
)
def test_a_state_of_another_model_of_this_name_can_be_read_and_not_run(
    elsewhere: httpx.Client, number: int, changes: Json
) -> None:
    rows = chained((number, replace(created(), **changes)))
    imported = ok(send(elsewhere, packed(ended(lines_of_states(rows, {number: 1}, (1,), {})))))
    state = imported["state"]["state_id"]
    assert read(elsewhere, state)["version"] == 1
    with nothing_recorded(elsewhere):
        wishes: dict[str, Json] = {
            "generate/token": {},
            "generate/multi": {"n": 2},
            "generate/beam": {"num_beams": 2, "max_length": 2},
            "forward": {"text": "more"},
            "states/config": {"config": {"temperature": 1}},
            "states/fork": {},
        }
        for path, body in wishes.items():
            answer = elsewhere.post(f"/v1/{path}", json={"state_id": state, **body})
            problem = assert_problem(answer, 409, "not-runnable")
            assert problem["state_id"] == state
    found = ok(elsewhere.get(f"/v1/states/{state}/diff/{state}", params={"version_b": 1}))
    assert found["common_prefix"]["tokens"] == 3


def test_metadata_that_no_client_may_give_is_not_imported(elsewhere: httpx.Client) -> None:
    deep: Json = {}
    for _ in range(300):
        deep = {"deeper": deep}
    rows = chained((703, replace(created(), metadata=deep)))
    with nothing_recorded(elsewhere):
        file = packed(ended(lines_of_states(rows, {703: 1}, (1,), {})))
        assert_problem(send(elsewhere, file), 400, "broken-export")
