"""Waiting in line: one at a time per key, and never too many in all."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from domain.errors import QueueFull


class Turns:
    """Mutual exclusion per key, first come first served; at most ``limit`` hold or wait.

    A turn may count for several, for more than the limit only where nobody else has one. ``what``
    holds or waits is for whoever is refused.

    Any task may end a turn, since a stream can be closed by another than it was read by.
    """

    def __init__(self, limit: int, what: str = "requests are waiting") -> None:
        self._limit = limit
        self._what = what
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self._users: Counter[Hashable] = Counter()

    @property
    def held(self) -> int:
        """Turns held or waited for."""
        return self._users.total()

    @asynccontextmanager
    async def turn(self, key: Hashable, *, count: int = 1) -> AsyncIterator[None]:
        """Wait for the key's turn and hold it within; it counts for ``count``.

        Raises:
            QueueFull: too many hold or wait already.
        """
        self.check(count)
        self._users[key] += count
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= count
            if not self._users[key]:
                del self._users[key], self._locks[key]

    def check(self, count: int = 1) -> None:
        """Refuse whoever could not get a turn now.

        Raises:
            QueueFull: too many hold or wait already.
        """
        if self.held and self.held + count > self._limit:
            raise QueueFull(self._limit, self._what)

    async def idle(self, key: Hashable) -> None:
        """Wait for the end of every turn of the key that is held or waited for now; takes none."""
        if lock := self._locks.get(key):
            async with lock:
                pass
