"""Long work that a client asks for and comes back to: one at a time, in the order it came."""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, Generic, Literal, TypeVar

from domain.errors import QueueFull

P = TypeVar("P")
R = TypeVar("R")

Status = Literal["waiting", "running", "done", "failed", "cancelled"]

Work = Callable[[Callable[[P], None]], Awaitable[R]]
"""What a job does; it calls what it is given with how far it is."""

MAX_WAITING: Final = 16
MAX_KEPT: Final = 64


class Job(Generic[P, R]):
    """One piece of work. Times are RFC 3339, UTC; ``problem`` is why it failed."""

    def __init__(self, name: str, created_at: str) -> None:
        self.id = f"{name}-{uuid.uuid4().hex}"
        self.status: Status = "waiting"
        self.progress: P | None = None
        self.result: R | None = None
        self.problem: Exception | None = None
        self.created_at = created_at
        self.started_at: str | None = None
        self.ended_at: str | None = None
        self._ended = asyncio.Event()

    async def ended(self) -> None:
        """Return once it has ended, however it did."""
        await self._ended.wait()

    def tell(self, progress: P) -> None:
        """Take note of how far it is."""
        self.progress = progress

    def end(self) -> None:
        """Take note that it has ended."""
        self._ended.set()


class Jobs(Generic[P, R]):
    """Jobs of one kind, of which one runs.

    At most ``max_waiting`` wait. Of those that have ended, the ``max_kept`` that did so last can
    be asked for. ``now`` tells the time.
    """

    def __init__(
        self,
        name: str,
        *,
        now: Callable[[], str],
        max_waiting: int = MAX_WAITING,
        max_kept: int = MAX_KEPT,
    ) -> None:
        self._name = name
        self._now = now
        self._max_waiting = max_waiting
        self._max_kept = max_kept
        self._turn = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._jobs: dict[str, Job[P, R]] = {}
        self._ended: OrderedDict[str, Job[P, R]] = OrderedDict()

    def start(self, work: Work[P, R]) -> Job[P, R]:
        """Have work done, once all that came before is.

        Raises:
            QueueFull: too much is waiting already.
        """
        if len(self._tasks) > self._max_waiting:
            raise QueueFull(self._max_waiting)
        job: Job[P, R] = Job(self._name, self._now())
        self._jobs[job.id] = job
        task = self._tasks[job.id] = asyncio.create_task(self._do(job, work))
        task.add_done_callback(lambda _: self._end(job))
        return job

    def find(self, job_id: str) -> Job[P, R] | None:
        """A job that waits, runs, or ended not long ago."""
        return self._jobs.get(job_id) or self._ended.get(job_id)

    async def cancel(self, job: Job[P, R]) -> None:
        """End a job, wherever it is; one that has ended stays as it is."""
        task = self._tasks.get(job.id)
        if task is not None:
            task.cancel()
            await job.ended()

    def forget(self, job: Job[P, R]) -> None:
        """Keep a job that has ended no longer: nobody will ask for it."""
        self._ended.pop(job.id, None)

    def stop(self) -> None:
        """Have every job end."""
        for task in self._tasks.values():
            task.cancel()

    async def close(self) -> None:
        """End every job."""
        self.stop()
        for job in list(self._jobs.values()):
            await job.ended()

    async def _do(self, job: Job[P, R], work: Work[P, R]) -> None:
        async with self._turn:
            job.status, job.started_at = "running", self._now()
            try:
                job.result = await work(job.tell)
            except Exception as error:  # whoever asks for the job is told
                job.status, job.problem = "failed", error
            else:
                job.status = "done"

    def _end(self, job: Job[P, R]) -> None:
        if job.status in ("waiting", "running"):
            job.status = "cancelled"
        job.ended_at = self._now()
        del self._jobs[job.id], self._tasks[job.id]
        self._ended[job.id] = job
        while len(self._ended) > self._max_kept:
            self._ended.popitem(last=False)
        job.end()
