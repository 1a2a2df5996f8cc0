"""A copy of a log beside its writer, and the check that a copy can be restored.

The copy is made by SQLite's backup API, in steps, within one read transaction: it is the log at one
moment. (Without the transaction the steps begin anew whenever something is written, and never end
beside a busy server.) Nobody waits for it; the WAL only cannot be begun anew while it lasts, and
grows by what is written in that time.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from msgspec import structs

from domain.chain import Head, Row, follow, genesis
from domain.ids import StateId
from domain.log_errors import ChainBroken, LogError
from domain.upkeep import Checked
from infra.log import queries
from infra.log.batch import as_row
from infra.log.files import beside, partial_of, put
from infra.log.migrate import lock
from infra.log.sqlite_reader import identity, read_only

PAGES: Final = 1024
"""Pages copied in one step."""

_LAST: Final = 2**63 - 1

_STATES: Final = "SELECT state_id, created_position, version FROM states"

Progress = Callable[[int, int], None]
"""Told pages done and pages in all."""


def back_up(
    path: Path,
    target: Path,
    *,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
) -> Checked:
    """Copy the log at ``path`` to ``target``, which it becomes only once it is found to be sound.

    Keys of an erasable log are in a file of their own and are not copied.

    Raises:
        LogError: there is no log, ``target`` is there and not to be replaced, or it cannot be
            written; nothing was changed.
        LogIsLocked: someone uses ``target`` as a log.
    """
    path, target = path.resolve(), target.resolve()
    if path == target:
        raise LogError(f"{target} is the log itself; name another file for its backup")
    partial = partial_of(target)
    with _reserved(target, replace=replace):
        partial.unlink(missing_ok=True)
        try:
            head = _copy(path, partial, progress)
            checked = check(partial)
            if not checked.problems and checked.head != head:
                problem = f"the copy ends at position {checked.head.position}, not {head.position}"
                checked = structs.replace(checked, problems=(problem,))
            if not checked.problems:
                put(partial, target)
        finally:
            for file in (partial, *beside(partial)):
                file.unlink(missing_ok=True)
    return checked


def check(path: Path) -> Checked:
    """Whether a server could go on from the database at ``path``: all that needs no model.

    SQLite's own integrity, the whole chain from its genesis, the versions of each state without a
    gap, and the list of states.

    Raises:
        LogError: it is no log, or one of another schema.
    """
    if not path.exists():
        raise LogError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise LogError(f"{path} is empty: it is no log")
    found: dict[StateId, tuple[int, int]] = {}
    events = 0
    with read_only(path) as connection:
        connection.execute("BEGIN")
        (log_id, erasable), problems = identity(connection), list(_damages(connection))
        head = genesis(log_id)
        try:
            for columns in connection.execute(queries.ROWS, (0, _LAST, -1)):
                row = as_row(columns)
                head = follow(head, row)
                _count(found, row)
                events += 1
        except ChainBroken as error:
            problems.append(str(error))
        except sqlite3.Error as error:
            problems.append(f"after position {head.position} it cannot be read: {error}")
        else:
            problems += _compare_states(connection, found)
    return Checked(
        head=head,
        events=events,
        states=len(found),
        erasable=erasable,
        problems=tuple(problems),
    )


def _count(found: dict[StateId, tuple[int, int]], row: Row) -> None:
    """Note where a state began and which version it is at.

    Raises:
        ChainBroken: a version is missing, or there twice; or one was looked at that is not there.
    """
    begun, version = found.get(row.state_id, (row.position, 0))
    if row.version is None:
        if row.at_version is None or not 1 <= row.at_version <= version:
            raise ChainBroken(
                row.position, f"version {row.at_version} of {row.state_id}, which is at {version}"
            )
        return
    if row.version != version + 1:
        raise ChainBroken(
            row.position, f"version {row.version} of {row.state_id} comes after {version}"
        )
    found[row.state_id] = (begun, row.version)


def _damages(connection: sqlite3.Connection) -> Iterator[str]:
    try:
        for (message,) in connection.execute("PRAGMA integrity_check(10)"):
            if message != "ok":
                yield f"integrity_check: {message}"
    except sqlite3.Error as error:
        yield f"integrity_check: {error}"


def _compare_states(
    connection: sqlite3.Connection, found: dict[StateId, tuple[int, int]]
) -> Iterator[str]:
    listed = {state_id: tuple(stands) for state_id, *stands in connection.execute(_STATES)}
    for state_id in sorted(listed.keys() | found.keys()):
        if listed.get(state_id) != found.get(state_id):
            yield f"the list of states is not that of the events: {state_id}"
            return


def _copy(path: Path, partial: Path, progress: Progress) -> Head:
    """Copy a log as it stands now; returns its head at that moment."""
    with read_only(path) as source, closing(sqlite3.connect(partial)) as copy:
        source.execute("BEGIN")
        head = source.execute(queries.HEAD).fetchone()
        try:
            source.backup(
                copy, pages=PAGES, progress=lambda _, left, total: progress(total - left, total)
            )
            # One file: it takes in the WAL that a copy of a log in WAL mode has beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.Error as error:
            raise LogError(f"{path} could not be copied to {partial}: {error}") from error
        return Head(*head) if head else genesis(identity(source)[0])


@contextmanager
def _reserved(target: Path, *, replace: bool) -> Iterator[None]:
    """Nobody else makes or uses ``target`` meanwhile, and it may be written.

    Raises:
        LogError, LogIsLocked: it may not.
    """
    if not target.parent.is_dir():
        raise LogError(f"there is no folder {target.parent}")
    held = lock(target)
    try:
        there = [file for file in (target, *beside(target)) if file.exists()]
        if there and not replace:
            raise LogError(f"{there[0]} is there already; --force replaces it")
        yield
    except (OSError, sqlite3.Error) as error:
        raise LogError(f"{target} cannot be written: {error}") from error
    finally:
        held.release()
