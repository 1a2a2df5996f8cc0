"""The files that a command writes: which it may write is found out before its work."""

import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from app import bootstrap
from app.cli.common import fail


class Outputs:
    """The files that one command writes.

    None of them may be, or lie where there would be, a file of a log that the command reads or of
    the settings (its database, keys, WAL, lock, mark), another file that it reads, or one that it
    writes besides.
    """

    def __init__(self, *logs: Path, reads: Iterable[Path | None] = ()) -> None:
        self._taken: dict[object, str] = {}
        for log in logs:
            self._take(bootstrap.files_of(log), f"belongs to the log {log}")
        self._take([file.resolve() for file in reads if file], "is what the command reads")

    def add(self, file: Path, *, replace: bool) -> Path:
        """Where to write what goes to ``file``: where its links lead to.

        The command ends if that is taken, is there already and not to be replaced, is no regular
        file, or cannot be written.
        """
        try:
            target = file.resolve()
            there = target.exists()
            if there and not stat.S_ISREG(target.stat().st_mode):
                fail(f"{file} is no regular file")
            # A database comes with files of its own, and each file has another name until it ends.
            for name in _names([*bootstrap.files_of(target), Path(f"{target}.partial")]):
                if name in self._taken:
                    fail(f"{file} cannot be written: it {self._taken[name]}; name another file")
            if there and not replace:
                fail(f"{file} is there already; --force replaces it")
            if not target.parent.is_dir():
                fail(f"there is no folder {target.parent}")
            with TemporaryFile(dir=target.parent):  # only trying says whether it can be done
                pass
        except (OSError, RuntimeError) as error:  # links that lead in a circle
            fail(f"{file} cannot be written: {getattr(error, 'strerror', None) or error}")
        self._take([target], "is written by another option")
        return target

    def report(self, file: Path | None) -> Path | None:
        """The same for a report, which takes the place of an earlier one."""
        return None if file is None else self.add(file, replace=True)

    def _take(self, files: Iterable[Path], why: str) -> None:
        self._taken |= dict.fromkeys(_names(files), why)


def write(target: Path, content: str | bytes) -> None:
    """Put a report in its place."""
    with bootstrap.writing(target) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _names(files: Iterable[Path]) -> list[object]:
    """What tells files apart: their paths and, of those that are there, their numbers on disk."""
    names: list[object] = []
    for file in files:
        names.append(file)
        with suppress(OSError):
            found = file.stat()
            names.append((found.st_dev, found.st_ino))
    return names
