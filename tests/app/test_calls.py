"""What a request says in its headers."""

import hashlib
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar import Request
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.testing import RequestFactory
from litestar.types import Message

from app.calls import (
    ANONYMOUS,
    actor_of,
    call_of,
    check_key,
    echo_request_id,
    etag,
    request_id_of,
)
from domain.errors import InvalidInput
from domain.ids import Version

BODY = {"text": "a"}


def _request(path: str = "/v1/forward", **headers: str) -> Request[Any, Any, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = RequestFactory().post(path, data=BODY, headers=named)
    request.scope.setdefault("state", {})
    return request


async def test_a_request_without_conditions_is_from_anyone_and_has_an_id() -> None:
    call = await call_of(_request())
    assert call.actor == ANONYMOUS
    assert re.fullmatch(r"[0-9a-f]{32}", call.request_id)
    assert call.if_match is None
    assert call.idempotency is None


async def test_an_idempotency_key_is_of_its_actor_method_path_and_body() -> None:
    request = _request("/v1/states", Idempotency_Key="k-1", X_API_Key="me")
    idempotency = (await call_of(request)).idempotency
    assert idempotency is not None
    assert (idempotency.key, idempotency.method, idempotency.path) == ("k-1", "POST", "/v1/states")
    assert idempotency.actor == actor_of(request) != ANONYMOUS
    assert idempotency.request_digest == hashlib.sha256(await request.body()).digest()
    assert await request.body() == b'{"text":"a"}'


@pytest.mark.parametrize("key", ["x", "x" * 200, "!~", "a,b;c=d"])
async def test_a_key_of_printable_characters_is_taken(key: str) -> None:
    idempotency = (await call_of(_request(Idempotency_Key=key))).idempotency
    assert idempotency is not None
    assert idempotency.key == key


@pytest.mark.parametrize("key", ["", "x" * 201, "a b", "\x7f", "\xe4"])
async def test_a_key_of_another_form_is_refused_by_name(key: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await call_of(_request(Idempotency_Key=key))
    assert refused.value.facts["field"] == "Idempotency-Key"


@pytest.mark.parametrize(
    ("value", "version"), [('"1"', 1), (' "25" ', 25), ('"999999999999999"', 10**15 - 1)]
)
async def test_if_match_names_a_version(value: str, version: int) -> None:
    assert (await call_of(_request(If_Match=value))).if_match == version


async def test_a_star_is_no_condition() -> None:
    assert (await call_of(_request(If_Match="*"))).if_match is None


@pytest.mark.parametrize(
    "value", ["1", 'W/"1"', '"1", "2"', '"-1"', '"1.0"', '""', "", '"1', f'"{10**15}"', '"\u00b2"']
)
async def test_another_if_match_is_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await call_of(_request(If_Match=value))
    assert refused.value.facts["field"] == "If-Match"


@given(version=st.integers(1, 10**15 - 1))
def test_the_etag_of_a_version_is_its_if_match(version: int) -> None:
    (value,) = etag(Version(version)).values()
    assert re.fullmatch(r'"\d+"', value)
    assert int(value.strip('"')) == version


@settings(max_examples=20, deadline=None)
@given(key=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), min_size=8))
def test_an_actor_is_named_after_the_key_without_showing_it(key: str) -> None:
    actor = actor_of(_request(X_API_Key=key))
    assert re.fullmatch(r"key-[0-9a-f]{12}", actor)
    assert actor == actor_of(_request(Authorization=f"Bearer {key}")) or key != key.strip()
    assert key not in actor
    assert actor != actor_of(_request(X_API_Key=f"{key}x"))


KEYS = ("first", "second")


@pytest.mark.parametrize(
    "headers",
    [
        {"X_API_Key": "first"},
        {"X_API_Key": "second"},
        {"Authorization": "Bearer first"},
        {"Authorization": "BEARER  second "},
        {"Authorization": "Basic eA==", "X_API_Key": "first"},
    ],
)
def test_an_accepted_key_lets_a_request_in(headers: dict[str, str]) -> None:
    check_key(_request(**headers), KEYS)
    with pytest.raises(PermissionDeniedException):
        check_key(_request(**headers), ("another",))


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic eA=="}, {"Authorization": ""}])
def test_no_key_is_told_from_a_wrong_one(headers: dict[str, str]) -> None:
    with pytest.raises(NotAuthorizedException):
        check_key(_request(**headers), KEYS)
    with pytest.raises(PermissionDeniedException):
        check_key(_request(X_API_Key="wrong"), KEYS)


@pytest.mark.parametrize("key", ["", "firs", "firstt", "first,second", "FIRST", "\xe4"])
def test_a_key_must_be_the_whole_key(key: str) -> None:
    with pytest.raises(PermissionDeniedException):
        check_key(_request(X_API_Key=key), KEYS)


def test_without_keys_everyone_is_let_in() -> None:
    check_key(_request(), ())
    check_key(_request(X_API_Key="anything"), ())


def test_a_request_id_stays_the_same_for_its_request() -> None:
    given_, made = _request(X_Request_ID="mine"), _request()
    assert request_id_of(given_.scope) == "mine"
    assert request_id_of(made.scope) == request_id_of(made.scope)
    assert request_id_of(made.scope) != request_id_of(_request().scope)


@pytest.mark.parametrize("value", ["", "a b", "x" * 201, "a\x7f", "\xe4"])
def test_a_request_id_of_another_form_is_replaced(value: str) -> None:
    made = request_id_of(_request(X_Request_ID=value).scope)
    assert re.fullmatch(r"[0-9a-f]{32}", made)


async def test_the_start_of_an_answer_and_nothing_else_names_its_request() -> None:
    scope = _request(X_Request_ID="mine").scope
    start: Message = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}
    body: Message = {"type": "http.response.body", "body": b"", "more_body": False}
    for message in (start, body):
        await echo_request_id(message, scope)
    assert dict(start)["headers"] == [(b"a", b"b"), (b"x-request-id", b"mine")]
    assert "headers" not in body
