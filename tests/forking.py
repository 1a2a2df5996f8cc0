"""Processes that start in a moment: forked from one that has imported everything already.

The import of torch and transformers is most of what a start costs. What is forked, served and
killed is the command line as ever: the model is loaded and the database opened by the fork itself.
"""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

import msgspec

from tests.support import Server, clean_environment

PROGRAMS: Final = {"cacher": "app.cli", "uvicorn": "uvicorn", "shell": "tests.warm_shell"}
"""What can be run, and the module whose ``main`` it is."""
FAST: Final = {"CACHER_THREADS": "1", "CACHER_HOT_CACHE_BYTES": str(32 << 20)}
"""Settings for many small servers on a busy machine; neither is part of the fingerprint."""

RUNNING: Final = 1000
"""An answer that is no exit code."""

_PR_SET_PDEATHSIG: Final = 1


class Nursery:
    """The process to fork from. It answers one line for each line it is sent.

    It does not outlive an answer that nobody took, which would be taken for that to the next line;
    its forks end with it.
    """

    def __init__(self) -> None:
        self._home = TemporaryDirectory()  # of the hub's models: here is none
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1],
            env=clean_environment(HF_HOME=self._home.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=60)
        finally:
            self._process.kill()
            self._home.cleanup()

    def fork(self, command: Sequence[str], environment: dict[str, str], **files: Path) -> "Forked":
        """A new process that runs a command; ``files`` are its ``output`` and its ``errors``."""
        named = {name: str(file) for name, file in files.items()}
        return Forked(self, self.ask({"do": "fork", "of": [list(command), environment, named]}))

    def run(self, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a ``cacher`` command to its end, for 5 minutes at most."""
        command = ["cacher", *map(str, arguments)]
        with TemporaryDirectory() as folder:
            output, errors = Path(folder) / "output", Path(folder) / "errors"
            process = self.fork(
                command, clean_environment(**settings), output=output, errors=errors
            )
            code = process.wait(timeout=300)
            return subprocess.CompletedProcess(
                command, code, output.read_text(), errors.read_text()
            )

    def ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())
        except BaseException:
            self._process.kill()
            raise


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
            answer = self._nursery.ask({"do": "poll", "of": self.pid})
            self._exit_code = None if answer == RUNNING else answer
        return self._exit_code

    def wait(self, timeout: float) -> int:
        """Its exit code, once it has ended; one that takes longer is killed: an error."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} did not end within {timeout} s")
            time.sleep(0.002)
        return code


class ForkedServer(Server):
    """A server that a nursery brings forth. It first imports the module ``PRELUDE`` names.

    ``errors`` is the file for what it logs. Its ``HF_HOME`` is the nursery's.
    """

    def __init__(
        self, nursery: Nursery, database: Path, errors: Path | None = None, **settings: str
    ) -> None:
        super().__init__(database, **settings)
        self._nursery = nursery
        self._files = {} if errors is None else {"errors": errors}

    def _begin(self) -> Forked:
        return self._nursery.fork(["cacher", "serve"], self.environment, **self._files)


class FastServer(ForkedServer):
    """One of many small ones."""

    def __init__(
        self, nursery: Nursery, database: Path, errors: Path | None = None, **settings: str
    ) -> None:
        super().__init__(nursery, database, errors, **{**FAST, **settings})


def end_with_parent() -> None:
    """Have a fork killed where its parent ends, if the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _become(command: list[str], environment: dict[str, str], files: dict[str, str]) -> None:
    """Be the process that runs a command. Does not return."""
    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((2, "errors"), (1, "output")):
        file = files.get(name)
        os.dup2(2 if file is None else os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    code: Any = 70
    try:
        if "PRELUDE" in environment:
            importlib.import_module(environment["PRELUDE"])
        importlib.import_module(PROGRAMS[command[0]]).main(prog_name=command[0])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _answer(request: dict[str, Any]) -> int:
    match request:
        case {"do": "fork", "of": [command, environment, files]}:
            pid = os.fork()
            if pid == 0:
                _become(command, environment, files)
            return pid
        case {"do": "poll", "of": pid}:
            ended, status = os.waitpid(pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if ended else RUNNING
        case _:
            raise ValueError(request)


def _warm() -> None:
    """Import everything, and make an application.

    No model is loaded: what MKL and OpenMP keep of a thread that computed once is not fit for a
    fork, in which that thread is gone.
    """
    from app.main import create_app
    from app.settings import Settings

    for name in (*PROGRAMS.values(), "infra.engine.loading", "torch.export._trace"):
        importlib.import_module(name)
    create_app(Settings(model_name="cacher-tiny", threads=1))


def main() -> None:
    """Fork on demand until the standard input ends."""
    _warm()
    for line in sys.stdin:
        sys.stdout.write(f"{_answer(msgspec.json.decode(line))}\n")
        sys.stdout.flush()
    os._exit(0)  # nothing is left to be done, and Python would take a second for it


if __name__ == "__main__":
    main()
