"""Whether a database and the WAL beside it belong together.

What SQLite has moved from the WAL into the database stays in the WAL until it is begun anew, and
whoever reads finds those pages in the WAL first. If such a WAL loses its end (cut, damaged, or
copied at another moment than the database), older pages hide newer ones: the log that is read is a
mixture of two moments. Every transaction that records an event changes the one page that counts
positions, so that page alone shows it (https://sqlite.org/wal.html#how_to_corrupt_a_database_file).
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from domain.ids import Position
from domain.log_errors import LogError
from infra.log import queries


def check_wal(path: Path) -> None:
    """Refuse a database whose WAL ends before what was moved from it; changes nothing.

    Raises:
        LogError: it does; says what to do.
    """
    if not Path(f"{path}-wal").exists():
        return
    try:
        moved = _last_position(path, "immutable=1")  # of the database without its WAL
    except sqlite3.Error:  # a crash came while pages were moved: the WAL still has them all
        return
    try:
        seen = _last_position(path, "mode=ro")
    except sqlite3.OperationalError:  # it cannot be opened just now, for whatever reason
        return
    except sqlite3.DatabaseError:  # pages of two moments need not make a database
        seen = Position(0)
    if moved > seen:
        raise LogError(
            f"{path} and {path.name}-wal do not belong together: the database holds position"
            f" {moved}, the WAL that it came from ends at position {seen}. The WAL was cut, damaged"
            " or copied at another moment. Put back the two files as they were together, or restore"
            " a backup (`cacher backup` makes one beside a running server)"
        )


def _last_position(path: Path, how: str) -> Position:
    """The largest position handed out."""
    with closing(sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True)) as connection:
        found = connection.execute(queries.LAST_POSITION).fetchone()
    return Position(found[0] if found else 0)
