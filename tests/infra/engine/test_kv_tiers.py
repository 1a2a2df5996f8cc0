"""K/V that left the device and came back, or is shared, has the bits that were computed."""

from collections.abc import Sequence as Seq
from pathlib import Path
from random import Random

import pytest
import torch

from infra.engine.blocks import BLOCK_TOKENS, BlockPool, Transfer, blocks_for
from infra.engine.engine import Engine
from infra.engine.executor import Executor
from infra.engine.forward import Prepared
from infra.engine.kv_store import Geometry, KVStore
from infra.engine.runner import Runner
from infra.engine.sampling.sampler import Row
from infra.engine.scheduler import Sequence
from tests.infra.engine import small_models
from tests.infra.engine.bench import Bench, Bits, Feeding, Gate, random_cuts, text
from tests.infra.engine.small_models import CONTEXT
from tests.infra.engine.test_engine import Noted

TOKENS = 150


class Tiered(Bench):
    """A bench with little room on its device and some on its host, both in the CPU's memory."""

    def __init__(self, prepared: Prepared, *, blocks: int, host_slots: int) -> None:
        self.store = KVStore(
            prepared.geometry,
            blocks,
            prepared.dtype,
            device=prepared.shape.device,
            host_slots=host_slots,
        )
        self.pool = BlockPool(blocks, host_slots=host_slots)
        self.runner = Runner(
            Executor(prepared, self.store), self.pool, max_sequences=16, max_rows=128
        )

    def last(self, tokens: Seq[int]) -> tuple[Bits, int]:
        """The last logits of a text and all its K/V, and how many tokens were not computed."""
        feeding = self.feeding(tokens, first_wanted=len(tokens) - 1)
        (bits,) = self.run(feeding)
        return bits, feeding.text.reused


@pytest.fixture(scope="module")
def prepared(folders: dict[str, str | Path]) -> Prepared:
    return small_models.prepared(folders["llama"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_is_moved_to_the_host_and_back_has_its_bits_and_no_other_is_touched(
    dtype: torch.dtype,
) -> None:
    store = KVStore(Geometry(3, 4, 2, 8), 6, dtype, host_slots=2)
    for tensor in (store.k, store.v):
        tensor.copy_(torch.randn(tensor.shape))
    k, v = store.k.clone(), store.v.clone()
    store.move([Transfer(2, 1, to_host=True), Transfer(5, 0, to_host=True)])
    assert torch.equal(store.k, k)
    assert torch.equal(store.v, v)
    store.k[:, 2], store.v[:, 2] = 7, 7
    store.move([Transfer(4, 1, to_host=False), Transfer(2, 0, to_host=False)])
    for tensor, before in ((store.k, k), (store.v, v)):
        expected = before[:, [0, 1, 5, 3, 2, 5]]
        assert torch.equal(tensor, expected)


def test_a_text_restored_from_the_host_has_the_bits_it_was_computed_with(
    prepared: Prepared,
) -> None:
    first, second = text(1, TOKENS), text(2, TOKENS)
    expected = Bench(prepared).compute(first, first_wanted=TOKENS - 1)
    bench = Tiered(prepared, blocks=1 + blocks_for(TOKENS), host_slots=8)
    bench.compute(first)
    bench.compute(second)
    assert (bench.pool.evictions, bench.pool.restores, len(bench.pool.host)) == (4, 0, 4)
    restored, reused = bench.last(first)
    assert restored.equal(expected)
    assert (bench.pool.restores, bench.pool.hits) == (4, 4)
    assert reused == 4 * BLOCK_TOKENS


def test_control_what_the_host_holds_is_what_is_restored(prepared: Prepared) -> None:
    first, second = text(1, TOKENS), text(2, TOKENS)
    expected = Bench(prepared).compute(first, first_wanted=TOKENS - 1)
    bench = Tiered(prepared, blocks=1 + blocks_for(TOKENS), host_slots=8)
    bench.compute(first)
    bench.compute(second)
    bench.store.host_v[:, 0] += 1e-3
    restored, _ = bench.last(first)
    assert bench.pool.restores == 4
    assert not torch.equal(restored.v, expected.v)
    assert not torch.equal(restored.logits, expected.logits)


@pytest.mark.parametrize("seed", range(3))
def test_texts_that_join_while_blocks_leave_and_come_back_keep_their_bits(
    prepared: Prepared, seed: int
) -> None:
    random = Random(seed)
    texts = [text(number, random.randint(40, CONTEXT)) for number in range(6)]
    expected = [Bench(prepared).compute(tokens) for tokens in texts]
    bench = Tiered(prepared, blocks=2 + blocks_for(CONTEXT), host_slots=random.randint(8, 24))
    for _ in range(3):
        asked = random.sample(range(len(texts)), 4)
        feedings = []
        for number in asked:
            tokens, wanted = texts[number], random.randrange(len(texts[number]))
            cuts = random_cuts(random, len(tokens), first=wanted + 1)
            feedings.append(bench.feeding(tokens, cuts, first_wanted=wanted))
        for number, bits in zip(asked, bench.run(*feedings, random=random), strict=True):
            assert bits.equal(expected[number])
    assert bench.pool.restores > 0
    assert bench.pool.evictions > 0
    assert bench.pool.held == 0


def test_copies_that_fail_end_the_work_and_nothing_half_copied_is_found(
    engine: Engine, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = text(1, TOKENS), text(2, TOKENS)
    expected = Bench(prepared).compute(first, first_wanted=TOKENS - 1)
    bench = Tiered(prepared, blocks=1 + blocks_for(TOKENS), host_slots=8)
    bench.compute(first)
    bench.compute(second)
    failing = Noted(bench.store, first, [TOKENS], first_wanted=TOKENS - 1).note(lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(bench.store, "move", lambda transfers: 1 // 0)
        engine.start(bench.runner, failing)
        assert failing.ended.wait(60)
        with Gate(engine) as gate:
            gate.reach()  # has done all that follows from it
    assert isinstance(failing.error, ZeroDivisionError)
    assert (bench.pool.held, bench.pool.cached, len(bench.pool.host)) == (0, 0, 0)
    again, reused = bench.last(first)
    assert reused == 0
    assert again.equal(expected)


class Forked(Feeding):
    """Notes how many blocks are held and shared whenever it is given logits."""

    def watch(self, pool: BlockPool) -> "Forked":
        self._pool = pool
        self.seen: list[tuple[int, int]] = []
        return self

    def accept(self, text: Sequence, position: int, logits: Row) -> bool:
        self.seen.append((self._pool.held, self._pool.shared))
        return super().accept(text, position, logits)


def test_sixteen_forks_of_a_hot_text_hold_the_blocks_of_one_and_copy_none(
    folders: dict[str, str | Path],
) -> None:
    prepared = small_models.prepared(folders[small_models.CACHER_TINY])
    tokens = text(3, 512)
    bench = Bench(prepared)
    bench.compute(tokens)
    k, v = bench.store.k.clone(), bench.store.v.clone()
    forks = [
        Forked(bench.store, tokens, [512], first_wanted=511).watch(bench.pool) for _ in range(16)
    ]
    bits = bench.run(*forks)
    assert forks[0].seen == [(16, 15 * 16)]  # all of them run, on the 16 blocks of one
    assert [fork.text.reused for fork in forks] == [511] * 16
    assert all(each.equal(bits[0]) for each in bits)
    assert torch.equal(bench.store.k[:, 1:], k[:, 1:])  # rows that only pad write to block 0
    assert torch.equal(bench.store.v[:, 1:], v[:, 1:])
    assert (bench.pool.hits, bench.pool.cached, bench.pool.evictions) == (16 * 16, 16, 0)


def test_forks_that_go_on_share_all_but_what_is_their_own(
    folders: dict[str, str | Path],
) -> None:
    prepared = small_models.prepared(folders[small_models.CACHER_TINY])
    tokens = text(3, 512)
    bench = Bench(prepared, blocks=400)
    forks = [
        Forked(bench.store, [*tokens, number, 1, 2], [512, 1, 1, 1], first_wanted=511)
        for number in range(16)
    ]
    alone = Bench(prepared).compute([*tokens, 3, 1, 2], first_wanted=511)
    bits = bench.run(*(fork.watch(bench.pool) for fork in forks))
    assert bits[3].equal(alone)
    seen = [each for fork in forks for each in fork.seen]
    assert max(held for held, _ in seen) == 16 + 16
    assert max(shared for _, shared in seen) == 15 * 16
    assert bench.pool.misses == 16  # the prompt was cold, and computed once
