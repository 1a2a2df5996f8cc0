"""A disk that fails at its n-th operation, and then until it is repaired."""

from collections.abc import Callable
from typing import Final, NamedTuple

from tests.faults.vfs import (
    FULL,
    IOERR_FSYNC,
    IOERR_TRUNCATE,
    IOERR_WRITE,
    OK,
    Operation,
    Proceed,
    without_syncs,
)


class Failure(NamedTuple):
    """Which operations fail, with which code, and what of a write is carried out all the same."""

    kinds: tuple[str, ...]
    code: int
    written: Callable[[bytes], bytes] = lambda data: b""
    lasting: bool = True


FAILURES: Final = {
    "full": Failure(("write",), FULL),
    "full in the middle of a write": Failure(("write",), FULL, lambda data: data[: len(data) // 2]),
    "a write that fails once": Failure(("write",), IOERR_WRITE, lambda data: data[::-1], False),
    "syncs that fail": Failure(("sync",), IOERR_FSYNC),
    "a sync that fails once": Failure(("sync",), IOERR_FSYNC, lasting=False),
    "a truncation that fails once": Failure(("truncate",), IOERR_TRUNCATE, lasting=False),
}


class FailingDisk:
    """Lets operations through up to the ``at``-th of those that may fail (from 1)."""

    def __init__(self, failure: Failure, at: int) -> None:
        self._failure = failure
        self._left = at
        self._failing = False
        self.failed = 0

    def repair(self) -> None:
        """Have space again, and work."""
        self._failing = False

    def __call__(self, operation: Operation, proceed: Proceed) -> int:
        if operation.kind not in self._failure.kinds:
            return without_syncs(operation, proceed)
        self._left -= 1
        if self._left == 0:
            self._failing = True
        if not self._failing:
            return without_syncs(operation, proceed)
        self._failing = self._failure.lasting
        self.failed += 1
        if part := self._failure.written(operation.data):
            assert proceed(operation._replace(data=part)) == OK
        return self._failure.code
