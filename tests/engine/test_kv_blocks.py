"""The memory of KV blocks: held, shared, given back."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe import huge_pages
from dist_moe.kernels import ALIGNMENT
from dist_moe.model import kv_blocks
from dist_moe.model.kv_blocks import BlockMemory


@pytest.fixture
def runs_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_blocks, "_RUN_BYTES", 3 * 128 + 5)


@pytest.mark.parametrize("block_bytes", [0, 1, 64, 100, 128])
def test_blocks_are_apart_aligned_and_keep_their_bytes(block_bytes: int, runs_of_three: None) -> None:
    memory = BlockMemory(block_bytes)
    addresses = [memory.take() for _ in range(20)]
    for i, address in enumerate(addresses):
        assert address % ALIGNMENT == 0
        memory.block(address)[:] = i
    assert memory.used_bytes == 20 * block_bytes
    assert len(set(addresses)) == 20
    for i, address in enumerate(addresses):
        np.testing.assert_array_equal(memory.block(address), np.full(block_bytes, i, np.uint8))


def test_a_block_is_free_when_nobody_holds_it(runs_of_three: None) -> None:
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


def test_a_run_is_given_back_when_all_its_blocks_are_free(runs_of_three: None) -> None:
    memory = BlockMemory(128)
    first = [memory.take() for _ in range(3)]
    second = [memory.take() for _ in range(2)]
    assert len(memory._runs) == 2
    for address in first:
        memory.release(address)
    assert len(memory._runs) == 1
    memory.block(second[0])[:] = 1
    for address in second:
        memory.release(address)
    assert memory._runs == {}
    assert memory.used_bytes == 0


def test_no_address_space_is_lack_of_memory() -> None:
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        huge_pages.huge_page_memory(1 << 60)


def test_untouched_memory_is_zeros() -> None:
    memory = huge_pages.huge_page_memory(4097)
    assert memory.shape == (4097,)
    assert not memory.any()
    memory[-1] = 1
