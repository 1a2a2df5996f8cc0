"""A server in the tests' own process, whose engine can be held."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import uvicorn

from app import bootstrap
from app.main import create_app
from app.settings import Settings
from infra.engine.engine import Engine
from infra.engine.loading import Loading
from infra.engine.runner import Runner
from tests.app.api import Json, eventually, metric
from tests.infra.engine.bench import HeldPass


@contextmanager
def serving(database: Path, **changes: Any) -> Iterator[tuple[httpx.Client, Engine]]:
    """A client of a server in this process, and the engine that its models run on."""
    settings = Settings(model_name="cacher-tiny", database=str(database), threads=1, **changes)
    bootstrap.migrate(settings)
    made: list[Loading] = []
    make = bootstrap._engine

    def keep(settings: Settings) -> Loading:
        made.append(make(settings))
        return made[-1]

    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    try:
        with patch.object(bootstrap, "_engine", keep):
            thread.start()
            eventually(lambda: server.started and bool(made))
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client, made[0]._engine
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def held_after(engine: Engine, steps: int) -> Iterator[HeldPass]:
    """Stops an engine when it has made so many steps more; leaving it lets it go on."""
    held, step = HeldPass(steps), engine._step

    def wait_and_step(runner: Runner) -> None:
        held.wait()
        step(runner)

    with patch.object(engine, "_step", wait_and_step):
        try:
            yield held
        finally:
            held.goes_on.set()


@contextmanager
def asked(
    client: httpx.Client, path: str, body: Json, *, in_line: int = 1, **headers: str
) -> Iterator[None]:
    """Within, one more client has asked for something and waits in line; then it leaves."""
    connection = HTTPConnection(client.base_url.host, client.base_url.port or 80)
    with closing(connection):
        content = json.dumps(body, separators=(",", ":"))  # as httpx writes it
        headers |= {"Content-Type": "application/json"}
        connection.request("POST", path, content, headers)
        eventually(lambda: metric(client, "requests_in_line") == in_line)
        yield
