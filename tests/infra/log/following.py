"""What tests of every log ask of it."""

from domain.chain import follow
from domain.ports import LogReader


async def verified(log: LogReader) -> int:
    """Follow the whole chain to the head; the number of rows."""
    head, rows = await log.genesis(), await log.rows()
    for row in rows:
        head = follow(head, row)
    assert head == await log.head()
    return len(rows)
