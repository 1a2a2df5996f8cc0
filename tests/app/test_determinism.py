"""The same state, parameters and seed give the same tokens, to the bit, whatever else happens."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.engine.engine import Engine
from tests.app.api import (
    OPENING,
    Json,
    assert_verified,
    create,
    events,
    forward,
    generate,
    is_idle,
    ok,
    read,
    tokens_of,
)
from tests.app.held import serving
from tests.infra.engine.bench import Gate, recorded_passes

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

HOT: Json = {"temperature": 1.2, "top_p": 1.0}


def _drawn(client: httpx.Client, state_id: str) -> Json:
    """Everything that was recorded about the tokens generated in a state, call by call joined."""
    joined: dict[str, list[Any]] = {}
    for event in events(client, state_id):
        payload = event["payload"]
        if event["type"] == "tokens_generated":
            of_tokens = payload["scores"] | {
                "tokens": payload["content"]["tokens"],
                "sampling_probabilities": payload["sampling_probabilities"],
                "alternatives": payload["alternatives"],
            }
            for name, values in of_tokens.items():
                joined.setdefault(name, []).extend(values)
    return joined


@pytest.mark.parametrize("parts", [(10,), (4, 6), (1,) * 10, (9, 1)])
def test_a_generation_is_the_same_in_one_call_and_in_several(
    client: httpx.Client, parts: tuple[int, ...]
) -> None:
    whole, split = (create(client)["state_id"] for _ in range(2))
    generate(client, whole, 10, seed=21, top_logprobs=3, **HOT)
    for count in parts:
        generate(client, split, count, seed=21, top_logprobs=3, **HOT)
    assert _drawn(client, split) == _drawn(client, whole)
    assert read(client, split)["text"] == read(client, whole)["text"]
    assert len(_drawn(client, whole)["tokens"]) == 10


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(client: httpx.Client) -> None:
    first, again, other = (create(client)["state_id"] for _ in range(3))
    for state_id, seed in ((first, 21), (again, 21), (other, 22)):
        generate(client, state_id, 12, seed=seed, **HOT)
    assert _drawn(client, again) == _drawn(client, first)
    assert _drawn(client, other)["tokens"] != _drawn(client, first)["tokens"]


def test_the_same_text_forwarded_in_parts_gives_the_same_tokens(client: httpx.Client) -> None:
    whole = create(client, text=f"{OPENING} there was a cat")["state_id"]
    parts = create(client)["state_id"]
    for text in (" there", " was", " a", " cat"):
        forward(client, parts, text)
    texts = [generate(client, state_id, 12, seed=4, **HOT)["text"] for state_id in (whole, parts)]
    assert _drawn(client, parts) == _drawn(client, whole)
    assert texts[0] == texts[1]


def test_without_a_seed_each_call_draws_afresh_with_a_seed_that_is_recorded(
    client: httpx.Client,
) -> None:
    answers = []
    for _ in range(2):
        state_id = create(client, config={"seed": None})["state_id"]
        answer = generate(client, state_id, 16, **HOT)
        assert events(client, state_id)[-1]["payload"]["seed"] == answer["seed"]
        assert_verified(client, state_id)
        answers.append(answer)
    assert answers[0]["seed"] != answers[1]["seed"]
    assert answers[0]["text"] != answers[1]["text"]
    again = generate(client, create(client)["state_id"], 16, seed=answers[0]["seed"], **HOT)
    assert again["token_ids"] == answers[0]["token_ids"]


def test_a_seed_of_the_state_holds_until_a_call_names_another(client: httpx.Client) -> None:
    state_id = create(client, config={"seed": 77})["state_id"]
    seeds = [generate(client, state_id, 1, **wish)["seed"] for wish in ({}, {"seed": 5}, {})]
    assert seeds == [77, 5, 77]


@pytest.mark.parametrize("seed", [0, 2**53 - 1])
def test_the_smallest_and_the_largest_seed_are_kept_exactly(
    client: httpx.Client, seed: int
) -> None:
    state_id = create(client, config={"seed": seed})["state_id"]
    assert generate(client, state_id, 4, **HOT)["seed"] == seed
    assert read(client, state_id)["config"]["seed"] == seed
    assert_verified(client, state_id)


async def test_a_generation_is_the_same_alone_and_among_sixteen_others(database: Path) -> None:
    """``tests/infra/engine/test_among_others.py`` has the control: with plain kernels it is not."""
    with serving(database) as (client, engine):
        await _generates_the_same_among_others(client, engine)


async def _generates_the_same_among_others(client: httpx.Client, engine: Engine) -> None:
    alone, among, other = (create(client)["state_id"] for _ in range(3))
    crowd = [create(client, text=f"{OPENING} {number}")["state_id"] for number in range(16)]
    generate(client, alone, 24, seed=8, **HOT)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as tasks:

        async def start(state_id: str, seed: int, count: int) -> Json:
            body = {"state_id": state_id, "max_tokens": count, "seed": seed}
            answer: Json = ok(await tasks.post("/v1/generate/token", json=body | HOT))
            return answer

        with recorded_passes() as passes:
            with Gate(engine) as gate:
                running = [start(state_id, seed, 30) for seed, state_id in enumerate(crowd)]
                together = asyncio.gather(*running, start(among, 8, 24))
                await gate.asked(17)
            await together
    drawn, text = _drawn(client, among), tokens_of(client, among)
    assert drawn == _drawn(client, alone)
    beside = [
        len(sequences) - 1
        for sequences in passes
        if any(one.tokens == text[: len(one.tokens)] for one in sequences)
    ]
    assert len(beside) == len(drawn["tokens"]) == 24
    assert min(beside) >= 8, "others were in every pass that drew a token of it"
    generate(client, other, 24, seed=9, **HOT)
    assert _drawn(client, other)["tokens"] != drawn["tokens"]
    assert_verified(client, among, *crowd[:4])
    assert is_idle(client)
