"""The files of a log: which they are, and putting a finished one in its place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from infra.log.keyring import key_file
from infra.log.marks import SUFFIX

_BESIDE: Final = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database and would take for a part of whatever lies there later."""


def beside(path: Path) -> list[Path]:
    """What SQLite may keep beside a database."""
    return [Path(f"{path}{suffix}") for suffix in _BESIDE]


def files_of(database: Path) -> list[Path]:
    """All that may be there of a log: its database, keys, lock and mark, and what SQLite keeps."""
    keys = key_file(database)
    others = [Path(f"{database}{suffix}") for suffix in (".lock", SUFFIX)]
    return [database, *beside(database), keys, *beside(keys), *others]


def partial_of(target: Path) -> Path:
    """Where a file is written until it is finished."""
    return Path(f"{target}.partial")


@contextmanager
def writing(target: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``target`` at the end, whole and on disk.

    Nothing is left of it if it does not come to that.

    Raises:
        OSError: it cannot be written; names ``target``.
    """
    partial = partial_of(target)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(partial, target)
    except OSError as error:  # what fails in a write names no file
        raise OSError(error.errno, error.strerror, error.filename or str(target)) from error
    finally:
        partial.unlink(missing_ok=True)


def rename(partial: Path, target: Path) -> None:
    """Give a finished file its name, for good."""
    partial.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def put(partial: Path, target: Path) -> None:
    """Give a finished database its name; what belonged to one of that name goes first."""
    for file in beside(target):
        file.unlink(missing_ok=True)
    rename(partial, target)
