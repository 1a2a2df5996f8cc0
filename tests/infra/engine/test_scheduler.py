"""Blocks and passes are handed out fairly and none is lost. Integers only: no model, no tensor."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from infra.engine.blocks import (
    BLOCK_TOKENS,
    BlockPool,
    OutOfBlocks,
    block_key,
    block_keys,
    blocks_for,
)
from infra.engine.scheduler import Scheduler, Sequence, Slice

ROOT = bytes(32)


def stream(number: int, count: int) -> list[int]:
    """Texts that begin alike, for a block and a bit, and then differ."""
    return [0 if i < BLOCK_TOKENS + 8 else number for i in range(count)]


def sequence(number: int, count: int, limit: int, *, private: bool = False) -> Sequence:
    root = None if private else ROOT
    return Sequence(stream(number, count), limit, first_wanted=count - 1, root=root)


class Scheduling(RuleBasedStateMachine):
    """An engine without a model: what a slot would hold is the text that leads to it."""

    @initialize(
        blocks=st.integers(2, 12), max_sequences=st.integers(1, 5), max_rows=st.integers(1, 80)
    )
    def start(self, blocks: int, max_sequences: int, max_rows: int) -> None:
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, max_sequences=max_sequences, max_rows=max_rows)
        self.max_sequences, self.max_rows = max_sequences, max_rows
        self.alive: dict[Sequence, int] = {}
        self.slots: dict[tuple[int, int], object] = {}

    @rule(
        number=st.integers(1, 3),
        count=st.integers(1, 100),
        growth=st.integers(0, 60),
        private=st.booleans(),
    )
    def add(self, number: int, count: int, growth: int, private: bool) -> None:
        text = sequence(number, count, count + growth, private=private)
        if self.scheduler.fits(text.limit):
            self.scheduler.add(text)
            self.alive[text] = number
        else:
            assert blocks_for(text.limit) > self.pool.capacity - 1

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(list(self.alive)))
        self.end(text)
        self.scheduler.remove(text)  # twice does nothing

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.cached <= self.pool.held

    @rule()
    def step(self) -> None:
        slices = self.scheduler.plan()
        self.check_plan(slices)
        for piece in slices:
            self.write(piece)
        self.scheduler.commit(slices)
        for piece in slices:
            self.go_on(piece.sequence)

    def check_plan(self, slices: list[Slice]) -> None:
        assert bool(slices) == bool(self.alive)
        assert sum(piece.count for piece in slices) <= self.max_rows
        assert len({id(piece.sequence) for piece in slices}) == len(slices) <= self.max_sequences
        assert all(piece.count > 0 for piece in slices)
        assert all(piece.start == piece.sequence.computed for piece in slices)
        decoding = [text for text in self.alive if text.table and text.remaining == 1]
        if len(decoding) <= self.max_rows:  # none of them waits for a longer piece of work
            assert {id(text) for text in decoding} <= {id(piece.sequence) for piece in slices}

    def write(self, piece: Slice) -> None:
        """Compute a slice; nobody else may hold, or find, a block that is written to."""
        text = piece.sequence
        users = Counter(block for other in self.alive for block in other.table)
        for position in range(piece.start, piece.start + piece.count):
            block = text.table[position // BLOCK_TOKENS]
            assert users[block] == 1
            assert block not in self.pool._key_of
            self.slots[block, position % BLOCK_TOKENS] = self.value(text, position)

    def value(self, text: Sequence, position: int) -> object:
        return tuple(text.tokens[: position + 1])

    def go_on(self, text: Sequence) -> None:
        if text.remaining:
            return
        if len(text.tokens) == text.limit:
            self.end(text)
        else:
            text.tokens[:] = stream(self.alive[text], len(text.tokens) + 1)

    def end(self, text: Sequence) -> None:
        self.scheduler.remove(text)
        del self.alive[text]
        assert text.table == []

    @invariant()
    def every_block_is_free_or_findable_or_held(self) -> None:
        held = {block for text in self.alive for block in text.table}
        assert 0 not in held
        assert len(held) == self.pool.held
        free = self.pool._free
        assert len(set(free)) == len(free)
        assert not held & set(free)
        assert len(held | set(free) | set(self.pool._idle)) == self.pool.capacity - 1

    @invariant()
    def every_findable_block_has_one_content_and_every_content_one_block(self) -> None:
        assert self.pool._key_of == {block: key for key, block in self.pool._block_of.items()}
        assert len(self.pool._key_of) == self.pool.cached

    @invariant()
    def every_text_sees_its_own_values(self) -> None:
        for text in self.alive:
            assert text.reused % BLOCK_TOKENS == 0
            assert text.reused <= max(text.first_wanted, 0)
            for position in range(text.computed):
                slot = text.table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                assert self.slots[slot] == self.value(text, position)

    @invariant()
    def no_more_run_than_may(self) -> None:
        assert self.scheduler.sequences == len(self.alive)
        assert sum(bool(text.table) for text in self.alive) <= self.max_sequences

    @invariant()
    def private_texts_share_nothing(self) -> None:
        tables = Counter(block for text in self.alive for block in text.table)
        for text in self.alive:
            if text.root is None:
                assert text.reused == 0
                assert all(tables[block] == 1 for block in text.table)
                assert not set(text.table) & self.pool._key_of.keys()

    def teardown(self) -> None:
        """Everybody finishes, and then nothing is held."""
        if not hasattr(self, "pool"):
            return
        passes = sum(text.limit for text in self.alive)
        for _ in range(passes):
            if self.alive:
                self.step()
        assert not self.alive
        assert not self.scheduler.busy
        assert self.pool.held == 0
        self.pool.forget()
        assert self.pool.cached == 0
        assert self.pool.available == self.pool.capacity - 1


Scheduling.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestScheduling = Scheduling.TestCase


def run(scheduler: Scheduler) -> list[Slice]:
    slices = scheduler.plan()
    scheduler.commit(slices)
    return slices


def test_a_stream_gets_its_row_in_every_pass_of_a_long_prefill() -> None:
    scheduler = Scheduler(BlockPool(64), max_sequences=4, max_rows=16)
    streaming, prompt = sequence(1, 1, 200), sequence(2, 150, 150)
    scheduler.add(streaming)
    scheduler.add(prompt)
    passes = 0
    while prompt.remaining:
        slices = run(scheduler)
        assert [(piece.sequence, piece.count) for piece in slices[:1]] == [(streaming, 1)]
        assert sum(piece.count for piece in slices) <= 16
        streaming.tokens.append(7)
        passes += 1
    assert passes == 10


def test_sequences_are_admitted_in_order_of_arrival() -> None:
    scheduler = Scheduler(BlockPool(5), max_sequences=4, max_rows=16)  # four blocks
    first, wide, small = sequence(1, 1, 64), sequence(2, 1, 128), sequence(3, 1, 32)
    for text in (first, wide, small):
        scheduler.add(text)
    assert [piece.sequence for piece in run(scheduler)] == [first]  # small does not overtake wide
    scheduler.remove(first)
    assert [piece.sequence for piece in run(scheduler)] == [wide]
    scheduler.remove(wide)
    assert [piece.sequence for piece in run(scheduler)] == [small]


def test_one_that_is_admitted_never_runs_out_of_blocks() -> None:
    pool = BlockPool(5)
    scheduler = Scheduler(pool, max_sequences=4, max_rows=256)
    texts = [sequence(number, 40, 64, private=True) for number in (1, 2)]
    for text in (*texts, sequence(3, 1, 1)):
        scheduler.add(text)
    while texts[0].computed < 64:
        slices = run(scheduler)
        assert [piece.sequence for piece in slices] == texts
        for text in texts:
            if text.computed < 64:
                text.tokens.append(1)
    assert pool.available == 0


def test_wanted_rows_are_always_computed() -> None:
    scheduler = Scheduler(BlockPool(16), max_sequences=4, max_rows=256)
    first = sequence(1, 96, 96)
    scheduler.add(first)
    run(scheduler)
    scheduler.remove(first)
    again = sequence(1, 96, 96)
    scheduler.add(again)
    (piece,) = run(scheduler)
    assert again.reused == 64  # not the block of the one row that is wanted
    assert piece.wanted == range(95, 96)
    assert (piece.start, piece.count) == (64, 32)


def test_a_key_names_every_token_before_it_and_the_numerics() -> None:
    tokens = list(range(96))
    keys = block_keys(ROOT, tokens, limit=96)
    assert len(set(keys)) == 3
    assert block_keys(ROOT, tokens, limit=95) == keys[:2]
    assert block_keys(ROOT, tokens[:40], limit=40) == keys[:1]
    assert block_keys(ROOT, [99, *tokens[1:]], limit=96)[2] != keys[2]
    assert block_keys(bytes(31) + b"1", tokens, limit=96)[0] != keys[0]
    assert block_key(keys[1], tokens[64:]) == keys[2]
    assert {len(key) for key in keys} == {32}


def published(pool: BlockPool, *names: str) -> list[int]:
    return [pool.publish(pool.allocate(), name.encode()) for name in names]


def test_the_longest_unused_is_evicted_first_and_a_text_from_its_end() -> None:
    pool = BlockPool(5)
    old, new = published(pool, "a1", "a2"), published(pool, "b1", "b2")
    pool.release(old)
    pool.release(new)
    pool.release(pool.match([b"a1", b"a2"]))  # used again
    order = [pool.allocate() for _ in range(4)]
    assert order == [new[1], new[0], old[1], old[0]]
    assert pool.evictions == 4
    with pytest.raises(OutOfBlocks):
        pool.allocate()


def test_equal_content_is_kept_once() -> None:
    pool = BlockPool(4)
    (kept,) = published(pool, "same")
    (again,) = published(pool, "same")
    assert again == kept
    assert (pool.held, pool.cached) == (1, 1)
    pool.release([again])
    assert pool.held == 1
    pool.release([kept])
    assert (pool.held, pool.cached) == (0, 1)


def test_hits_and_misses_count_blocks_and_looking_counts_nothing() -> None:
    pool = BlockPool(8)
    published(pool, "a", "b")
    assert pool.count_cached([b"a", b"b", b"c"]) == 2
    assert pool.count_cached([b"c", b"a"]) == 0
    assert (pool.hits, pool.misses) == (0, 0)
    assert len(pool.match([b"a", b"b", b"c", b"d"])) == 2
    assert (pool.hits, pool.misses) == (2, 2)


def test_forgetting_keeps_what_is_held() -> None:
    pool = BlockPool(4)
    _, idle = published(pool, "held", "idle")
    pool.release([idle])
    pool.forget()
    assert pool.count_cached([b"held"]) == 1
    assert pool.count_cached([b"idle"]) == 0
    assert (pool.held, pool.available) == (1, 2)
