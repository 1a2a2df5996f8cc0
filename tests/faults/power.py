"""What a disk holds after its power was cut: what was synced, and of the rest anything."""

import random
from collections.abc import Iterator
from typing import Final

from tests.faults.vfs import OPEN_JOURNAL, Operation

SECTOR: Final = 512
"""What a disk writes wholly or not at all; bytes beside a write are left as they were."""


class File:
    """One file: ``durable`` is what was synced, ``unsynced`` what was done to it since."""

    def __init__(self, *, syncs_folder: bool) -> None:
        self.durable = b""
        self.unsynced: list[Operation] = []
        self.syncs_folder = syncs_folder

    def sync(self) -> None:
        self.durable = _apply(self.durable, self.unsynced)
        self.unsynced = []

    def survives(self, chance: random.Random) -> bytes:
        """What was synced, and any of the rest."""
        kept = [part for one in self.unsynced for part in _parts(one) if chance.random() < 0.5]
        return _apply(self.durable, kept)


class Disk:
    """Follows what is done, one operation after another. A name stands for a file, or for none.

    Names are only safe once their folder was synced: SQLite does so with the first sync of a
    journal or WAL.
    """

    def __init__(self) -> None:
        self._names: dict[str, list[File | None]] = {}  # what it may stand for, the newest last

    def follow(self, operation: Operation) -> None:
        names = self._names.setdefault(operation.path, [None])
        file = names[-1]
        match operation.kind:
            case "open":
                names.append(File(syncs_folder=bool(operation.flags & OPEN_JOURNAL)))
            case "delete":
                names.append(None)
            case "sync":
                assert file is not None
                file.sync()
                if file.syncs_folder:
                    file.syncs_folder = False
                    self._names = {path: found[-1:] for path, found in self._names.items()}
            case _:
                assert file is not None
                file.unsynced.append(operation)

    def lose_power(self, chance: random.Random) -> dict[str, bytes]:
        """What each name stands for after a cut; names that stand for nothing are left out."""
        found = {path: chance.choice(names) for path, names in self._names.items()}
        return {path: file.survives(chance) for path, file in found.items() if file}

    def keep_power(self) -> dict[str, bytes]:
        """What each name stands for now."""
        now = {path: names[-1] for path, names in self._names.items()}
        return {path: _apply(file.durable, file.unsynced) for path, file in now.items() if file}


def _parts(operation: Operation) -> Iterator[Operation]:
    """What of an operation can happen by itself: the sectors of a write."""
    if operation.kind == "truncate":
        yield operation
        return
    begin, end = operation.offset, operation.offset + len(operation.data)
    while begin < end:
        until = min(end, (begin // SECTOR + 1) * SECTOR)
        data = operation.data[begin - operation.offset : until - operation.offset]
        yield operation._replace(offset=begin, data=data)
        begin = until


def _apply(content: bytes, operations: list[Operation]) -> bytes:
    image = bytearray(content)
    for one in operations:
        size = one.offset if one.kind == "truncate" else one.offset + len(one.data)
        if one.kind == "truncate":
            del image[size:]
        image.extend(bytes(max(0, size - len(image))))
        if one.kind == "write":
            image[one.offset : size] = one.data
    return bytes(image)
