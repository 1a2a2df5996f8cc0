"""What a whole request costs beyond the model's own time, and how long a start takes."""

import asyncio
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from app.bootstrap import open_models
from app.settings import Settings
from benchmarks.rebuild import request
from benchmarks.table import percentile, seconds, show
from domain.ports import GenerationRequest
from infra.engine.language_model import TransformersModel
from tests.support import Server

REQUESTS = 200
NEW_TOKENS = 8


async def run(threads: int) -> None:
    """Measure the same requests in process and over HTTP, at 1 and 8 clients."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model_name="cacher-tiny", threads=threads)
        start = time.perf_counter()
        with Server(Path(folder) / "cacher.db", CACHER_THREADS=str(threads)) as server:
            ready_s = time.perf_counter() - start
            async with open_models(settings) as models:
                model = await models.get(models.default)
                for clients in (1, 8):
                    inside = await _inside(model, clients)
                    outside = await _outside(server.url, clients)
                    for percent in (50, 99):
                        a, b = percentile(inside, percent), percentile(outside, percent)
                        rows.append(
                            (
                                f"p{percent}, {clients} clients",
                                f"{a * 1e3:.2f}",
                                f"{b * 1e3:.2f}",
                                f"{(b - a) * 1e3:.2f}",
                            )
                        )
    show(
        f"generate {NEW_TOKENS} tokens on cacher-tiny (ms); server start to ready {ready_s:.1f} s",
        ("", "model alone", "whole request", "overhead"),
        rows,
    )


async def _inside(model: TransformersModel, clients: int) -> list[float]:
    tokens = await model.encode("Once upon a time", beginning=True, room=1024)
    wanted = request(tokens, NEW_TOKENS)
    times: list[float] = []

    async def client() -> None:
        times.extend(
            [await seconds(lambda: _drain(model, wanted)) for _ in range(REQUESTS // clients)]
        )

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


async def _drain(model: TransformersModel, wanted: GenerationRequest) -> None:
    async for _ in model.generate(wanted):
        pass


async def _outside(url: str, clients: int) -> list[float]:
    times: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:

        async def client(bodies: list[dict[str, Any]]) -> None:
            for body in bodies:
                post = functools.partial(http.post, "/v1/generate/token", json=body)
                times.append(await seconds(post))

        bodies = [await _new_state(http) for _ in range(REQUESTS)]
        await asyncio.gather(*(client(bodies[first::clients]) for first in range(clients)))
    return times


async def _new_state(http: httpx.AsyncClient) -> dict[str, Any]:
    """The body of a request that continues a state of its own."""
    created = await http.post("/v1/states", json={"text": "Once upon a time"})
    return {
        "state_id": created.json()["state_id"],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "top_p": 1,
    }
