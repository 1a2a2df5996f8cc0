"""A server in the tests' own process, and a hold on the engine that its models run on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import httpx
import uvicorn

from app import bootstrap
from app.main import create_app
from app.settings import Settings
from infra.engine.engine import Engine
from infra.engine.loading import Loading
from tests.app.api import eventually
from tests.support import free_port


class Gate:
    """Stops the engine once it has done what it was asked before; leaving it lets it go on."""

    def __init__(self, engine: Engine) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()
        engine.submit(self._wait)

    def _wait(self) -> None:
        self._reached.set()
        self._opened.wait(120)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def reach(self) -> None:
        assert self._reached.wait(60)

    def open(self) -> None:
        self._opened.set()


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

    app, port = create_app(settings), free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    try:
        with patch.object(bootstrap, "_engine", keep):
            thread.start()
            eventually(lambda: server.started and bool(made))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client, made[0]._engine
    finally:
        server.should_exit = True
        thread.join()
