"""A real server in a process of its own, to be used and killed by tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

import httpx

SERVE = "import sys; from app.cli import main; sys.argv = ['cacher', *sys.argv[1:]]; main()"


def clean_environment(**settings: str) -> dict[str, str]:
    """The environment without settings of ours, then these."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CACHER_")}
    return {**kept, "HF_HUB_OFFLINE": "1", **settings}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process(Protocol):
    """What a server needs of its process (compare :class:`subprocess.Popen`)."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...

    def send_signal(self, which: signal.Signals, /) -> None: ...


class Server:
    """``cacher serve`` on a database; starts when entered, may be killed and started again."""

    def __init__(self, database: Path, **settings: str) -> None:
        self.database = database
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = clean_environment(
            **{
                "CACHER_MODEL_NAME": "cacher-tiny",
                "CACHER_DATABASE": str(database),
                "CACHER_PORT": str(self.port),
                "CACHER_LOG_LEVEL": "warning",
                **settings,
            }
        )
        self.process: Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *, timeout_s: float = 120) -> None:
        """Start the process and wait until it is ready."""
        self.process = self._begin()
        deadline = time.monotonic() + timeout_s
        with self.client() as client:
            while not _is_ready(client):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise TimeoutError("the server did not become ready")
                time.sleep(0.02)

    def _begin(self) -> Process:
        return subprocess.Popen([sys.executable, "-c", SERVE, "serve"], env=self.environment)

    def kill(self) -> None:
        """End the process at once, as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the process in an orderly way."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=60)
            self.process = None

    def client(self, **options: Any) -> httpx.Client:
        """A client of this server; nothing between them is encrypted."""
        return httpx.Client(base_url=self.url, timeout=120, verify=False, **options)


def _is_ready(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/ready").is_success
    return False
