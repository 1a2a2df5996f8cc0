"""Passes are handed out fairly and no sequence is lost. Integers only: no model, no tensor."""

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from infra.engine.blocks import BLOCK_TOKENS, BlockPool, Copy, Move, block_keys, blocks_for
from infra.engine.scheduler import Plan, Scheduler, Sequence, Slice

ROOT = bytes(32)


def stream(number: int, count: int) -> list[int]:
    """Texts that begin alike, for a block and a bit, and then differ."""
    return [0 if i < BLOCK_TOKENS + 8 else number for i in range(count)]


def sequence(
    number: int, count: int, limit: int = 0, *, private: bool = False, width: int = 1
) -> Sequence:
    """A prompt that is generated on, to at most ``limit`` tokens."""
    root = None if private else ROOT
    return Sequence(stream(number, count), max(count, limit), count - 1, root, width)


class Memory:
    """What the tensors would hold: in each place of a block the text that leads to it."""

    def __init__(self) -> None:
        self.device: dict[tuple[int, int], object] = {}
        self.host: dict[int, list[object]] = {}
        self.copies = 0

    def block(self, block: int) -> list[object]:
        return [self.device.get((block, offset)) for offset in range(BLOCK_TOKENS)]

    def fill(self, block: int, values: list[object]) -> None:
        for offset, value in enumerate(values):
            self.device[block, offset] = value

    def move(self, moves: list[Move]) -> None:
        for move in moves:
            if isinstance(move, Copy):
                self.copies += 1
                self.fill(move.target, self.block(move.source))
            elif move.to_host:
                self.host[move.slot] = self.block(move.block)
            else:
                self.fill(move.block, self.host[move.slot])


def value(text: Sequence, position: int) -> object:
    """K/V at a position; that which a shallow text computed itself may lack layers."""
    found = position // BLOCK_TOKENS < len(text.keys)
    layers = ("some layers",) if text.shallow and not found else ()
    return (*layers, *text.tokens[: position + 1])


class Asked(NamedTuple):
    """A generation or a search, or with ``first_wanted`` the scoring of a text.

    With ``first_seen`` a text is looked at, whether any of its logits are wanted or not. One that
    is not forked may be ``shallow``.
    """

    number: int
    count: int
    growth: int
    first_wanted: int | None
    first_seen: int | None
    private: bool
    width: int
    search: bool
    shallow: bool

    def sequence(self) -> Sequence:
        limit = self.count + self.growth
        text = sequence(self.number, self.count, limit, private=self.private, width=self.width)
        if self.first_wanted is not None:
            text.first_wanted = min(self.first_wanted, self.count - 1)
        elif self.first_seen is not None:
            text.first_wanted = self.count
        seen = None if self.first_seen is None else min(self.first_seen, self.count - 1)
        shallow = self.shallow and self.width == 1
        return Sequence(text.tokens, limit, text.first_wanted, text.root, self.width, seen, shallow)


TEXTS = st.builds(
    Asked,
    number=st.integers(1, 3),
    count=st.integers(1, 100),
    growth=st.integers(0, 60),
    first_wanted=st.integers(0, 99) | st.none(),
    first_seen=st.integers(0, 99) | st.none(),
    private=st.booleans(),
    width=st.integers(1, 4),
    search=st.booleans(),
    shallow=st.booleans(),
)

PASSES = st.integers(0, 6)


class Scheduling(RuleBasedStateMachine):
    """An engine without a model."""

    @initialize(
        blocks=st.integers(2, 12) | st.integers(8, 30),
        host_slots=st.integers(0, 6),
        max_sequences=st.integers(1, 5) | st.integers(3, 8),
        max_rows=st.integers(1, 5) | st.integers(1, 80),
        beside_streams=st.integers(1, 5) | st.integers(1, 40),
        observed=st.integers(1, 5) | st.integers(1, 40),
        seed=st.integers(0, 1 << 32),
        texts=st.lists(TEXTS, min_size=1, max_size=4),
        passes=PASSES,
    )
    def start(
        self,
        blocks: int,
        host_slots: int,
        max_sequences: int,
        max_rows: int,
        beside_streams: int,
        observed: int,
        seed: int,
        texts: list[Asked],
        passes: int,
    ) -> None:
        self.random = Random(seed)
        self.pool = BlockPool(blocks, host_slots=host_slots)
        self.scheduler = Scheduler(
            self.pool,
            max_sequences=max_sequences,
            max_rows=max_rows,
            max_prefill_rows_beside_streams=beside_streams,
            max_observed_rows_beside_streams=observed,
        )
        self.max_sequences, self.max_rows = max_sequences, max_rows
        self.beside_streams, self.observed = beside_streams, observed
        self.alive: dict[Sequence, int] = {}
        self.unserved: Counter[Sequence] = Counter()
        self.own: Counter[Sequence] = Counter()
        self.delivered: Counter[Sequence] = Counter()
        self.searches: set[Sequence] = set()
        self.forked_at: dict[Sequence, int] = {}
        self.memory = Memory()
        self.content: dict[bytes, tuple[int, ...]] = {}
        self.add(texts, passes)

    @rule(texts=st.lists(TEXTS, min_size=1, max_size=4), passes=PASSES)
    def add(self, texts: list[Asked], passes: int) -> None:
        for asked in texts:
            text = asked.sequence()
            if self.scheduler.fits(text):
                self.scheduler.add(text)
                self.alive[text] = asked.number
                if asked.search:
                    self.searches.add(text)
            else:
                blocks = text.width * blocks_for(text.limit)
                assert text.width > self.max_sequences or blocks > self.pool.capacity - 1
        self.steps(passes)

    def group(self, one: Sequence) -> list[Sequence]:
        return [text for text in self.scheduler._running if text.origin is one.origin]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), with_its_forks=st.booleans())
    def cancel(self, data: st.DataObject, with_its_forks: bool) -> None:
        text = data.draw(st.sampled_from(list(self.alive)))
        if with_its_forks:
            self.end_group(text.origin)
        else:
            self.end(text)
        self.scheduler.remove(text)  # twice does nothing
        self.unserved.clear()  # others may have waited for what it computed
        self.go_on()

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.cached <= self.pool.held
        assert len(self.pool.host) == 0

    @rule(passes=PASSES)
    def steps(self, passes: int) -> None:
        for _ in range(passes):
            self.step()
            self.fork()
            self.go_on()

    def step(self) -> None:
        slices = self.plan()
        self.scheduler.commit(slices)
        for piece in slices:
            text = piece.sequence
            self.own[text] += piece.count
            self.delivered[text] += len(piece.wanted)
            assert max(0, text.computed - text.first_wanted) == self.delivered[text]
        self.go_on()

    @precondition(lambda self: self.alive)
    @rule()
    def fail(self) -> None:
        """A pass that fails ends its sequences; what it wrote is nobody's."""
        for piece in self.plan():
            self.end(piece.sequence)
        self.unserved.clear()
        self.go_on()

    def plan(self) -> list[Slice]:
        plan = self.scheduler.plan()
        for text in self.scheduler._running:
            for end, key in self.keys(text):
                self.content[key] = tuple(text.tokens[:end])
        self.memory.move(plan.moves)
        self.check_rows(plan.slices)
        self.check_turns(plan.slices)
        for piece in plan.slices:
            self.write(piece)
        return plan.slices

    def keys(self, text: Sequence) -> Iterator[tuple[int, bytes]]:
        if text.root is not None:
            keys = block_keys(text.root, text.tokens, limit=len(text.tokens))
            yield from zip(
                range(BLOCK_TOKENS, len(text.tokens) + 1, BLOCK_TOKENS), keys, strict=True
            )

    def check_rows(self, slices: list[Slice]) -> None:
        assert bool(slices) == bool(self.alive)
        assert sum(piece.count for piece in slices) <= self.max_rows
        assert len({id(piece.sequence) for piece in slices}) == len(slices) <= self.max_sequences
        assert all(piece.count > 0 for piece in slices)
        assert all(piece.start == piece.sequence.computed for piece in slices)
        remaining = {piece.sequence: piece.sequence.remaining for piece in slices}
        if 1 in remaining.values():
            prefill = sum(piece.count for piece in slices if remaining[piece.sequence] > 1)
            coming = [text for text in self.scheduler._running if text.remaining > 1]
            coming += self.scheduler._waiting
            observed = all(text.first_seen is not None for text in coming)
            assert prefill <= (self.observed if observed else self.beside_streams)

    def check_turns(self, slices: list[Slice]) -> None:
        """A sequence is in this pass, or soon in one; or else who computes its next block is."""
        served = {piece.sequence for piece in slices}
        for text in self.scheduler._running:
            alike = {o for o in self.scheduler._running if o.next_key == text.next_key}
            leaving = {text, *(other for other in alike if not other.shallow)}
            progress = served & (leaving if text.adopts else {text}) or not text.remaining
            self.unserved[text] = 0 if progress else self.unserved[text] + 1
            assert self.unserved[text] < self.max_sequences
            if self.max_sequences <= min(self.max_rows, self.beside_streams, self.observed):
                assert progress
            if self.max_sequences <= self.max_rows and text.remaining == 1:
                assert text in served

    def write(self, piece: Slice) -> None:
        """Compute a slice. A block that others hold, or find, is only given what it has."""
        text = piece.sequence
        users = Counter(block for other in self.alive for block in other.table)
        for position in range(piece.start, piece.start + piece.count):
            index, offset = divmod(position, BLOCK_TOKENS)
            block = text.table[index]
            if index < len(text.keys):
                assert position >= text.first_needed
                assert self.memory.device[block, offset] == value(text, position)
            else:
                assert users[block] == 1
                assert block not in self.pool._key_of
            self.memory.device[block, offset] = value(text, position)

    def go_on(self) -> None:
        """Whoever computed all of its tokens gets another, the beams of a search together."""
        for text in list(self.scheduler._running):
            if text.remaining or text not in self.alive:
                continue
            if text.origin in self.searches:
                if not any(beam.remaining for beam in self.group(text)):
                    self.search(self.group(text))
            elif len(text.tokens) == text.limit:
                self.end(text)
            else:
                text.tokens += stream(self.alive[text], len(text.tokens) + 1)[-1:]

    def fork(self) -> None:
        """Some go on as they did or as others do, from anywhere in what they have computed."""
        for parent in list(self.scheduler._running):
            trunk = parent.origin.trunk * BLOCK_TOKENS
            if parent.origin.width == 1 or parent.computed < trunk or self.random.random() < 0.7:
                continue
            at = self.random.randint(trunk, parent.computed)
            number = self.random.randint(1, 3)
            going_on = self.random.choice([parent.tokens, stream(number, parent.limit)])
            tokens = going_on[at : at + self.random.randint(0, 50)]
            wanted = max(at, self.random.randint(at - 20, at + len(tokens)) - 1)
            arguments = (parent, at, tokens, self.random.choice([wanted, parent.first_wanted]))
            if self.random.random() < 0.3:
                self.came_from(self.scheduler.replace(*arguments), parent, number)
                del self.alive[parent]
            elif len(self.group(parent)) < parent.origin.width:
                self.came_from(self.scheduler.fork(*arguments), parent, number)
            else:
                with pytest.raises(ValueError, match="run already"):
                    self.scheduler.fork(*arguments)
            self.unserved.clear()

    def came_from(self, child: Sequence, parent: Sequence, number: int) -> None:
        self.forked_at[child] = child.computed
        self.alive[child] = number
        self.delivered[child] = max(0, child.computed - child.first_wanted)
        assert child.tokens[: child.computed] == parent.tokens[: child.computed]

    def search(self, beams: list[Sequence]) -> None:
        """A step of a search: some beams go on, in one way or several, others end."""
        if any(len(beam.tokens) == beam.limit for beam in beams):
            self.end_group(beams[0].origin)
            return
        count = self.random.randint(1, beams[0].origin.width)
        parents = self.random.choices(range(len(beams)), k=count)
        tokens = self.random.choices(range(3), k=count)
        texts = [
            [*beams[parent].tokens, token] for parent, token in zip(parents, tokens, strict=True)
        ]
        after = self.scheduler.reorder(beams, parents, tokens)
        assert [beam.tokens for beam in after] == texts
        assert [beam in after for beam in beams] == [i in parents for i in range(len(beams))]
        for parent, child in zip(parents, after, strict=True):
            if child not in self.alive:
                self.came_from(child, beams[parent], 1)
        for beam in set(beams).difference(after):
            del self.alive[beam]
        self.unserved.clear()

    def end_group(self, origin: Sequence) -> None:
        self.scheduler.remove_group(origin)
        self.alive = {text: n for text, n in self.alive.items() if text.origin is not origin}
        assert self.pool.held == len({block for text in self.alive for block in text.table})

    def end(self, text: Sequence) -> None:
        held = Counter(block for other in self.alive if other is not text for block in other.table)
        self.scheduler.remove(text)
        del self.alive[text]
        assert text.table == []
        assert self.pool.held == len(held)  # at once

    @invariant()
    def every_block_is_free_or_findable_or_held(self) -> None:
        held = Counter(block for text in self.alive for block in text.table)
        assert 0 not in held
        assert [held[block] for block in range(self.pool.capacity)] == self.pool._references
        assert self.pool.held == len(held)
        assert self.pool.shared == held.total() - len(held)
        free, idle = self.pool._free, set(self.pool._idle)
        assert len(set(free)) == len(free) == self.pool.free
        assert len(free) + len(idle) + len(held) == self.pool.capacity - 1
        assert len({*held, *free, *idle}) == self.pool.capacity - 1

    @invariant()
    def every_findable_block_has_the_content_of_its_key(self) -> None:
        assert self.pool._key_of == {block: key for key, block in self.pool._block_of.items()}
        assert set(self.pool._idle) <= self.pool._key_of.keys()
        for key, block in self.pool._block_of.items():
            self.check_content(key, self.memory.block(block))

    @invariant()
    def every_slot_of_the_host_is_free_or_has_the_content_of_its_key(self) -> None:
        host = self.pool.host
        slots = list(host._slot_of.values())
        assert sorted([*slots, *host._free]) == list(range(host.slots))
        assert not host._slot_of.keys() & self.pool._block_of.keys()
        for key, slot in host._slot_of.items():
            self.check_content(key, self.memory.host[slot])

    def check_content(self, key: bytes, found: list[object]) -> None:
        tokens = self.content[key]
        first = len(tokens) - BLOCK_TOKENS
        assert found == [tokens[: first + offset + 1] for offset in range(BLOCK_TOKENS)]

    @invariant()
    def every_text_sees_its_own_values(self) -> None:
        for text in self.alive:
            assert 0 <= text.reused <= max(text.first_needed, self.forked_at.get(text, 0))
            assert text.reused + self.own[text] == text.computed
            for position in range(text.computed):
                slot = text.table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                assert self.memory.device[slot] == value(text, position)

    @invariant()
    def who_was_admitted_can_finish(self) -> None:
        running = self.scheduler._running
        assert len(running) == self.scheduler.running
        assert {*running, *self.scheduler._waiting} == self.alive.keys()
        assert len(running) + self.scheduler.waiting == len(self.alive)
        assert all(text.overtaken <= self.max_sequences for text in self.alive)
        groups = {text.origin: self.group(text) for text in running}
        assert sum(origin.width for origin in groups) <= self.max_sequences
        for origin, group in groups.items():
            assert len(group) <= origin.width
            assert len({tuple(text.table[: origin.trunk]) for text in group}) == 1
            blocks = {block for text in group for block in text.table}
            assert len(blocks) <= origin.most_blocks <= origin.width * blocks_for(origin.limit)
        trunks, promised = self.scheduler._reserved()
        assert len(trunks) + promised < self.pool.capacity

    @invariant()
    def private_texts_share_nothing_but_with_their_forks(self) -> None:
        groups: dict[int, set[Sequence]] = {}
        for text in self.alive:
            for block in text.table:
                groups.setdefault(block, set()).add(text.origin)
        for text in self.alive:
            if text.root is None:
                assert text.reused == self.forked_at.get(text, 0)
                assert all(len(groups[block]) == 1 for block in text.table)
                assert not set(text.table) & self.pool._key_of.keys()

    @invariant()
    def a_fork_costs_a_copy_of_one_block_at_most(self) -> None:
        assert self.memory.copies <= len(self.forked_at)

    def teardown(self) -> None:
        """Everybody finishes, and then nothing is held."""
        if not hasattr(self, "pool"):
            return
        passes = sum(text.origin.width * text.limit for text in self.alive)
        for _ in range(passes):
            if self.alive:
                self.step()
        assert not self.alive
        assert not self.scheduler.busy
        assert (self.pool.held, self.pool.shared) == (0, 0)
        self.pool.forget()
        assert (self.pool.cached, len(self.pool.host)) == (0, 0)
        assert self.pool.free == self.pool.available == self.pool.capacity - 1


Scheduling.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestScheduling = Scheduling.TestCase


def scheduler(
    pool: BlockPool,
    *,
    sequences: int = 16,
    rows: int = 512,
    beside_streams: int = 64,
    observed: int | None = None,
) -> Scheduler:
    return Scheduler(
        pool,
        max_sequences=sequences,
        max_rows=rows,
        max_prefill_rows_beside_streams=beside_streams,
        max_observed_rows_beside_streams=observed,
    )


def run(scheduler: Scheduler) -> list[Slice]:
    """One pass; those that computed everything draw a token, unless they are at their limit."""
    slices = scheduler.plan().slices
    scheduler.commit(slices)
    for text in {piece.sequence for piece in slices}:
        if not text.remaining and len(text.tokens) < text.limit:
            text.tokens.append(7)
    return slices


def rows_of(slices: list[Slice]) -> dict[Sequence, int]:
    return {piece.sequence: piece.count for piece in slices}


def with_streams(count: int, **bounds: int) -> tuple[Scheduler, list[Sequence]]:
    """A scheduler in which texts are being generated."""
    streams = [sequence(number, 1, 3000, private=True) for number in range(count)]
    running = scheduler(BlockPool(1000), **bounds)
    for text in streams:
        running.add(text)
    run(running)
    return running, streams


@given(
    prompts=st.lists(st.integers(2, 300), min_size=1, max_size=12),
    streams=st.integers(0, 4),
    rows=st.integers(16, 128),
    beside_streams=st.integers(12, 64),
)
def test_prompts_share_a_pass_equally_and_streams_are_in_every_one(
    prompts: list[int], streams: int, rows: int, beside_streams: int
) -> None:
    running, streaming = with_streams(streams, rows=rows, beside_streams=beside_streams)
    texts = [sequence(i, count, private=True) for i, count in enumerate(prompts)]
    for text in texts:
        running.add(text)
    passes = 0
    while any(text.remaining for text in texts):
        need = {text: text.remaining for text in texts if text.remaining}
        prefill = [text for text, count in need.items() if count > 1]
        decoding = streams + len(need) - len(prefill)
        room = min(rows - decoding, beside_streams) if decoding else rows
        given = rows_of(run(running))
        for text in need:
            if not text.remaining:
                running.remove(text)
        assert all(given[text] == 1 for text in streaming)
        assert all(given[text] >= min(need[text], room // len(prefill)) for text in prefill)
        assert sum(given[text] for text in prefill) == min(room, sum(need[t] for t in prefill))
        passes += 1
    equal_part = min(rows - streams - len(prompts), beside_streams) // len(prompts)
    if equal_part > 0:
        assert passes <= -(-max(prompts) // equal_part) + 1


def test_a_short_prompt_behind_a_long_one_has_its_first_token_after_one_pass() -> None:
    for streams in (0, 3):
        running, _ = with_streams(streams)
        long, short = sequence(8, 4000, private=True), sequence(9, 20, private=True)
        running.add(long)
        run(running)
        running.add(short)
        assert rows_of(run(running))[short] == 20
        assert long.remaining > 2000


def test_a_prompt_fills_the_pass_alone_and_a_bounded_part_of_it_beside_streams() -> None:
    alone, _ = with_streams(0)
    beside, streams = with_streams(2)
    for each in (alone, beside):
        each.add(sequence(8, 4000, private=True))
    assert [piece.count for piece in run(alone)] == [512]
    for _ in range(10):
        assert [piece.count for piece in run(beside)] == [1, 1, 64]
    for text in streams:
        beside.remove(text)
    assert [piece.count for piece in run(beside)] == [512]


def looked_at(number: int, count: int, *, private: bool = True) -> Sequence:
    """A text of which a question is asked: no logits are wanted."""
    root = None if private else ROOT
    return Sequence(stream(number, count), count, count, root, first_seen=count - 1)


def test_a_question_takes_a_smaller_part_of_a_pass_than_a_prompt_beside_streams() -> None:
    running, streams = with_streams(2, observed=16)
    question, another = looked_at(7, 4000), looked_at(8, 4000)
    prompt = sequence(9, 4000, private=True)
    running.add(question)
    for _ in range(3):
        assert [piece.count for piece in run(running)] == [1, 1, 16]
    running.add(another)
    assert [piece.count for piece in run(running)] == [1, 1, 8, 8]
    running.remove(another)
    running.add(prompt)
    assert [piece.count for piece in run(running)] == [1, 1, 32, 32]
    running.remove(prompt)
    assert [piece.count for piece in run(running)] == [1, 1, 16]
    for text in streams:
        running.remove(text)
    assert [piece.count for piece in run(running)] == [512]


def test_a_question_that_computes_what_a_prompt_waits_for_is_not_held_back() -> None:
    running, _ = with_streams(2, observed=16)
    question = looked_at(7, 4000, private=False)
    running.add(question)
    run(running)
    assert rows_of(run(running))[question] == 16
    running.add(prompt := sequence(7, 4000))
    given = rows_of(run(running))
    assert (given[question], prompt in given) == (64, False)
    assert prompt.remaining > 3000


def test_streams_of_another_model_bound_a_prompt_too() -> None:
    alone, _ = with_streams(0)
    alone.add(sequence(8, 4000, private=True))
    assert not alone.streaming
    assert [piece.count for piece in alone.plan(beside_streams=True).slices] == [64]


def test_more_prompts_than_rows_take_turns() -> None:
    running, _ = with_streams(1, beside_streams=4)
    prompts = [sequence(number, 50, private=True) for number in range(10)]
    for text in prompts:
        running.add(text)
    for passes in (1, 2, 3, 4, 5):
        for _ in range(5):
            assert len(run(running)) == 1 + 4
        assert [text.computed for text in prompts] == [passes * 2] * 10


def test_a_cold_prompt_that_many_continue_is_computed_once() -> None:
    pool = BlockPool(200)
    running = scheduler(pool)
    texts = [sequence(1, 512, 520) for _ in range(16)]
    for text in texts:
        running.add(text)
    assert rows_of(run(running)) == {texts[0]: 512}
    assert rows_of(run(running)) == dict.fromkeys(texts, 1)
    assert all(text.remaining == 1 for text in texts)
    assert [text.reused for text in texts] == [0] + [511] * 15
    assert (pool.misses, pool.hits) == (16, 15 * 16)
    assert pool.held == 16 + 1  # one has gone on


@given(
    count=st.integers(2, 6),
    length=st.integers(33, 300),
    rows=st.integers(1, 120),
    cancelled=st.integers(0, 20),
)
def test_where_who_computes_for_others_is_cancelled_the_next_goes_on_from_there(
    count: int, length: int, rows: int, cancelled: int
) -> None:
    running = scheduler(BlockPool(200), rows=rows)
    texts = [sequence(1, length) for _ in range(count)]
    for text in texts:
        running.add(text)
    computed = passes = 0
    while any(text.remaining for text in texts):
        slices = run(running)
        computed += sum(piece.count for piece in slices)
        if passes == cancelled and slices[0].sequence in texts:
            texts.remove(slices[0].sequence)
            running.remove(slices[0].sequence)
        passes += 1
    lost = BLOCK_TOKENS - 1
    ends = count * ((length - 1) % BLOCK_TOKENS + 1)  # what comes after the last shared block
    assert computed <= length + ends + lost


def test_a_text_whose_end_is_hot_computes_the_one_row_that_is_wanted() -> None:
    pool = BlockPool(16)
    running = scheduler(pool)
    first = sequence(1, 96)
    running.add(first)
    run(running)
    running.remove(first)
    again = sequence(1, 96)
    running.add(again)
    (piece,) = run(running)
    assert (piece.start, piece.count, piece.wanted) == (95, 1, range(95, 96))
    assert again.reused == 95
    assert pool.held == 3


def test_every_row_that_is_wanted_is_computed() -> None:
    pool = BlockPool(16)
    running = scheduler(pool)
    for first_wanted in (0, 1, 31, 32, 33, 64, 94, 95):
        text = Sequence(stream(1, 96), 96, first_wanted, ROOT)
        running.add(text)
        (piece,) = run(running)
        assert piece.wanted == range(first_wanted, 96)
        assert piece.start == first_wanted  # the rest is found, but for the first text
        running.remove(text)
        assert (pool.held, pool.cached) == (0, 3)


@pytest.mark.parametrize("first_seen", [0, 1, 31, 32, 33, 64, 95])
def test_every_row_that_is_looked_at_is_computed_and_the_rest_found(first_seen: int) -> None:
    pool = BlockPool(16)
    running = scheduler(pool)
    for first_wanted in (95, 96):  # the logits after the last token, or none
        running.add(text := Sequence(stream(1, 96), 96, 0, ROOT))
        run(running)
        running.remove(text)
        running.add(text := Sequence(stream(1, 96), 96, first_wanted, ROOT, 1, first_seen))
        (piece,) = run(running)
        assert (piece.start, piece.count) == (first_seen, 96 - first_seen)
        assert piece.wanted == range(first_wanted, 96)
        assert (text.reused, text.remaining) == (first_seen, 0)
        running.remove(text)
        assert (pool.held, pool.cached) == (0, 3)


def test_a_row_that_was_computed_for_its_logits_is_not_computed_for_them_again() -> None:
    running = scheduler(BlockPool(16), rows=62)
    ahead, behind = (Sequence(stream(1, 96), 96, first_wanted, ROOT) for first_wanted in (0, 35))
    running.add(ahead)
    run(running)
    running.add(behind)
    run(running)
    assert (ahead.computed, behind.computed) == (93, 63)  # the second block can be found now
    given = {piece.sequence: piece.wanted for piece in run(running)}
    assert given[behind] == range(63, 96)


def test_blocks_that_are_generated_are_not_counted_as_missed() -> None:
    pool = BlockPool(16)
    running = scheduler(pool)
    text = sequence(1, 70, 200)
    running.add(text)
    while text.computed < 200:
        run(running)
    assert (pool.cached, pool.misses) == (6, 2)


def test_one_that_is_admitted_never_runs_out_of_blocks() -> None:
    pool = BlockPool(5)
    running = scheduler(pool)
    texts = [sequence(number, 40, 64, private=True) for number in (1, 2)]
    for text in (*texts, sequence(3, 1)):
        running.add(text)
    while texts[0].computed < 64:
        assert rows_of(run(running)).keys() == set(texts)
    assert pool.available == 0


def test_sequences_are_admitted_in_order_of_arrival() -> None:
    running = scheduler(BlockPool(64), sequences=1)
    texts = [sequence(number, 1) for number in range(5)]
    for text in texts:
        running.add(text)
    for text in texts:
        assert rows_of(run(running)).keys() == {text}
        running.remove(text)


def test_small_texts_go_before_one_that_waits_for_blocks_but_only_so_many() -> None:
    pool = BlockPool(9)  # eight blocks
    running = scheduler(pool, sequences=4)
    first, wide = sequence(1, 1, 160), sequence(2, 1, 256)
    running.add(first)
    running.add(wide)
    overtook = 0
    for number in range(10):
        small = sequence(number, 1, private=True)
        running.add(small)
        overtook += small in rows_of(run(running))
        running.remove(small)
    assert overtook == 4
    assert wide.computed == 0
    after = sequence(3, 1)
    running.add(after)
    running.remove(first)
    assert rows_of(run(running)).keys() == {wide}
    running.remove(wide)
    assert rows_of(run(running)).keys() == {after}


def test_blocks_that_others_hold_are_not_counted_again() -> None:
    pool = BlockPool(21)  # room for one text of 17 blocks, and three more
    running = scheduler(pool)
    texts = [sequence(1, 512, 513)]
    running.add(texts[0])
    run(running)
    texts += [sequence(1, 512, 513) for _ in range(5)]
    for text in texts[1:]:
        running.add(text)
    run(running)
    assert (running.running, running.waiting) == (4, 2)
    assert pool.held == 17
    assert pool.shared == 3 * 16


@pytest.mark.parametrize("passes", range(12))
def test_who_is_cancelled_frees_its_place_and_its_blocks_for_the_next_pass(passes: int) -> None:
    pool = BlockPool(9)
    running = scheduler(pool, sequences=2, beside_streams=16)
    texts = [sequence(number, 100, 128, private=True) for number in (1, 2)]
    next_in_line = sequence(3, 128, private=True)
    for text in (*texts, next_in_line):
        running.add(text)
    for _ in range(passes):
        assert next_in_line not in rows_of(run(running))
    held = len(texts[1].table)
    running.remove(texts[0])
    assert pool.held == held
    assert rows_of(run(running)).keys() == {texts[1], next_in_line}


def shallow(number: int, count: int) -> Sequence:
    return Sequence(stream(number, count), count, count, ROOT, first_seen=count - 1, shallow=True)


def test_a_shallow_text_uses_blocks_that_it_finds_and_leaves_none() -> None:
    pool = BlockPool(30)
    running = scheduler(pool, rows=40)
    for text, start in ((shallow(1, 100), 0), (sequence(1, 100), 0), (shallow(1, 100), 96)):
        running.add(text)
        before = pool.cached
        assert run(running)[0].start == start
        while text.remaining:
            run(running)
        assert text.reused == start
        assert pool.cached - before == (0 if text.shallow else 3)
        running.remove(text)
        assert pool.held == 0


def test_nobody_waits_for_a_shallow_text_nor_does_one_that_has_begun_for_others() -> None:
    pool = BlockPool(30)
    running = scheduler(pool, rows=40)
    looked_at, text = shallow(1, 100), sequence(1, 100)
    running.add(looked_at)
    assert rows_of(run(running)) == {looked_at: 40}
    running.add(text)
    while looked_at.remaining:
        computed = looked_at.computed
        assert rows_of(run(running)).keys() == {looked_at, text}
        assert looked_at.computed > computed
    assert (looked_at.reused, text.reused) == (0, 0)
    assert pool.cached > 0


def test_of_those_that_begin_together_nobody_waits_for_a_shallow_one() -> None:
    running = scheduler(BlockPool(30))
    text = sequence(1, 100)
    for one in (shallow(1, 100), shallow(1, 100), text):
        running.add(one)
    assert rows_of(run(running)).keys() == {text}


def test_a_shallow_text_waits_for_what_another_computes_and_leaves() -> None:
    running = scheduler(BlockPool(30), rows=40)
    text, looked_at = sequence(1, 100), shallow(1, 100)
    running.add(text)
    run(running)
    running.add(looked_at)
    while text.remaining > 4:
        assert rows_of(run(running)).keys() == {text}
    while looked_at.remaining:
        run(running)
    assert looked_at.reused == 96


def test_copies_between_the_tiers_come_with_the_pass_that_needs_them() -> None:
    pool = BlockPool(4, host_slots=3)
    running = scheduler(pool)
    plans: list[Plan] = []
    for number in (1, 2, 1):
        text = sequence(number, 96)
        running.add(text)
        plans.append(running.plan())
        running.commit(plans[-1].slices)
        running.remove(text)
    first, second, again = (plan.moves for plan in plans)
    assert first == []
    assert [transfer.to_host for transfer in second] == [True, True]
    assert {transfer.to_host for transfer in again} == {True, False}
    assert pool.restores == 2
    assert plans[2].slices[0].start == 95
