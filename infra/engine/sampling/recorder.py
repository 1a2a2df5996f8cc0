"""What is recorded of a row of logits, on a thread of its own: off the way to the next token."""

import functools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from domain.errors import Refusal
from infra.engine.kernels.blake2b import LANES
from infra.engine.sampling import sampler
from infra.engine.sampling.sampler import Row

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 16 << 20
"""Logits that may wait, by default: the rows of a few passes. A step lags behind by no more."""


class Entry(NamedTuple):
    """Something to be done for a recording, with the digest of a row if there is one."""

    recording: "Recording"
    row: Row | None
    work: Callable[[str], None]

    @property
    def size(self) -> int:
        """Bytes it holds."""
        return 0 if self.row is None else self.row.nbytes


class Recorder:
    """One thread that does what it is given, in order. Used as a context manager.

    ``max_bytes`` bounds the logits that wait for it.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._room = threading.Condition()
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends when all that was put is done."""
        self._entries.put(None)
        self._thread.join()

    def put(self, entry: Entry) -> None:
        """Have something done after what was put before; waits while there is no room for it."""
        if entry.size:
            with self._room:
                self._room.wait_for(lambda: self._fits(entry.size))
                self._held_bytes += entry.size
        self._entries.put(entry)

    def _fits(self, size: int) -> bool:
        return self._held_bytes == 0 or self._held_bytes + size <= self._max_bytes

    def _run(self) -> None:
        while batch := self._take():
            _record(batch)
            size = sum(entry.size for entry in batch)
            batch.clear()  # holds no logits while it waits
            with self._room:
                self._held_bytes -= size
                self._room.notify_all()

    def _take(self) -> list[Entry]:
        """What waits, as much as is hashed together; nothing after the end."""
        batch: list[Entry] = []
        while not batch or (len(batch) < LANES and not self._entries.empty()):
            entry = self._entries.get()
            if entry is None:
                self._entries.put(None)
                break
            batch.append(entry)
        return batch


def _record(batch: list[Entry]) -> None:
    try:
        digests = iter(sampler.digests([entry.row for entry in batch if entry.row is not None]))
    except Exception as error:
        for entry in batch:
            entry.recording.end(error)
        return
    for entry in batch:
        entry.recording.do(entry.work, "" if entry.row is None else next(digests))


class Recording:
    """The recorder's work for one job. Ends with its first error, which goes to ``deliver``."""

    def __init__(self, recorder: Recorder, deliver: Callable[[Exception], None]) -> None:
        self._recorder = recorder
        self._deliver = deliver
        self._ended = False

    def put(self, work: Callable[[], None]) -> None:
        """Have ``work`` done after what was put before."""
        self._recorder.put(Entry(self, None, lambda _: work()))

    def put_row(self, row: Row, work: Callable[[str], None]) -> None:
        """Have ``work`` done with the digest of a row of logits, which stays as it is until then.

        Waits while the recorder is too far behind.
        """
        self._recorder.put(Entry(self, row, work))

    def fail(self, error: Exception) -> None:
        """End with ``error`` after what was put before."""
        self.put(functools.partial(self.end, error))

    def do(self, work: Callable[[str], None], digest: str) -> None:
        """On the recorder's thread: do ``work``, unless there was an error before."""
        if self._ended:
            return
        try:
            work(digest)
        except Exception as error:
            self.end(error)

    def end(self, error: Exception) -> None:
        """On the recorder's thread: deliver an error, and nothing after it."""
        if not self._ended:
            self._ended = True
            if not isinstance(error, Refusal):
                logger.error("a job failed", exc_info=error)
            self._deliver(error)
