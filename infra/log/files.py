"""The files of a database: putting a finished one in its place."""

import os
from pathlib import Path
from typing import Final

_BESIDE: Final = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database and would take for a part of whatever lies there later."""


def beside(path: Path) -> list[Path]:
    """What SQLite may keep beside a database."""
    return [Path(f"{path}{suffix}") for suffix in _BESIDE]


def put(partial: Path, target: Path) -> None:
    """Give a finished file its name, for good; what belonged to a file of that name goes first."""
    for file in beside(target):
        file.unlink(missing_ok=True)
    partial.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
