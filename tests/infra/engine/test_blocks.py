"""Blocks are found by content, shared, and forgotten by age. Integers only: no tensor."""

import pytest

from infra.engine.blocks import (
    BlockPool,
    Copy,
    OutOfBlocks,
    Transfer,
    block_key,
    block_keys,
)

ROOT = bytes(32)


def published(pool: BlockPool, *names: str) -> list[int]:
    return [pool.publish(pool.allocate(), name.encode()) for name in names]


def left_behind(pool: BlockPool, *names: str) -> None:
    pool.release(published(pool, *names))


def found(pool: BlockPool, *names: str) -> int:
    return pool.count_cached(name.encode() for name in names)


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
    assert (pool.held, pool.cached, pool.shared, pool.free) == (1, 1, 1, 2)
    pool.release([again])
    assert (pool.held, pool.shared) == (1, 0)
    pool.release([kept])
    assert (pool.held, pool.cached, pool.free) == (0, 1, 2)


def test_hits_and_misses_count_blocks_and_looking_counts_nothing() -> None:
    pool = BlockPool(8)
    published(pool, "a", "b")
    assert (found(pool, "a", "b", "c"), found(pool, "c", "a")) == (2, 0)
    assert (pool.hits, pool.misses) == (0, 0)
    assert len(pool.match([b"a", b"b", b"c", b"d"])) == 2
    pool.publish(pool.allocate(), b"c", missed=True)
    assert (pool.hits, pool.misses) == (2, 1)


def test_a_block_is_held_while_somebody_holds_it() -> None:
    pool = BlockPool(8)
    first, second = published(pool, "a", "b")
    pool.share([first])
    assert (pool.held, pool.shared) == (2, 1)
    pool.release([first, second])
    assert (pool.held, pool.shared, found(pool, "a", "b")) == (1, 0, 2)
    pool.release([first])
    assert (pool.held, found(pool, "a", "b")) == (0, 2)


def test_leading_keys_are_counted_as_far_as_they_are_in_given_blocks() -> None:
    pool = BlockPool(8)
    first, second, third = published(pool, "a", "b", "c")
    keys = [b"a", b"b", b"c", b"d"]
    assert pool.count_among({first, second, third}, keys) == 3
    assert pool.count_among({first, third}, keys) == 1
    assert pool.count_among(set(), keys) == 0


def test_a_block_that_one_holds_and_nobody_finds_may_be_written_to_as_it_is() -> None:
    pool = BlockPool(4)
    block = pool.allocate()
    assert pool.own(block) == block
    assert (pool.take_moves(), pool.held) == ([], 1)


def test_of_a_block_that_two_hold_who_writes_first_gets_a_copy() -> None:
    pool = BlockPool(4)
    block = pool.allocate()
    pool.share([block])
    copy = pool.own(block)
    assert copy != block == pool.own(block)
    assert pool.take_moves() == [Copy(block, copy)]
    assert (pool.held, pool.shared) == (2, 0)


def test_a_block_that_can_be_found_is_never_written_to() -> None:
    pool = BlockPool(4)
    (block,) = published(pool, "a")
    copy = pool.own(block)
    assert copy != block
    assert pool.take_moves() == [Copy(block, copy)]
    assert (pool.held, found(pool, "a"), pool.count_among({block}, [b"a"])) == (1, 1, 1)


def test_where_there_is_no_other_block_it_leaves_the_device_before_it_is_written_to() -> None:
    pool = BlockPool(2, host_slots=1)
    (block,) = published(pool, "a")
    assert pool.own(block) == block
    assert pool.take_moves() == [Transfer(block, 0, to_host=True), Copy(block, block)]
    assert (found(pool, "a"), pool.cached, len(pool.host)) == (1, 0, 1)


def test_forgetting_keeps_what_is_held() -> None:
    pool = BlockPool(4, host_slots=2)
    left_behind(pool, "moved")
    _, idle = published(pool, "held", "idle")
    fresh = [pool.allocate()]
    pool.release([idle])
    assert (found(pool, "held"), found(pool, "idle"), found(pool, "moved")) == (1, 1, 1)
    pool.forget()
    assert (found(pool, "held"), found(pool, "idle"), found(pool, "moved")) == (1, 0, 0)
    assert (pool.held, pool.available) == (2, 1)
    pool.release(fresh)


def test_what_has_to_leave_the_device_goes_to_the_host_and_comes_back() -> None:
    pool = BlockPool(3, host_slots=2)
    left_behind(pool, "a1", "a2")
    assert pool.take_moves() == []
    taken = [pool.allocate(), pool.allocate()]
    out = pool.take_moves()
    assert [(transfer.block, transfer.to_host) for transfer in out] == [(2, True), (1, True)]
    assert (pool.cached, len(pool.host), pool.evictions) == (0, 2, 2)
    assert found(pool, "a1", "a2") == 2
    assert pool.count_cached([b"a1", b"a2"], on_device=True) == 0
    pool.release(taken)
    blocks = pool.match([b"a1", b"a2"])
    slot_of = {transfer.block: transfer.slot for transfer in out}
    assert pool.take_moves() == [
        Transfer(blocks[0], slot_of[1], to_host=False),
        Transfer(blocks[1], slot_of[2], to_host=False),
    ]
    assert (pool.cached, len(pool.host)) == (2, 0)
    assert (pool.hits, pool.restores, pool.evictions) == (2, 2, 2)
    assert pool.count_cached([b"a1", b"a2"], on_device=True) == 2


def test_the_host_forgets_the_longest_unused_too() -> None:
    pool = BlockPool(2, host_slots=3)
    for name in "abc":
        left_behind(pool, name)
    pool.release(pool.match([b"a"]))  # c makes room for it
    assert [found(pool, name) for name in "abc"] == [1, 1, 1]
    for name in "de":
        left_behind(pool, name)
    assert [found(pool, name) for name in "abcde"] == [1, 0, 1, 1, 1]
    assert len(pool.host) == 3


def test_a_block_and_a_slot_that_change_places_are_copied_in_an_order_that_loses_neither() -> None:
    pool = BlockPool(2, host_slots=2)
    left_behind(pool, "a")
    left_behind(pool, "b")
    (out,) = pool.take_moves()
    pool.release(pool.match([b"a"]))
    back = pool.take_moves()
    assert [transfer.to_host for transfer in back] == [True, False]
    assert back[1].slot == out.slot != back[0].slot
    assert (found(pool, "a"), found(pool, "b")) == (1, 1)


def test_with_one_slot_what_comes_back_is_not_overwritten_by_what_leaves() -> None:
    pool = BlockPool(2, host_slots=1)
    left_behind(pool, "a")
    left_behind(pool, "b")
    (out,) = pool.take_moves()
    pool.match([b"a"])
    assert pool.take_moves() == [Transfer(out.block, out.slot, to_host=False)]
    assert (found(pool, "a"), found(pool, "b")) == (1, 0)


def test_what_is_on_the_host_is_found_as_far_as_there_are_blocks_for_it() -> None:
    pool = BlockPool(3, host_slots=4)
    left_behind(pool, "a1", "a2")
    taken = [pool.allocate(), pool.allocate()]
    assert pool.match([b"a1"]) == []
    pool.release(taken[:1])
    assert len(pool.match([b"a1", b"a2"])) == 1
    assert found(pool, "a1", "a2") == 2


def test_what_is_computed_again_needs_no_place_on_the_host() -> None:
    pool = BlockPool(2, host_slots=1)
    left_behind(pool, "a")
    taken = pool.allocate()
    assert len(pool.host) == 1
    pool.publish(taken, b"a")
    assert (len(pool.host), pool.cached, found(pool, "a")) == (0, 1, 1)


def test_without_a_host_tier_nothing_is_copied() -> None:
    pool = BlockPool(2)
    for name in "abc":
        left_behind(pool, name)
    assert pool.take_moves() == []
    assert (pool.host.slots, len(pool.host), pool.evictions) == (0, 0, 2)
    assert [found(pool, name) for name in "abc"] == [0, 0, 1]
