"""Servers that start in a moment: forked from a process that has imported everything already.

The import of torch and transformers is most of what a start costs. What is forked, served and
killed is ``cacher serve`` as ever: the model is loaded and the database opened by the fork itself.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from tests.support import Server, clean_environment

IMPORTS = (
    "app.cli",
    "infra.engine.loading",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto",
)
FAST = {"CACHER_THREADS": "1", "CACHER_HOT_CACHE_BYTES": str(32 << 20)}
"""Settings for many small servers on a busy machine; neither is part of the fingerprint."""

RUNNING = 1000
"""An answer that is no exit code."""


class Nursery:
    """The process to fork from. It answers one line for each line it is sent."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[2],
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def fork(self, environment: dict[str, str]) -> "Forked":
        """A new process that runs ``cacher serve`` in this environment."""
        return Forked(self, self.ask({"do": "fork", "environment": environment}))

    def ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class Forked:
    """A forked process, as far as tests need one (compare :class:`subprocess.Popen`)."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self._exit_code: int | None = None
        self.pid = pid

    def send_signal(self, which: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, which)

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; null while it runs."""
        if self._exit_code is None:
            self._note(self._nursery.ask({"do": "poll", "pid": self.pid}))
        return self._exit_code

    def wait(self, timeout: float) -> int | None:
        """Its exit code, once it has ended: it was sent SIGKILL or SIGTERM, so it does."""
        del timeout
        if self._exit_code is None:
            self._note(self._nursery.ask({"do": "wait", "pid": self.pid}))
        return self._exit_code

    def _note(self, answer: int) -> None:
        self._exit_code = None if answer == RUNNING else answer


class FastServer(Server):
    """A server that a nursery brings forth. It first imports the module ``PRELUDE`` names."""

    def __init__(self, nursery: Nursery, database: Path, **settings: str) -> None:
        super().__init__(database, **{**FAST, **settings})
        self._nursery = nursery

    def start(self, *, timeout_s: float = 120) -> None:
        """Fork the process and wait until it is ready."""
        process = self._nursery.fork(self._environment)
        self.process = process  # type: ignore[assignment]
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                httpx.get(f"{self.url}/ready", timeout=5).raise_for_status()
                return
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise
                time.sleep(0.02)


def _serve(environment: dict[str, str]) -> None:
    """Become a server. Does not return."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["cacher", "serve"]
    if "PRELUDE" in environment:
        importlib.import_module(environment["PRELUDE"])
    try:
        importlib.import_module("app.cli").main()
    finally:
        os._exit(70)


def _answer(request: dict[str, Any]) -> int:
    match request:
        case {"do": "fork", "environment": environment}:
            pid = os.fork()
            if pid == 0:
                _serve(environment)
            return pid
        case {"do": "wait", "pid": pid}:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        case {"do": "poll", "pid": pid}:
            ended, status = os.waitpid(pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if ended else RUNNING
        case _:
            raise ValueError(request)


def main() -> None:
    """Fork on demand until the standard input ends."""
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        sys.stdout.write(f"{_answer(msgspec.json.decode(line))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
