"""A disk that is full while a file says so: imported by a server before it opens its database.

The file, named by ``FULL_DISK``, holds how many more syncs succeed before that.
"""

import os
from pathlib import Path
from typing import Final

from tests.faults.vfs import FULL, Operation, Proceed, watch

FULL_DISK: Final = Path(os.environ["FULL_DISK"])


class _Switched:
    def __init__(self) -> None:
        self._syncs_left: int | None = None

    def __call__(self, operation: Operation, proceed: Proceed) -> int:
        if not FULL_DISK.exists():
            self._syncs_left = None
        elif self._syncs_left is None:
            self._syncs_left = int(FULL_DISK.read_text())
        if self._syncs_left == 0 and operation.kind == "write":
            return FULL
        if self._syncs_left and operation.kind == "sync":
            self._syncs_left -= 1
        return proceed(operation)


watch(_Switched())
