"""Runs texts through a model the way a test says, and keeps every bit that comes out."""

import asyncio
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Self
from unittest.mock import patch

import torch
from torch import Tensor

from infra.engine.blocks import BlockPool
from infra.engine.engine import Engine
from infra.engine.executor import Executor
from infra.engine.forward import Prepared
from infra.engine.kv_store import KVStore
from infra.engine.language_model import TransformersModel
from infra.engine.runner import Runner
from infra.engine.sampling.sampler import Row
from infra.engine.scheduler import Sequence, Slice

ROOT: Final = bytes(32)


@dataclass(frozen=True)
class Bits:
    """Logits ``(tokens - first_wanted, vocabulary)`` of a text, and K and V of all its tokens."""

    logits: Tensor
    k: Tensor
    v: Tensor

    def equal(self, other: "Bits") -> bool:
        """Whether every bit is the same; logits where both have them."""
        rows = min(len(self.logits), len(other.logits))
        return (
            torch.equal(self.logits[-rows:], other.logits[-rows:])
            and torch.equal(self.k, other.k)
            and torch.equal(self.v, other.v)
        )

    def tail(self, first: int) -> "Bits":
        """The same, with logits from position ``first`` on, for a text that had them all."""
        return Bits(self.logits[first:], self.k, self.v)


class Feeding:
    """A job that gives its text to the engine cut by cut; ends with the whole text."""

    def __init__(
        self,
        store: KVStore,
        tokens: Seq[int],
        cuts: Seq[int],
        *,
        first_wanted: int = 0,
        root: bytes | None = ROOT,
    ) -> None:
        assert sum(cuts) == len(tokens)
        assert cuts[0] > first_wanted
        self._store = store
        self._coming = list(tokens[cuts[0] :])
        self._cuts = list(cuts[1:])
        self._rows: list[Row] = []
        self.text = Sequence(list(tokens[: cuts[0]]), len(tokens), first_wanted, root)
        self.bits: Bits | None = None

    def accept(self, text: Sequence, position: int, logits: Row) -> bool:
        """Keep the row; at the end of a cut hand in the next one."""
        self._rows.append(logits.copy())
        if position < len(self.text.tokens) - 1:
            return False
        if self._cuts:
            cut = self._cuts.pop(0)
            self.text.tokens += self._coming[:cut]
            del self._coming[:cut]
            return False
        rows = torch.stack([torch.from_numpy(row) for row in self._rows])
        self.bits = Bits(rows, *self._store.read(self.text.table, len(self.text.tokens)))
        return True

    def finish(self) -> None:
        """What came out is there already."""

    def fail(self, error: Exception) -> None:
        """Nothing that a test feeds may fail."""
        raise error


class Bench:
    """A prepared model with a store of its own, stepped by hand."""

    def __init__(
        self, prepared: Prepared, *, blocks: int = 96, max_sequences: int = 16, max_rows: int = 128
    ) -> None:
        self.store = KVStore(
            prepared.geometry, blocks, prepared.dtype, device=prepared.shape.device
        )
        self.pool = BlockPool(blocks)
        self.runner = Runner(
            Executor(prepared, self.store),
            self.pool,
            max_sequences=max_sequences,
            max_rows=max_rows,
        )

    def feeding(
        self,
        tokens: Seq[int],
        cuts: Seq[int] | None = None,
        *,
        first_wanted: int = 0,
        root: bytes | None = ROOT,
    ) -> Feeding:
        """A text to be computed in ``cuts``, in one prefill if there are none."""
        return Feeding(
            self.store, tokens, cuts or [len(tokens)], first_wanted=first_wanted, root=root
        )

    def run(self, *feedings: Feeding, random: Random | None = None) -> list[Bits]:
        """Compute texts together; with ``random`` they join at random moments."""
        coming = list(feedings)
        while coming or self.runner.busy:
            while coming and (random is None or not self.runner.busy or random.random() < 0.4):
                self.runner.add(coming.pop(0))
            self.runner.step()
        bits = [feeding.bits for feeding in feedings]
        return [each for each in bits if each is not None]

    def compute(
        self,
        tokens: Seq[int],
        cuts: Seq[int] | None = None,
        *,
        first_wanted: int = 0,
        root: bytes | None = ROOT,
    ) -> Bits:
        """One text alone."""
        (bits,) = self.run(self.feeding(tokens, cuts, first_wanted=first_wanted, root=root))
        return bits


class Gate:
    """Stops the engine once it has done what it was asked before; leaving it lets it go on."""

    def __init__(self, engine: Engine) -> None:
        self._commands = engine._commands
        self._reached, self._opened = threading.Event(), threading.Event()
        engine.submit(self._wait)

    def _wait(self) -> None:
        self._reached.set()
        self._opened.wait(120)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def reach(self) -> None:
        assert self._reached.wait(60)

    async def asked(self, count: int) -> None:
        """Wait until so many commands are there that it will take together."""
        async with asyncio.timeout(60):
            while self._commands.qsize() < count:  # noqa: ASYNC110 - threads bring them too
                await asyncio.sleep(0.001)

    def open(self) -> None:
        self._opened.set()


class HeldPass:
    """A pass that has begun and waits; how many have begun in all."""

    def __init__(self, before: int) -> None:
        self.begun, self.goes_on, self.count = threading.Event(), threading.Event(), 0
        self._before = before

    def wait(self) -> None:
        self.count += 1
        if self.count > self._before:
            self.begun.set()
            assert self.goes_on.wait(60)


@contextmanager
def held_at_next_pass(model: TransformersModel, *, before: int = 0) -> Iterator[HeldPass]:
    """Stops a model at the beginning of its next pass, or of one with so many more ``before`` it.

    Leaving it lets the model go on.
    """
    held, executor = HeldPass(before), model._runner.executor
    run = executor.run

    def wait_and_run(*arguments: Any) -> Tensor:
        held.wait()
        return run(*arguments)

    with patch.object(executor, "run", wait_and_run):
        try:
            yield held
        finally:
            held.goes_on.set()


@contextmanager
def recorded_passes() -> Iterator[list[list[Sequence]]]:
    """The sequences of every pass that begins within, whichever model's it is."""
    passes: list[list[Sequence]] = []
    run = Executor.run

    def record_and_run(executor: Executor, slices: Seq[Slice], *watch: Any) -> Tensor:
        passes.append([piece.sequence for piece in slices])
        return run(executor, slices, *watch)

    with patch.object(Executor, "run", record_and_run):
        yield passes


def text(seed: int, count: int, vocabulary: int = 1024) -> list[int]:
    """Some tokens."""
    return Random(seed).choices(range(vocabulary), k=count)


def random_cuts(random: Random, count: int, *, first: int = 1, largest: int = 40) -> list[int]:
    """Sizes of chunks that make up ``count`` tokens; the first is at least ``first``."""
    cuts = [min(count, first + random.randrange(largest))]
    while (left := count - sum(cuts)) > 0:
        cuts.append(min(left, random.choice((1, 1, 2, 3, random.randint(1, largest)))))
    return cuts
