"""Streams that were cut off go on where they were, to the same end as if they never had been."""

import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing, suppress
from itertools import accumulate, islice
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio

from app import answers, bootstrap
from app.decoding import decode
from app.operations import states
from app.operations.generation import Items, Made, Wish, generate, generate_multi
from app.schemas import GenerateMulti, GenerateTokens, StreamedToken
from app.service import Call, Service
from app.settings import Settings
from domain.config import ConfigChanges
from domain.events import ContinuationsGenerated, TokensGenerated
from domain.ids import StateId, Version
from domain.ports import Idempotency
from infra.engine.engine import Engine
from tests.app.api import (
    LONG_TEXT,
    OPENING,
    Json,
    Sent,
    assert_problem,
    assert_verified,
    configure,
    create,
    delete,
    events,
    eventually,
    fork,
    forward,
    is_idle,
    metric,
    nothing_recorded,
    read,
    read_sent,
    sent,
    tokens_of,
)
from tests.app.held import asked, held_after, serving
from tests.forking import FastServer, Nursery
from tests.infra.engine.bench import Gate

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

TOKEN, MULTI = "/v1/generate/token", "/v1/generate/multi"
HOT: Json = {"temperature": 2.0, "top_p": 1.0, "seed": 3}


# left after any token, one by one: no HTTP, so that what had been taken is known exactly


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    database = tmp_path_factory.mktemp("resume") / "cacher.db"
    settings = Settings(model_name="cacher-tiny", database=str(database), threads=1)
    bootstrap.migrate(settings)
    async with bootstrap.open_service(settings) as opened:
        yield opened


module_loop = pytest.mark.asyncio(loop_scope="module")


class Asked:
    """One request for a stream, sent as often as its client likes."""

    def __init__(self, service: Service, state_id: StateId, body: Json) -> None:
        self._service = service
        self._body = json.dumps({"state_id": state_id, "stream": True, **body}).encode()
        self._several = "n" in body
        self._call = Call(
            actor="client",
            request_id="request",
            idempotency=Idempotency(
                actor="client",
                method="POST",
                path=MULTI if self._several else TOKEN,
                key=uuid.uuid4().hex,
                request_digest=hashlib.sha256(self._body).digest(),
            ),
        )

    def items(self, *, resuming: bool = False) -> Items:
        if self._several:
            several = decode(self._body, GenerateMulti)
            return generate_multi(
                self._service, self._call, _wish(several, resuming=resuming), several.n
            )
        single = decode(self._body, GenerateTokens)
        return generate(self._service, self._call, _wish(single, resuming=resuming))

    async def take(self, count: int, *, resuming: bool = False) -> list[StreamedToken]:
        """The first ``count`` tokens; then the client leaves."""
        taken: list[StreamedToken] = []
        async with aclosing(self.items(resuming=resuming)) as items:
            while len(taken) < count:
                item = await anext(items)
                assert isinstance(item, StreamedToken)
                taken.append(item)
        return taken

    async def take_all(self, *, resuming: bool = False) -> tuple[list[StreamedToken], Made]:
        *tokens, made = [item async for item in self.items(resuming=resuming)]
        assert isinstance(made, tuple)
        return [one for one in tokens if isinstance(one, StreamedToken)], made


def _wish(data: GenerateTokens | GenerateMulti, *, resuming: bool) -> Wish:
    return Wish(state_id=data.state_id, generation=data, streamed=True, resuming=resuming)


async def begin(service: Service, text: str = OPENING, **config: Any) -> StateId:
    (recorded,) = await states.create(
        service,
        Call(actor="client", request_id="request"),
        model_id=service.default_model,
        content=states.Content(text, None),
        changes=decode(json.dumps(config).encode(), ConfigChanges),
        metadata={},
    )
    return recorded.state_id


def told(made: Made) -> Json:
    """What an answer says, apart from the state and its version."""
    if isinstance(made[0].event, ContinuationsGenerated):
        continued = answers.continued(made[0], include_sampling=True)
        return {"seed": continued.seed, "continuations": continued.continuations}
    fields = answers.generated(made, include_sampling=True)
    hidden = {"state_id", "version"}
    return {name: getattr(fields, name) for name in fields.__struct_fields__ if name not in hidden}


def assert_each_goes_on_from_those_before(made: Made) -> None:
    """Each event says how many tokens of its call were drawn before it."""
    texts = [one.event for one in made if isinstance(one.event, TokensGenerated)]
    drawn = accumulate((len(text.content.tokens) for text in texts), initial=0)
    assert [text.resumes for text in texts] == list(drawn)[:-1]


SAID = "日本🙂e\u0301."
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}
REQUESTS: dict[str, tuple[Json, Json]] = {
    "drawn": ({"max_tokens": 9, **HOT}, {}),
    "with everything": (
        {
            "max_tokens": 8,
            **HOT,
            **PENALTIES,
            "min_p": 0.001,
            "typical_p": 0.95,
            "logit_bias": {"300": 3.0},
            "bad_words_ids": [[301], [12, 258]],
            "top_logprobs": 2,
        },
        {"store_logits": "full"},
    ),
    "stopped": ({"max_tokens": 40, **HOT, "stop_sequences": ["🙂e"],
                 "constraint": {"regex": SAID}}, {}),
    "of incomplete characters": ({"max_tokens": 40, "constraint": {"regex": SAID}}, {}),
    "constrained": ({"max_tokens": 12, **HOT, "constraint": {"regex": "( [a-z]{1,3}){6}"}}, {}),
    "until the context is full": ({"max_tokens": 12, **HOT}, {"context_size": 12}),
    "sliding": (
        {"max_tokens": 12, **HOT, "stop_sequences": ["zebra"], **PENALTIES},
        {"context_size": 10, "on_full": "slide"},
    ),
    "with a seed left open": ({"max_tokens": 6, "temperature": 2.0, "seed": None}, {}),
}  # fmt: skip
each_request = pytest.mark.parametrize(("body", "config"), REQUESTS.values(), ids=REQUESTS)


@module_loop
@each_request
async def test_a_stream_left_after_any_of_its_tokens_goes_on_to_the_same_end(
    service: Service, body: Json, config: Json
) -> None:
    whole = Asked(service, await begin(service, **config), body)
    tokens, made = await whole.take_all()
    body = {**body, "seed": told(made)["seed"]}
    assert len(tokens) >= 4
    for count in range(1, len(tokens) + 1):
        state_id = await begin(service, **config)
        asked = Asked(service, state_id, body)
        assert await asked.take(count) == tokens[:count]
        left = await service.live(state_id)
        again, again_made = await asked.take_all(resuming=True)
        assert again == tokens
        assert told(again_made) == told(made)
        state, end = await service.live(state_id), await service.live(made[0].state_id)
        assert (state.content, state.dropped) == (end.content, end.dropped)
        assert left.content.tokens != end.content.tokens or count == len(tokens)
        assert_each_goes_on_from_those_before(again_made)
        once_more, same = await asked.take_all(resuming=True)
        assert (once_more, same) == (again, again_made)
        assert (await service.live(state_id)).version == state.version


@module_loop
async def test_a_stream_may_be_left_twice(service: Service) -> None:
    body = {"max_tokens": 6, **HOT, "stop_sequences": ["zebra"], **PENALTIES}
    tokens, made = await Asked(service, await begin(service), body).take_all()
    assert len(tokens) == 6
    for first in range(1, 5):
        for second in range(first, 6):
            asked = Asked(service, await begin(service), body)
            await asked.take(first)
            assert await asked.take(second, resuming=True) == tokens[:second]
            again, again_made = await asked.take_all(resuming=True)
            assert again == tokens
            assert told(again_made) == told(made)
            assert len(again_made) == (2 if second == first else 3)


@module_loop
@pytest.mark.parametrize(
    "wish",
    [HOT, {**HOT, "stop_sequences": ["er", "s"]}, {"constraint": {"regex": "日|[ab]{2,6}"}, **HOT}],
    ids=["drawn", "stopped", "constrained"],
)
async def test_continuations_left_after_any_token_are_given_whole(
    service: Service, wish: Json
) -> None:
    body = {"n": 3, "max_tokens": 4, **wish}
    state_id = await begin(service)
    tokens, made = await Asked(service, state_id, body).take_all()
    for count in range(1, len(tokens)):
        asked = Asked(service, state_id, body)
        assert await asked.take(count) == tokens[:count]
        recorded = await service.event(state_id, (await service.live(state_id)).version)
        assert isinstance(recorded.event, ContinuationsGenerated)
        drawn = [len(one.content.tokens) for one in recorded.event.continuations]
        assert sum(drawn) == count
        assert any(one.finish_reason == "cancelled" for one in recorded.event.continuations)
        again, again_made = await asked.take_all(resuming=True)
        assert again == tokens
        assert told(again_made) == told(made)
        assert again_made[0].version == Version(recorded.version + 1)
    assert (await service.live(state_id)).content.text == OPENING


@module_loop
async def test_a_stop_may_begin_before_a_stream_was_left_and_end_after_it(
    service: Service,
) -> None:
    body = {"max_tokens": 9, "constraint": {"regex": "a{9}"}, "bad_words_ids": []}
    tokens, _ = await Asked(service, await begin(service), body).take_all()
    pieces = [one.text for one in tokens]
    assert len(pieces) > 2
    stop = pieces[0] + pieces[1]
    asked = Asked(service, await begin(service), {**body, "stop_sequences": [stop]})
    assert [one.text for one in await asked.take(1)] == pieces[:1]
    again, made = await asked.take_all(resuming=True)
    assert [one.text for one in again] == pieces[:2]
    assert told(made)["finish_reason"] == "stop_sequence"


@module_loop
async def test_what_goes_on_is_an_event_that_says_how_many_tokens_came_before_it(
    service: Service,
) -> None:
    state_id = await begin(service)
    asked = Asked(service, state_id, {"max_tokens": 7, **HOT})
    await asked.take(3)
    _, (cut, rest) = await asked.take_all(resuming=True)
    assert isinstance(cut.event, TokensGenerated)
    assert isinstance(rest.event, TokensGenerated)
    assert (cut.version, rest.version) == (2, 3)
    assert (cut.event.finish_reason, rest.event.finish_reason) == ("cancelled", None)
    assert (cut.event.resumes, rest.event.resumes) == (0, 3)
    assert rest.event.start == cut.event.start + 3
    assert (rest.event.parameters, rest.event.seed) == (cut.event.parameters, cut.event.seed)


# over HTTP


class Held(NamedTuple):
    """A server whose engine can be held."""

    client: httpx.Client
    engine: Engine


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    with serving(tmp_path_factory.mktemp("held") / "cacher.db") as running:
        yield Held(*running)


LONG: Json = {"max_tokens": 150, "ignore_eos": True, "stream": True, **HOT}
"""A stream that is not at its end when its client has the first tokens and the engine is held."""


class Cut(NamedTuple):
    """A stream that its client left: the request, and what had come."""

    path: str
    body: Json
    key: str
    received: list[Sent]

    def again(
        self, client: httpx.Client, last_event_id: str | None = None, **headers: str
    ) -> httpx.Response:
        """The same request once more, to go on after an event."""
        headers["Idempotency-Key"] = self.key
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        return client.post(self.path, json=self.body, headers=headers)

    def stream(self, client: httpx.Client) -> AbstractContextManager[httpx.Response]:
        """The request as a stream to be read, to go on after what had come."""
        headers = {"Idempotency-Key": self.key}
        if self.received:
            headers["Last-Event-ID"] = self.received[-1].id or ""
        return client.stream("POST", self.path, json=self.body, headers=headers)

    def resume(self, client: httpx.Client) -> list[Sent]:
        """What comes after what had come."""
        answer = self.again(client, self.received[-1].id if self.received else "")
        assert answer.is_success, answer.text
        return sent(answer.text)


def leave(held: Held, state_id: str, count: int = 3, path: str = TOKEN, **wish: Any) -> Cut:
    """Read some tokens of a stream, then leave it while the engine is held."""
    cut = Cut(path, {"state_id": state_id, **LONG, **wish}, uuid.uuid4().hex, [])
    with held_after(held.engine, count + 1):
        with cut.stream(held.client) as answer:
            cut.received.extend(islice(read_sent(answer), count))
        eventually(lambda: metric(held.client, "requests_in_line") == 0)
    eventually(lambda: is_idle(held.client))
    return cut


def whole(client: httpx.Client, path: str = TOKEN, **wish: Any) -> list[Sent]:
    """The same stream of a state of its own, not left."""
    body = {"state_id": create(client)["state_id"], **LONG, **wish}
    return sent(ok_text(client.post(path, json=body)))


def ok_text(answer: httpx.Response) -> str:
    assert answer.is_success, answer.text
    return answer.text


def said(answer: Json) -> Json:
    """An answer without what differs from state to state."""
    return {name: answer[name] for name in answer if name not in ("state_id", "version")}


def test_a_client_that_comes_back_gets_what_it_lacks_and_the_whole_answer(held: Held) -> None:
    *tokens, done = whole(held.client)
    state_id = create(held.client)["state_id"]
    cut = leave(held, state_id)
    recorded = events(held.client, state_id)[-1]["payload"]
    assert recorded["finish_reason"] == "cancelled"
    assert 3 <= len(recorded["content"]["tokens"]) < 150
    *rest, end = cut.resume(held.client)
    assert [*cut.received, *rest] == tokens
    assert said(end.data) == said(done.data)
    assert end.data["version"] == 3
    assert events(held.client, state_id)[-1]["payload"]["resumes"] == len(
        recorded["content"]["tokens"]
    )
    assert tokens_of(held.client, state_id)[-150:] == done.data["token_ids"]
    assert_verified(held.client, state_id)


def test_continuations_come_again_in_full_with_what_the_client_lacks(held: Held) -> None:
    wish = {"n": 4, "max_tokens": 60}
    *tokens, done = whole(held.client, MULTI, **wish)
    state_id = create(held.client)["state_id"]
    cut = leave(held, state_id, 7, MULTI, **wish)
    *rest, end = cut.resume(held.client)
    assert [*cut.received, *rest] == tokens
    assert said(end.data) == said(done.data)
    assert [event["type"] for event in events(held.client, state_id)[1:]] == [
        "continuations_generated"
    ] * 2
    assert_verified(held.client, state_id)


def test_whatever_a_client_has_it_gets_the_rest(held: Held) -> None:
    cut = leave(held, create(held.client)["state_id"], max_tokens=100)
    everything = [*cut.received, *cut.resume(held.client)]
    with nothing_recorded(held.client):
        assert sent(cut.again(held.client).text) == everything
        assert sent(cut.again(held.client, "").text) == everything
        for last in (0, 1, 57, 98, 99):
            assert sent(cut.again(held.client, str(last)).text) == everything[last + 1 :]
        (done,) = sent(cut.again(held.client, "5000").text)
    assert done == everything[-1]


def test_a_client_that_repeats_its_request_gets_what_was_recorded_and_may_resume_later(
    held: Held,
) -> None:
    *tokens, _ = whole(held.client)
    cut = leave(held, create(held.client)["state_id"])
    with nothing_recorded(held.client):
        *recorded, done = sent(cut.again(held.client).text)
    assert done.data["finish_reason"] == "cancelled"
    assert len(recorded) < len(tokens)
    assert recorded == tokens[: len(recorded)]
    rest = cut.resume(held.client)
    assert [*cut.received, *rest[:-1]] == tokens


def test_a_client_that_left_before_the_first_token_gets_the_whole_stream(
    held: Held,
) -> None:
    state_id = create(held.client)["state_id"]
    body = {"state_id": state_id, **LONG, "max_tokens": 5, "seed": None}
    cut = Cut(TOKEN, body, uuid.uuid4().hex, [])
    with Gate(held.engine) as gate:
        gate.reach()
        with asked(held.client, TOKEN, body, **{"Idempotency-Key": cut.key}):
            pass
        eventually(lambda: metric(held.client, "requests_in_line") == 0)
    assert read(held.client, state_id)["version"] == 1
    *tokens, done = cut.resume(held.client)
    assert (len(tokens), done.data["version"]) == (5, 2)
    again = create(held.client)["state_id"]
    body = {"state_id": again, **LONG, "max_tokens": 5, "seed": done.data["seed"]}
    assert sent(held.client.post(TOKEN, json=body).text)[:-1] == tokens


def test_the_condition_that_the_stream_began_with_holds_when_it_goes_on(held: Held) -> None:
    cut = leave(held, create(held.client)["state_id"])
    last = cut.received[-1].id
    answer = cut.again(held.client, last, **{"If-Match": '"1"'})
    assert sent(ok_text(answer))[-1].data["version"] == 3


# refusals


@pytest.mark.parametrize(("path", "wish"), [(TOKEN, {}), (MULTI, {"n": 2, "max_tokens": 90})])
def test_a_state_that_has_moved_on_is_a_conflict_that_names_both_versions(
    held: Held, path: str, wish: Json
) -> None:
    state_id = create(held.client)["state_id"]
    cut = leave(held, state_id, 3, path, **wish)
    forward(held.client, state_id, " there was")
    with nothing_recorded(held.client):
        answer = cut.again(held.client, cut.received[-1].id)
    problem = assert_problem(answer, 409, "version-conflict")
    assert (problem["expected_version"], problem["current_version"]) == (2, 3)
    assert answer.headers["x-should-retry"] == "false"
    assert sent(cut.again(held.client).text)[-1].data["version"] == 2


def test_a_changed_setting_moves_a_state_on_too(held: Held) -> None:
    state_id = create(held.client)["state_id"]
    cut = leave(held, state_id)
    configure(held.client, state_id, temperature=0.1)
    assert_problem(cut.again(held.client, "0"), 409, "version-conflict")


def test_a_stream_of_a_state_that_was_deleted_goes_no_further(held: Held) -> None:
    state_id = create(held.client)["state_id"]
    cut = leave(held, state_id)
    delete(held.client, state_id)
    assert_problem(cut.again(held.client, "0"), 404, "state-deleted")
    assert sent(cut.again(held.client).text)[-1].data["finish_reason"] == "cancelled"


@pytest.mark.parametrize(("path", "wish"), [(TOKEN, {}), (MULTI, {"n": 2})])
def test_there_is_nothing_to_resume_under_a_key_that_is_not_known(
    held: Held, path: str, wish: Json
) -> None:
    body = {"state_id": create(held.client)["state_id"], "stream": True, **wish}
    headers = {"Idempotency-Key": uuid.uuid4().hex, "Last-Event-ID": "3"}
    with nothing_recorded(held.client):
        answer = held.client.post(path, json=body, headers=headers)
    problem = assert_problem(answer, 409, "nothing-to-resume")
    assert headers["Idempotency-Key"] in problem["detail"]


def test_another_body_resumes_nothing(held: Held) -> None:
    cut = leave(held, create(held.client)["state_id"])
    other = cut._replace(body=cut.body | {"max_tokens": 151})
    with nothing_recorded(held.client):
        assert_problem(other.again(held.client, "3"), 409, "idempotency-key-reused")


@pytest.mark.parametrize("path", [TOKEN, MULTI])
@pytest.mark.parametrize(
    ("last", "body", "key"),
    [
        ("3", {"stream": True}, None),
        ("3", {"stream": False}, "key"),
        ("3", {}, "key"),
        ("x", {"stream": True}, "key"),
        ("-1", {"stream": True}, "key"),
        ("1.5", {"stream": True}, "key"),
        ("9" * 10, {"stream": True}, "key"),
        ("3, 4", {"stream": True}, "key"),
    ],
)
def test_an_event_id_that_resumes_no_stream_is_refused_by_name(
    held: Held, path: str, last: str, body: Json, key: str | None
) -> None:
    given = {"state_id": create(held.client)["state_id"], **body}
    given |= {"n": 2} if path == MULTI else {}
    headers = {"Last-Event-ID": last} | ({"Idempotency-Key": key} if key else {})
    with nothing_recorded(held.client):
        answer = held.client.post(path, json=given, headers=headers)
    assert_problem(answer, 400, "invalid-input", "Last-Event-ID")


# killed and started again


ASKED: list[tuple[str, Json]] = [
    *((TOKEN, body | HOT) for body, config in REQUESTS.values() if not config),
    (TOKEN, {**REQUESTS["with everything"][0], "stream": True}),
    (MULTI, {"n": 5, **REQUESTS["with everything"][0]}),
    (MULTI, {"n": 3, **REQUESTS["constrained"][0], "stream": True}),
    ("/v1/generate/beam", {"num_beams": 4, "num_return": 4, "repetition_penalty": 1.3}),
]


def answers_of(client: httpx.Client, parent: str) -> list[str]:
    """Answers to many requests, each to a fork of its own, without the ids of states."""
    found = []
    for path, wish in ASKED:
        (child,) = fork(client, parent)
        answer = client.post(path, json={"state_id": child["state_id"], **wish})
        found.append(ok_text(answer).replace(child["state_id"], ""))
    return found


class Killed(NamedTuple):
    """A server that was killed while it streamed, and stands again.

    ``cuts`` are the streams, ``versions`` those of their states before the kill; ``answers`` it
    had given before about forks of ``parent``.
    """

    client: httpx.Client
    cuts: dict[str, Cut]
    versions: dict[str, int]
    parent: str
    answers: list[str]


@pytest.fixture(scope="module")
def killed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    database = tmp_path_factory.mktemp("killed") / "cacher.db"
    with FastServer(nursery, database) as server:
        with server.client() as client:
            parent = create(client, text=OPENING + LONG_TEXT)["state_id"]
            before = answers_of(client, parent)
            cuts = begin_streams(client)
            versions = {
                name: read(client, cut.body["state_id"])["version"] for name, cut in cuts.items()
            }
            read_until_killed(server, client, cuts)
        server.start()
        with server.client() as client:
            yield Killed(client, cuts, versions, parent, before)


def begin_streams(client: httpx.Client) -> dict[str, Cut]:
    """Requests for streams that are long enough to be cut off; one was left once before."""
    wishes: dict[str, tuple[str, Json]] = {
        "single": (TOKEN, {"max_tokens": 400, "seed": None}),
        "several": (MULTI, {"max_tokens": 200, "seed": None, "n": 4}),
        "left before": (TOKEN, {"max_tokens": 500}),
    }
    cuts = {}
    for name, (path, wish) in wishes.items():
        body = {"state_id": create(client)["state_id"], **LONG, **wish}
        cuts[name] = Cut(path, body, uuid.uuid4().hex, [])
    left = cuts["left before"]
    with left.stream(client) as answer:
        left.received.extend(islice(read_sent(answer), 3))
    eventually(lambda: read(client, left.body["state_id"])["version"] == 2)
    return cuts


def read_until_killed(server: FastServer, client: httpx.Client, cuts: dict[str, Cut]) -> None:
    with ExitStack() as opened:
        streams = [
            (cut, read_sent(opened.enter_context(cut.stream(client)))) for cut in cuts.values()
        ]
        for cut, stream in streams:
            cut.received.extend(islice(stream, 5))
        server.kill()
        for cut, stream in streams:
            with suppress(httpx.TransportError):
                cut.received.extend(stream)
    assert all(one.name == "token" for cut in cuts.values() for one in cut.received)


@pytest.mark.parametrize("name", ["single", "several", "left before"])
def test_after_a_kill_the_same_tokens_come_again_and_only_the_missing_ones_are_sent(
    killed: Killed, name: str
) -> None:
    cut, client = killed.cuts[name], killed.client
    state_id, version = cut.body["state_id"], killed.versions[name]
    assert version == (2 if name == "left before" else 1)
    assert read(client, state_id)["version"] == version
    *rest, done = cut.resume(client)
    assert len(cut.received) >= 5
    assert rest
    assert done.data["version"] == version + 1
    twin = {**cut.body, "state_id": create(client)["state_id"], "seed": done.data["seed"]}
    *tokens, end = sent(ok_text(client.post(cut.path, json=twin)))
    assert [*cut.received, *rest] == tokens
    assert said(done.data) == said(end.data)
    assert_verified(client, state_id)


def test_the_same_seed_gives_the_same_answers_after_a_restart(killed: Killed) -> None:
    state = read(killed.client, killed.parent, include="cache")
    assert state["cache"]["tokens_hot"] == 0
    assert answers_of(killed.client, killed.parent) == killed.answers
    assert len(set(killed.answers)) == len(ASKED)
