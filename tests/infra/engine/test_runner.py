"""A job that owns several sequences: its forks have their own bits, and all end with it."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from infra.engine.blocks import BLOCK_TOKENS, Copy, Move, Transfer
from infra.engine.forward import Prepared
from infra.engine.kv_store import Geometry, KVStore
from infra.engine.sampling.sampler import Row
from infra.engine.scheduler import Sequence
from tests.infra.engine import small_models
from tests.infra.engine.bench import ROOT, Bench, Bits, text

TRUNK = text(0, 90)
EDGES = (1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 63, 64, 65, 90)


class Tree:
    """Computes a text and forks it at several places; every fork goes on alone.

    ``step`` is called before a row is accepted, with the number of rows that were.
    """

    def __init__(
        self,
        bench: Bench,
        branches: dict[int, list[int]],
        *,
        root: bytes | None = ROOT,
        step: Callable[[int], None] = lambda rows: None,
    ) -> None:
        limit = max([len(TRUNK), *(at + len(tokens) for at, tokens in branches.items())])
        self.text = Sequence(list(TRUNK), limit, 0, root, 1 + len(branches))
        self._bench = bench
        self._branches = branches
        self._step = step
        self._rows: dict[Sequence, list[Row]] = {}
        self.forks: dict[int, Sequence] = {}
        self.bits: dict[Sequence, Bits] = {}
        self.accepted = 0
        self.errors: list[Exception] = []
        self.finished = 0

    def accept(self, text: Sequence, position: int, logits: Row) -> bool:
        self._step(self.accepted)
        self.accepted += 1
        self._rows.setdefault(text, []).append(logits.copy())
        if position == len(text.tokens) - 1:
            self._read(text)
            if text is self.text:
                for at, tokens in self._branches.items():
                    self.forks[at] = self._bench.runner.scheduler.fork(text, at, tokens, at)
        return len(self.bits) == self.text.width

    def _read(self, text: Sequence) -> None:
        rows = torch.stack([torch.from_numpy(row) for row in self._rows[text]])
        self.bits[text] = Bits(rows, *self._bench.store.read(text.table, len(text.tokens)))

    def finish(self) -> None:
        self.finished += 1

    def fail(self, error: Exception) -> None:
        self.errors.append(error)


def branches() -> dict[int, list[int]]:
    """At each edge of a block a fork that ends in another block."""
    return {at: text(at, 40 + at % 7) for at in EDGES}


def run(bench: Bench, *trees: Tree) -> None:
    for tree in trees:
        bench.runner.add(tree)
    while bench.runner.busy:
        bench.runner.step()


def nothing_is_held(bench: Bench) -> bool:
    return not bench.runner.busy and (bench.pool.held, bench.pool.shared) == (0, 0)


@pytest.fixture(scope="module")
def prepared(folders: dict[str, str | Path]) -> Prepared:
    return small_models.prepared(folders["llama"])


@pytest.fixture(scope="module")
def bench(prepared: Prepared) -> Bench:
    return Bench(prepared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("root", [ROOT, None], ids=["public", "private"])
def test_forks_have_the_bits_of_texts_computed_alone(
    folders: dict[str, str | Path], dtype: torch.dtype, root: bytes | None
) -> None:
    prepared = small_models.prepared(folders["llama"], dtype)
    bench, alone = Bench(prepared), Bench(prepared)
    tree = Tree(bench, branches(), root=root)
    run(bench, tree)
    assert (tree.finished, tree.errors) == (1, [])
    assert tree.bits[tree.text].equal(alone.compute(TRUNK, root=None))
    for at, tokens in branches().items():
        assert tree.bits[tree.forks[at]].equal(alone.compute([*TRUNK[:at], *tokens], root=None))
        assert tree.forks[at].reused == at
    assert alone.pool.hits == 0
    assert nothing_is_held(bench)
    assert (bench.pool.cached > 0) == (root is not None)


def test_control_a_copy_of_a_block_that_is_not_exact_is_found(prepared: Prepared) -> None:
    inexact, alone = Bench(prepared), Bench(prepared)
    move, copied = inexact.store.move, []

    def move_inexactly(moves: Iterable[Move]) -> None:
        for each in moves:
            move([each])
            if isinstance(each, Copy):
                inexact.store.v[:, each.target] += 1e-3
                copied.append(each)

    inexact.store.move = move_inexactly  # type: ignore[method-assign]
    tree = Tree(inexact, branches(), root=None)
    run(inexact, tree)
    inside = [at for at in EDGES if at % BLOCK_TOKENS]
    assert len(copied) == len(inside) == 6
    for at, tokens in branches().items():
        bits = alone.compute([*TRUNK[:at], *tokens], root=None)
        assert tree.bits[tree.forks[at]].equal(bits) == (at not in inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_within_the_device_is_of_one_block_in_all_layers(dtype: torch.dtype) -> None:
    store = KVStore(Geometry(3, 4, 2, 8), 6, dtype, host_slots=1)
    for tensor in (store.k, store.v):
        tensor.copy_(torch.randn(tensor.shape))
    k, v = store.k.clone(), store.v.clone()
    store.move([Copy(2, 5), Copy(5, 1), Transfer(3, 0, to_host=True), Copy(4, 3)])
    store.move([Transfer(4, 0, to_host=False)])
    for tensor, before in ((store.k, k), (store.v, v)):
        assert torch.equal(tensor, before[:, [0, 2, 2, 4, 3, 2]])


@pytest.mark.parametrize("rows", [0, 40, 89, 90, 91, 150, 300])
def test_a_job_that_fails_at_any_row_ends_with_all_its_forks_and_no_other(
    bench: Bench, rows: int
) -> None:
    def step(accepted: int) -> None:
        if accepted == rows:
            raise ZeroDivisionError

    failing, other = Tree(bench, branches(), step=step), Tree(bench, {40: text(1, 30)})
    run(bench, failing, other)
    assert [type(error) for error in failing.errors] == [ZeroDivisionError]
    assert (failing.accepted, failing.finished) == (rows, 0)
    assert (other.finished, other.errors) == (1, [])
    assert nothing_is_held(bench)


def test_a_pass_that_fails_ends_a_job_once_however_many_of_its_forks_were_in_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(bench, branches())
    bench.runner.add(tree)
    bench.runner.step()
    assert len(bench.runner.scheduler._running) == 9
    with monkeypatch.context() as patched:
        patched.setattr(bench.runner.executor, "run", lambda *_: 1 // 0)
        bench.runner.step()
    assert [type(error) for error in tree.errors] == [ZeroDivisionError]
    assert nothing_is_held(bench)


@pytest.mark.parametrize("steps", range(4))
def test_a_job_that_is_dropped_frees_the_blocks_of_all_its_forks_at_once(
    prepared: Prepared, steps: int
) -> None:
    bench = Bench(prepared, max_rows=100)
    tree = Tree(bench, branches())
    bench.runner.add(tree)
    for _ in range(steps):
        bench.runner.step()
    assert not tree.finished
    bench.runner.drop(tree)
    bench.runner.drop(tree)  # twice does nothing
    assert nothing_is_held(bench)
    assert tree.errors == []


def test_rows_of_a_fork_that_was_dropped_in_the_same_pass_are_not_handed_in(bench: Bench) -> None:
    class Pruned(Tree):
        def accept(self, text: Sequence, position: int, logits: Row) -> bool:
            done = super().accept(text, position, logits)
            kept = self.forks.get(63)  # the shortest comes first in a pass
            if text is kept:
                for fork in {*self.forks.values()} - {kept}:
                    bench.runner.scheduler.remove(fork)
            return done or (text is kept and position == len(text.tokens) - 1)

    tree = Pruned(bench, branches())
    run(bench, tree)
    assert (tree.finished, tree.errors) == (1, [])
    assert tree.accepted == len(TRUNK) + len(branches()[63])
    assert nothing_is_held(bench)
