"""Query parameters: a route takes those that it has, each once, and refuses all others by name."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.app.api import Json, assert_problem, create, nothing_recorded, ok

EXAMPLES: dict[str, Any] = {
    "include": "tokens",
    "after": "0",
    "cursor": "1",
    "model_id": "cacher-tiny",
    "tensor": "logprobs",
    "erase": "false",
    "forks": "false",
}
"""A value of each parameter; of all others it is 1."""

MISSPELT = [
    ("GET", "/v1/states/{state}?verison=1", "verison", "version, include"),
    ("GET", "/v1/states?limt=1", "limt", "limit, cursor, model_id"),
    ("GET", "/v1/states/{state}/events?form=1", "form", "after, limit, version"),
    ("GET", "/v1/events?since=0", "since", "after, limit"),
    ("GET", "/v1/states/{state}/diff/{state}?version=1", "version", "version_a, version_b"),
    ("GET", "/v1/analyze/tokens/{state}?topk=1", "topk", "top_k, start, end, version, tensor"),
    ("POST", "/v1/generate/token?stream=true", "stream", "include"),
    ("DELETE", "/v1/states/{state}?force=true", "force", "erase, forks"),
    ("POST", "/v1/forward?dry_run", "dry_run", "there are none"),
    ("GET", "/v1/models/cacher-tiny?version=1", "version", "there are none"),
    ("GET", "/v1/models/a/b?version=1", "version", "there are none"),
    ("GET", "/v1/states/{state}?Version=1", "Version", "version, include"),
    ("GET", "/v1/states/{state}?%20version=1", " version", "version, include"),
    ("GET", "/v1/states/{state}?=1", "", "version, include"),
]


@pytest.fixture(scope="module")
def state_id(client: httpx.Client) -> str:
    """A state that every request here fails to change."""
    made: str = create(client)["state_id"]
    return made


@pytest.fixture(scope="module")
def operations(client: httpx.Client) -> list[tuple[str, str, Json]]:
    """Method, path and description of every route of the interface."""
    paths: Json = ok(client.get("/schema/openapi.json"))["paths"]
    return [
        (method.upper(), path, operation)
        for path, item in paths.items()
        for method, operation in item.items()
        if path.startswith("/v1/")
    ]


def _place(path: str, state_id: str) -> str:
    """A path of a route: its states are this one, other things are not there."""
    for name in ("state_id", "a", "b"):
        path = path.replace(f"{{{name}}}", state_id)
    return path.replace("{model_id}", "none").replace("{replay_id}", "none")


def _parameters(operation: Json) -> list[str]:
    return [one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"]


def _pairs(operations: list[tuple[str, str, Json]]) -> Iterator[tuple[str, str, str, str]]:
    """Each parameter of each route, with a value."""
    for method, path, operation in operations:
        for name in _parameters(operation):
            value = "sampling" if "/generate/" in path else EXAMPLES.get(name, "1")
            yield method, path, name, value


@pytest.mark.parametrize(("method", "path", "name", "known"), MISSPELT)
def test_a_parameter_that_a_route_does_not_have_is_refused_with_those_that_it_has(
    client: httpx.Client, state_id: str, method: str, path: str, name: str, known: str
) -> None:
    with nothing_recorded(client):
        answer = client.request(method, path.format(state=state_id))
    problem = assert_problem(answer, 400, "invalid-input", name)
    assert known in problem["detail"]


def test_every_route_refuses_a_parameter_that_it_does_not_have(
    client: httpx.Client, state_id: str, operations: list[tuple[str, str, Json]]
) -> None:
    assert len(operations) > 30
    with nothing_recorded(client):
        for method, path, operation in operations:
            answer = client.request(method, _place(path, state_id), params={"nonsense": "1"})
            problem = assert_problem(answer, 400, "invalid-input", "nonsense")
            assert all(name in problem["detail"] for name in _parameters(operation)), path


def test_every_parameter_that_is_described_is_one_that_the_route_has(
    client: httpx.Client, state_id: str, operations: list[tuple[str, str, Json]]
) -> None:
    pairs = list(_pairs(operations))
    assert len(pairs) > 30
    for method, path, name, value in pairs:
        place = client.build_request(method, _place(path, state_id), params={name: value})
        if method == "DELETE":
            place = client.build_request(method, _place(path, "none"), params={name: value})
        assert "is not a parameter here" not in client.send(place).text, (path, name)


def test_every_parameter_that_is_repeated_is_refused(
    client: httpx.Client, state_id: str, operations: list[tuple[str, str, Json]]
) -> None:
    with nothing_recorded(client):
        for method, path, name, value in _pairs(operations):
            answer = client.request(
                method, _place(path, state_id), params=[(name, value), (name, value)]
            )
            problem = assert_problem(answer, 400, "invalid-input", name)
            assert "given 2 times" in problem["detail"]


def test_all_that_is_wrong_with_parameters_is_named_at_once(
    client: httpx.Client, state_id: str
) -> None:
    asked = "version=1&verison=2&version=1&verison=3&inclde=tokens"
    answer = client.get(f"/v1/states/{state_id}?{asked}")
    assert_problem(answer, 400, "invalid-input", "version", "verison", "inclde")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_what_a_probe_asks_with_changes_nothing(client: httpx.Client, path: str) -> None:
    assert client.get(path, params={"at": "1"}).is_success


def test_no_more_than_a_hundred_parameters_are_named(client: httpx.Client) -> None:
    answer = client.get("/v1/states", params={f"p{number}": "1" for number in range(500)})
    assert len(assert_problem(answer, 400, "invalid-input")["errors"]) == 100


@pytest.mark.parametrize("query", ["", "?", "?&", "?version=1", "?include=tokens&version=1&"])
def test_a_query_of_known_parameters_is_answered(
    client: httpx.Client, state_id: str, query: str
) -> None:
    assert ok(client.get(f"/v1/states/{state_id}{query}"))["version"] == 1


def test_where_there_is_no_route_nothing_is_said_of_parameters(client: httpx.Client) -> None:
    assert_problem(client.get("/nope?x=1"), 404, "not-found")
    assert_problem(client.put("/v1/states?x=1"), 405, "method-not-allowed")
