"""Streams that were cut off go on where they were, to the same end as if they never had been."""

import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from itertools import islice
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
    forward,
    is_idle,
    metric,
    nothing_recorded,
    ok,
    read,
    read_sent,
    sent,
    tokens_of,
)
from tests.app.held import Gate, serving
from tests.end_to_end.forking import FastServer, Nursery

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
        data = decode(self._body, GenerateMulti if self._several else GenerateTokens)
        wish = Wish(
            state_id=data.state_id, generation=data, streamed=True, resuming=resuming
        )
        if isinstance(data, GenerateMulti):
            return generate_multi(self._service, self._call, wish, data.n)
        return generate(self._service, self._call, wish)

    async def take(self, count: int, *, resuming: bool = False) -> list[StreamedToken]:
        """The first ``count`` tokens; then the client leaves."""
        taken = []
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
    "constrained": ({"max_tokens": 12, **HOT, "constraint": {"regex": "( [a-z]{1,4}){3}"}}, {}),
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
        last = again_made[-1].event
        assert isinstance(last, TokensGenerated)
        assert last.resumes == (count if count < len(tokens) else last.resumes)
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
