"""All work on one model: jobs in, forward passes, results out. Runs on the engine's thread."""

import logging
from collections.abc import Callable
from functools import partial

from domain.errors import Refusal
from infra.engine.blocks import BlockPool
from infra.engine.executor import Executor
from infra.engine.jobs.job import Job
from infra.engine.jobs.observation import Gallery, Observation
from infra.engine.scheduler import Scheduler, Sequence

logger = logging.getLogger(__name__)


class Runner:
    """Steps a model through the jobs given to it."""

    def __init__(
        self,
        executor: Executor,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_rows: int,
        max_prefill_rows_beside_streams: int | None = None,
        max_observed_rows_beside_streams: int | None = None,
    ) -> None:
        self.executor = executor
        self.pool = pool
        self.scheduler = Scheduler(
            pool,
            max_sequences=max_sequences,
            max_rows=max_rows,
            max_prefill_rows_beside_streams=max_prefill_rows_beside_streams,
            max_observed_rows_beside_streams=max_observed_rows_beside_streams,
        )
        self._jobs: dict[Sequence, Job] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return self.scheduler.busy

    @property
    def streaming(self) -> bool:
        """Whether somebody waits for the next token of a text."""
        return self.scheduler.streaming

    def add(self, job: Job) -> None:
        """Take on a job."""
        self._jobs[job.text] = job
        self.scheduler.add(job.text)

    def drop(self, job: Job) -> None:
        """Stop working on a job, finished or not; its blocks are free at once."""
        if self._jobs.pop(job.text, None) is not None:
            if isinstance(job, Observation):
                job.leave()
            self.scheduler.remove_group(job.text)

    def abandon(self, error: Exception) -> None:
        """Fail every job: what went wrong is not the fault of one.

        Nothing stays in the cache, since a block may not hold what it is known for.
        """
        for job in list(self._jobs.values()):
            self.drop(job)
            job.fail(error)
        self.pool.forget()

    def step(self, *, beside_streams: bool = False) -> None:
        """One forward pass, and what follows from its logits.

        ``beside_streams`` says that streams of other models wait for it too.
        """
        plan = self.scheduler.plan(beside_streams=beside_streams)
        if not plan.slices:
            raise RuntimeError("there are sequences, but none has anything to compute")
        wanted = [(piece.sequence, piece.wanted) for piece in plan.slices]
        observations = [self._observation(sequence) for sequence, _ in wanted]
        self.executor.store.move(plan.moves)
        try:
            watch = Gallery(plan.slices, observations) if any(observations) else None
            logits = self.executor.run(plan.slices, watch)
        except Exception as error:
            logger.exception("a forward pass failed")
            for job in {self._jobs[sequence.origin] for sequence, _ in wanted}:
                self._fail(job, error)
            return
        self.scheduler.commit(plan.slices)
        rows = iter(logits.numpy())
        for sequence, positions in wanted:
            for position in positions:
                row = next(rows)
                if sequence.table:  # what came of a row before has not ended it
                    job = self._jobs[sequence.origin]
                    self._advance(job, partial(job.accept, sequence, position, row))
        for observation in filter(None, observations):
            if observation.text in self._jobs:  # a row before has not ended it
                self._advance(observation, observation.passed)

    def _observation(self, sequence: Sequence) -> Observation | None:
        """The job that looks at the rows of a sequence, if one does."""
        job = self._jobs[sequence.origin]
        return job if isinstance(job, Observation) else None

    def _advance(self, job: Job, step: Callable[[], bool]) -> None:
        """Do a step of a job, and be done with it if that was its last."""
        try:
            if step():
                self.drop(job)
                job.finish()
        except Refusal as refusal:  # what was asked for cannot be done: nothing has failed
            self._fail(job, refusal)
        except Exception as error:
            logger.exception("a job failed")
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        self.drop(job)
        job.fail(error)
