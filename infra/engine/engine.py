"""The one thread that runs models. Everything else waits for it without blocking."""

import logging
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import torch

from infra.engine.jobs.job import Job
from infra.engine.runner import Runner
from infra.engine.sampling.recorder import Recorder

logger = logging.getLogger(__name__)

Command = Callable[[], None]

_SWITCH_S: Final = 0.0005
"""How long other threads may hold Python's lock while the engine, or the event loop, waits for it.

Both do so several times in a step: with Python's own 5 ms, a token of a stream beside large answers
is waited for about twice as long.
"""


class Engine:
    """Owns the engine thread: takes jobs from any thread, steps the models that have work.

    ``recorder`` is the thread beside it that records what comes of their steps.

    Models with work take turns, one forward pass each; a pass is short where streams of another
    model wait for it. Used as a context manager.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._chores: deque[Command] = deque()
        self._busy: list[Runner] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        sys.setswitchinterval(_SWITCH_S)  # of the whole process, as long as it runs
        self.recorder.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.submit(self._stop)
        self._thread.join()
        self.recorder.__exit__()

    def submit(self, command: Command) -> None:
        """Run ``command`` on the engine's thread, between two forward passes."""
        self._commands.put(command)

    def submit_chore(self, command: Command) -> None:
        """Run ``command``, which takes about as long as a pass, between two of them.

        Chores of all models wait in line for that: none delays a text by more than one does.
        """
        self.submit(lambda: self._chores.append(command))

    @property
    def streaming(self) -> bool:
        """Whether somebody waits for the next token of a text. To be asked on its thread."""
        return any(runner.streaming for runner in self._busy)

    def start(self, runner: Runner, job: Job) -> None:
        """Have ``runner`` work on ``job``."""

        def add() -> None:
            runner.add(job)
            if runner not in self._busy:
                self._busy.append(runner)

        self.submit(add)

    def cancel(self, runner: Runner, job: Job) -> None:
        """Stop the work on ``job``; nothing happens if it is done."""
        self.submit(lambda: runner.drop(job))

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        torch.set_num_threads(1)
        while not self._stopping:
            self._obey()
            if self._chores:
                self._chores.popleft()()
            for runner in list(self._busy):
                if runner.busy:
                    self._step(runner)
                else:
                    self._busy.remove(runner)

    def _step(self, runner: Runner) -> None:
        """One step; whatever goes wrong in it, the thread goes on."""
        others = (other for other in self._busy if other is not runner)
        try:
            runner.step(beside_streams=any(other.streaming for other in others))
        except Exception as error:
            logger.exception("a model's step failed")
            runner.abandon(error)

    def _obey(self) -> None:
        """Run the commands that wait; with nothing else to do, wait for one."""
        if not self._busy and not self._chores:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
