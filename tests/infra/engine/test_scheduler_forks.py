"""A sequence that goes on in several ways shares what they have in common. Integers only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.engine.blocks import BLOCK_TOKENS, BlockPool, Copy, block_keys, blocks_for
from infra.engine.scheduler import Scheduler, Sequence
from tests.infra.engine.test_scheduler import ROOT, run, scheduler, stream

EDGES = (0, 1, 31, 32, 33, 63, 64, 65, 90)


def computed(
    running: Scheduler, count: int, *, limit: int = 200, width: int = 2, private: bool = False
) -> Sequence:
    """A text of ``count`` tokens of which all are computed, with the whole of it for a trunk."""
    text = Sequence(stream(1, count), limit, 0, None if private else ROOT, width)
    running.add(text)
    running.commit(running.plan().slices)
    return text


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("at", EDGES)
def test_a_fork_holds_the_blocks_of_its_parent_and_computes_what_is_its_own(
    at: int, private: bool
) -> None:
    pool = BlockPool(32)
    running = scheduler(pool, beside_streams=512)
    parent = computed(running, 90, private=private)
    fork = running.fork(parent, at, stream(2, 100)[at:], at)
    assert (fork.computed, fork.tokens) == (at, stream(1, 90)[:at] + stream(2, 100)[at:])
    assert fork.table == parent.table[: blocks_for(at)]
    assert (pool.held, pool.shared) == (3, blocks_for(at))
    parent.tokens.append(7)
    plan = running.plan()
    (piece,) = (piece for piece in plan.slices if piece.sequence is fork)
    assert (piece.start, piece.count, piece.wanted) == (at, 100 - at, range(at, 100))
    assert fork.table[: at // BLOCK_TOKENS] == parent.table[: at // BLOCK_TOKENS]
    assert set(fork.table[at // BLOCK_TOKENS :]).isdisjoint(parent.table)
    assert len(plan.moves) == (at % BLOCK_TOKENS > 0)  # one block, where it goes on inside one


@pytest.mark.parametrize("at", EDGES)
def test_blocks_that_forks_fill_are_found_by_their_own_texts(at: int) -> None:
    pool = BlockPool(32)
    running = scheduler(pool, beside_streams=512)
    parent = computed(running, 90)
    fork = running.fork(parent, at, stream(2, 128)[at:], at)
    parent.tokens += stream(3, 128)[90:]
    run(running)
    for text in (parent, fork):
        keys = block_keys(ROOT, text.tokens[:128], limit=128)
        assert pool.match(keys) == text.table[:4]


def test_forks_that_compute_the_same_block_keep_it_once() -> None:
    pool = BlockPool(32)
    running = scheduler(pool, beside_streams=512)
    parent = computed(running, 40, width=3)
    forks = [running.fork(parent, 40, [5] * 24, 40) for _ in range(2)]
    run(running)
    assert forks[0].table == forks[1].table
    assert len(forks[0].table) == 2
    assert pool.held == 3


def test_a_fork_may_find_what_others_have_computed() -> None:
    pool = BlockPool(32)
    running = scheduler(pool, beside_streams=512)
    other = Sequence(stream(2, 96), 96, 95, ROOT)
    running.add(other)
    run(running)
    parent = computed(running, 50)
    fork = running.fork(parent, 40, stream(2, 100)[40:], 99)
    (piece,) = running.plan().slices
    assert (piece.sequence, piece.start, fork.reused) == (fork, 96, 96)
    assert fork.table[:3] == other.table


def test_a_private_fork_finds_nothing_and_leaves_nothing() -> None:
    pool = BlockPool(32)
    running = scheduler(pool, beside_streams=512)
    running.add(Sequence(stream(2, 96), 96, 95, ROOT))
    run(running)
    parent = computed(running, 50, private=True)
    fork = running.fork(parent, 40, stream(2, 100)[40:], 99)
    run(running)
    assert pool.cached == 3
    running.remove_group(fork.origin)
    assert (pool.held, pool.cached) == (3, 3)


@pytest.mark.parametrize("private", [False, True])
def test_who_goes_on_alone_writes_to_the_block_it_shared(private: bool) -> None:
    pool = BlockPool(32)
    running = scheduler(pool, beside_streams=512)
    parent = computed(running, 40, private=private)
    fork = running.replace(parent, 40, [1], 40)
    table = list(fork.table)
    plan = running.plan()
    assert (fork.table, plan.moves) == (table, [])
    assert (parent.table, pool.held) == ([], 2)


def test_a_full_block_that_can_be_found_stays_as_it_is_when_a_fork_goes_on_within_it() -> None:
    pool = BlockPool(32)
    running = scheduler(pool, beside_streams=512)
    parent = computed(running, 64)
    blocks = list(parent.table)
    fork = running.replace(parent, 40, [9] * 60, 40)
    plan = running.plan()
    assert plan.moves == [Copy(blocks[1], fork.table[1])]
    running.commit(plan.slices)
    assert pool.match(block_keys(ROOT, stream(1, 64), limit=64)) == blocks
    assert pool.match(block_keys(ROOT, fork.tokens, limit=100)) == fork.table[:3]


def test_a_step_of_a_search_copies_one_block_for_each_beam_that_is_new() -> None:
    pool = BlockPool(64)
    running = scheduler(pool, beside_streams=512)
    prompt = Sequence(stream(1, 40), 60, 39, ROOT, 4)
    running.add(prompt)
    running.commit(running.plan().slices)
    beams = running.reorder([prompt], [0, 0, 0, 0], [1, 2, 3, 4])
    assert beams[0] is prompt
    plan = running.plan()
    assert [type(move) for move in plan.moves] == [Copy] * 3
    running.commit(plan.slices)
    assert pool.held == 1 + 4
    after = running.reorder(beams, [2, 1, 2], [5, 6, 7])
    assert after[:2] == [beams[2], beams[1]]
    assert after[2] not in beams
    assert [beam.tokens[40:] for beam in after] == [[3, 5], [2, 6], [3, 7]]
    assert pool.held == 1 + 2
    assert len(running.plan().moves) == 1
    assert pool.held == 1 + 3
    running.remove_group(prompt)
    assert (pool.held, running.running, running.busy) == (0, 0, False)


def test_what_cannot_be_forked_is_refused_with_the_reason() -> None:
    running = scheduler(BlockPool(64))
    text = Sequence(stream(1, 80), 100, 70, ROOT, 2)
    running.add(text)
    with pytest.raises(ValueError, match="first 80 tokens of the parent are not computed"):
        running.fork(text, 80, [1], 80)
    running.commit(running.plan().slices)
    for at, tokens, reason in (
        (81, [1], "first 81 tokens of the parent are not computed"),
        (63, [1], "within the trunk"),
        (64, [1] * 37, "at most 100 tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            running.fork(text, at, tokens, at)
    text.tokens.append(1)
    with pytest.raises(ValueError, match="not computed yet"):
        running.reorder([text], [0], [1])
    fork = running.fork(text, 64, [1] * 36, 64)
    with pytest.raises(ValueError, match="2 forks run already"):
        running.fork(fork, 64, [1], 64)
    running.remove(text)
    with pytest.raises(ValueError, match="not computed"):
        running.fork(text, 64, [1], 64)
    alone = computed(running, 40, width=1)
    with pytest.raises(ValueError, match="1 forks run already"):
        running.fork(alone, 40, [1], 40)


def test_a_group_that_can_never_run_together_does_not_fit() -> None:
    running = scheduler(BlockPool(11), sequences=4)  # ten blocks

    def fits(limit: int, width: int, first_wanted: int) -> bool:
        tokens = [0] * (first_wanted + 1)
        return running.fits(Sequence(tokens, limit, first_wanted, ROOT, width))

    assert fits(320, 1, 0)
    assert not fits(321, 1, 0)
    assert fits(32, 4, 0)
    assert not fits(32, 5, 0)  # five do not run together
    assert fits(64, 4, 0)
    assert not fits(96, 4, 0)
    assert fits(160, 3, 95)  # three blocks in common, and two for each of three
    assert not fits(160, 3, 94)


def test_a_group_is_admitted_when_there_are_places_for_all_of_it() -> None:
    running = scheduler(BlockPool(64), sequences=4)
    narrow = [Sequence(stream(i, 5), 60, 4, None) for i in range(2)]
    wide = Sequence(stream(3, 5), 60, 4, None, 3)
    for text in (*narrow, wide):
        running.add(text)
    run(running)
    assert (running.running, running.waiting) == (2, 1)
    running.remove(narrow[0])
    run(running)
    assert (running.running, running.waiting) == (2, 0)
    running.add(Sequence(stream(4, 5), 60, 4, None))
    run(running)
    assert running.waiting == 1  # its forks may still come
    running.remove(wide)
    run(running)
    assert running.waiting == 0


@given(
    limit=st.integers(40, 200),
    width=st.integers(2, 5),
    trunk=st.integers(1, 40),
    others=st.integers(0, 5),
)
def test_a_group_finishes_with_the_blocks_it_was_promised_and_no_more(
    limit: int, width: int, trunk: int, others: int
) -> None:
    """Everything its forks hold is their own, and others have taken what was left."""
    text = Sequence([0] * trunk, limit, trunk - 1, ROOT, width)
    pool = BlockPool(1 + text.most_blocks + others)
    running = scheduler(pool, beside_streams=512)
    running.add(text)
    for number in range(others + 1):
        running.add(Sequence([number], 32, 0, None))
    run(running)
    assert running.waiting == 1
    at = text.trunk * BLOCK_TOKENS
    for number in range(1, width):
        running.fork(text, at, [number] * (limit - at), limit - 1)
    text.tokens += [9] * (limit - len(text.tokens))
    while any(member.remaining for member in running._groups[text]):
        run(running)
    assert pool.available == 0


def test_blocks_that_two_searches_share_for_a_while_are_lent_to_nobody() -> None:
    """Both do the same at first and share blocks; then each needs all it may have."""
    pool = BlockPool(1 + 2 * 2 * 4)
    running = scheduler(pool, beside_streams=512)
    searches = [Sequence([0] * 8, 128, 7, ROOT, 2) for _ in range(2)]
    for search in searches:
        running.add(search)
    run(running)
    groups = [[search, running.fork(search, 8, [1] * 80, 8)] for search in searches]
    for search in searches:
        search.tokens[8:] = [2] * 80
    for _ in range(3):
        run(running)
    assert pool.held < 2 * 2 * 3
    third = Sequence([3], 32, 0, None)
    running.add(third)
    run(running)
    for number, group in enumerate(groups):
        for fork, member in enumerate(group):
            group[fork] = running.replace(member, 0, [number, fork] * 64, 127)
    while any(member.remaining for group in groups for member in group):
        run(running)
    assert third.computed == 0
    assert pool.available == 0


@pytest.mark.parametrize(("blocks", "admitted"), [(3, False), (4, True)])
def test_of_what_others_hold_only_the_trunk_spares_a_group_blocks(
    blocks: int, admitted: bool
) -> None:
    pool = BlockPool(1 + blocks)
    running = scheduler(pool)
    running.add(Sequence(stream(1, 64), 64, 63, ROOT))
    run(running)
    wide = Sequence(stream(1, 64), 64, 40, ROOT, 2)
    running.add(wide)
    run(running)
    assert (running.running == 2) == admitted
    if admitted:
        forks = [running.fork(wide, 32, [2] * 32, 63), running.replace(wide, 32, [3] * 32, 63)]
        while any(fork.remaining for fork in forks):
            run(running)
        assert pool.available == 0
