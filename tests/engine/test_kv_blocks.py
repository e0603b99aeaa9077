"""The memory of KV blocks: held, shared, given back."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe import huge_pages
from dist_moe.kernels import ALIGNMENT
from dist_moe.model import kv_blocks
from dist_moe.model.kv_blocks import BlockMemory


@pytest.fixture
def slabs_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_blocks, "_SLAB_BYTES", 3 * 128 + 5)


@pytest.mark.parametrize("block_bytes", [0, 1, 64, 100, 128])
def test_blocks_are_apart_aligned_and_keep_their_bytes(block_bytes: int, slabs_of_three: None) -> None:
    memory = BlockMemory(block_bytes)
    addresses = [memory.take() for _ in range(20)]
    for i, address in enumerate(addresses):
        assert address % ALIGNMENT == 0
        memory.block(address)[:] = i
    assert memory.used_bytes == 20 * block_bytes
    assert len(set(addresses)) == 20
    for i, address in enumerate(addresses):
        np.testing.assert_array_equal(memory.block(address), np.full(block_bytes, i, np.uint8))


def test_a_block_is_free_when_nobody_holds_it(slabs_of_three: None) -> None:
    memory = BlockMemory(128)
    kept, shared = memory.take(), memory.take()
    memory.hold(shared)
    memory.release(shared)
    memory.block(shared)[:] = 7
    assert memory.used_bytes == 256
    third = memory.take()
    assert third not in (kept, shared)
    assert (memory.block(shared) == 7).all()
    memory.release(shared)
    assert memory.used_bytes == 256
    assert memory.take() == shared


def test_slabs_are_given_back_when_all_their_blocks_are_free_but_for_one(slabs_of_three: None) -> None:
    memory = BlockMemory(128)
    slab = 3 * 128
    blocks = [memory.take() for _ in range(8)]
    assert memory.mapped_bytes == 3 * slab
    for address in blocks[:3]:
        memory.release(address)
    assert memory.mapped_bytes == 3 * slab
    memory.release(blocks[6])
    taken = memory.take()  # of the slab that is in use
    assert taken == blocks[6]
    for address in blocks[3:]:
        memory.block(address)[:] = 1
        memory.release(address)
    assert memory.mapped_bytes == slab
    assert memory.used_bytes == 0
    again = [memory.take() for _ in range(3)]
    assert memory.mapped_bytes == slab
    assert len(set(again)) == 3


def test_any_order_of_takes_and_releases_keeps_the_books(slabs_of_three: None) -> None:
    rng = np.random.default_rng(5)
    memory, content, holders = BlockMemory(64), {}, {}
    for step in range(2000):
        if holders and rng.random() < (0.7 if step > 1000 else 0.45):
            address = list(holders)[rng.integers(len(holders))]
            assert (memory.block(address) == content[address]).all()
            memory.release(address)
            holders[address] -= 1
            if not holders[address]:
                del holders[address]
        elif holders and rng.random() < 0.3:
            address = list(holders)[rng.integers(len(holders))]
            memory.hold(address)
            holders[address] += 1
        else:
            address = memory.take()
            assert address not in holders
            holders[address], content[address] = 1, step % 251
            memory.block(address)[:] = content[address]
        assert memory.used_bytes == 64 * len(holders)
    for address, count in holders.items():
        for _ in range(count):
            memory.release(address)
    assert memory.mapped_bytes == 6 * 64


def test_a_rank_without_heads_takes_little_for_its_empty_blocks() -> None:
    memory = BlockMemory(0)
    assert len({memory.take() for _ in range(100)}) == 100
    assert memory.used_bytes == 0
    assert memory.mapped_bytes <= 1 << 16


def test_no_address_space_is_lack_of_memory() -> None:
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        huge_pages.huge_page_memory(1 << 60)


def test_untouched_memory_is_zeros() -> None:
    memory = huge_pages.huge_page_memory(4097)
    assert memory.shape == (4097,)
    assert not memory.any()
    memory[-1] = 1
