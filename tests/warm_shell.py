"""Commands of a shell that start in a moment: in forks of a process that has imported everything.

Programs in the ``PATH`` of the shell, called as those they stand for, send their arguments,
environment, folder and standard streams over a socket; a fork becomes the command with all of
these, and the program ends with its exit code.
"""

import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from tests.forking import Nursery  # what asks for a command imports nothing it need not

SOCKET: Final = "WARM_SHELL_SOCKET"
LENGTH_BYTES: Final = 8
FAILED: Final = 70
"""The exit code of a command that did not come to its end."""

CACHER: Final = """#!/bin/sh
exec "{python}" -IS "{here}" "{socket}" cacher "$@"
"""
PYTHON: Final = """#!/bin/sh
[ "$1 $2" = "-m pytest" ] || exec "{python}" "$@"
exec "{python}" -IS "{here}" "{socket}" python "$@"
"""


class WarmShell:
    """Has a folder with ``cacher``, and with a ``python`` that is warm for ``-m pytest``."""

    def __init__(self, nursery: "Nursery", environment: dict[str, str]) -> None:
        self.programs = Path(tempfile.mkdtemp())
        address = self.programs / "socket"  # a short path, as sockets must have
        for name, text in (("cacher", CACHER), ("python", PYTHON)):
            program = self.programs / name
            program.write_text(text.format(python=sys.executable, here=__file__, socket=address))
            program.chmod(0o755)
        self._process = nursery.fork(["shell"], {**environment, SOCKET: str(address)})
        while not address.exists():
            assert self._process.poll() is None
            time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=60)
        shutil.rmtree(self.programs)


def main(prog_name: str) -> None:
    """Run commands, each in a fork, until killed."""
    del prog_name
    address = os.environ.pop(SOCKET)
    from tests.forking import end_with_parent

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen()
        Path(f"{address}.new").rename(address)  # it is there once it answers
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
        while True:
            connection, _ = listening.accept()
            with connection:
                if os.fork() == 0:
                    end_with_parent()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listening.close()
                    _serve(connection)


def _serve(connection: socket.socket) -> None:
    """Become the command that is asked for, and tell its exit code. Does not return."""
    code = FAILED
    try:
        length, streams, _, _ = socket.recv_fds(connection, LENGTH_BYTES, 3)
        with connection.makefile("rb") as sent:
            arguments, folder, environment = json.loads(sent.read(int.from_bytes(length)))
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        code = _exit_code(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([code]))
    finally:
        os._exit(code)


def _end_with(connection: socket.socket) -> None:
    """End once the program that asked has ended: it sends nothing more."""
    connection.recv(1)
    os._exit(FAILED)


def _exit_code(arguments: list[str]) -> int:
    """Run a command as the interpreter would run a program."""
    try:
        if arguments[0] == "cacher":
            sys.argv = arguments
            importlib.import_module("app.cli").main()
        else:
            _, _, module, *rest = arguments
            sys.argv = [module, *rest]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def ask(address: str, arguments: list[str]) -> int:
    """Have a command run with what is this process's, and return its exit code."""
    request = json.dumps([arguments, str(Path.cwd()), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(request).to_bytes(LENGTH_BYTES)], [0, 1, 2])
        connection.sendall(request)
        return (connection.recv(1) or bytes([FAILED]))[0]


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
