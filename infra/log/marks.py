"""The mark of how far a log was verified, in a file beside it."""

import asyncio
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from domain.report import Mark

SUFFIX: Final = ".verified"


class FileMarks:
    """``<database>.verified``: the mark as JSON, and when it was made (``Marks``)."""

    def __init__(self, database: Path) -> None:
        database = database.resolve()
        self.path = database.with_name(database.name + SUFFIX)

    async def load(self) -> Mark | None:
        """The mark, if one is kept that can be read."""
        try:
            return msgspec.json.decode(await asyncio.to_thread(self.path.read_bytes), type=Mark)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def save(self, mark: Mark) -> None:
        """Keep a mark in place of the one before; on disk before this returns.

        Raises:
            OSError: it could not be written.
        """
        made = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        document = msgspec.to_builtins(mark) | {"verified_at": made}
        await asyncio.to_thread(_replace, self.path, msgspec.json.encode(document))

    async def forget(self) -> None:
        """Keep none any more.

        Raises:
            OSError: it could not be removed.
        """
        await asyncio.to_thread(self.path.unlink, missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another at once: after a crash one of the two is whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
