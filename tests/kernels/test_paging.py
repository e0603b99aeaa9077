"""Pages of mapped files: which are in memory, and reading them ahead."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import numpy as np
import pytest

from dist_moe.kernels import address_of, is_absent, populate

PAGES = 600
PAGE_BYTES = mmap.PAGESIZE


@pytest.fixture
def data(tmp_path: Path) -> np.ndarray:
    """A mapped file that nobody has read: it is a hole. A fault brings its own page and no other."""
    with (tmp_path / "hole").open("w+b") as file:
        file.truncate(PAGES * PAGE_BYTES)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)


def test_what_is_populated_is_there(data: np.ndarray) -> None:
    address = address_of(data)
    assert is_absent(address, len(data), 1)
    assert populate(address, len(data)) == 0
    assert not is_absent(address, len(data), 1)


def test_a_run_is_widened_to_whole_pages(data: np.ndarray) -> None:
    address = address_of(data) + 300 * PAGE_BYTES
    assert populate(address + PAGE_BYTES - 1, 2) == 0
    assert not is_absent(address, 2 * PAGE_BYTES, 1)
    assert is_absent(address, 2 * PAGE_BYTES + 1, 1)
    assert is_absent(address - 1, 1, 1)


def test_one_page_in_every_stride_is_looked_at(data: np.ndarray) -> None:
    address = address_of(data)
    for page in range(0, PAGES, 100):
        assert populate(address + page * PAGE_BYTES, 1) == 0
    assert not is_absent(address, len(data), 100 * PAGE_BYTES)
    assert is_absent(address, len(data), 50 * PAGE_BYTES)


def test_a_file_that_became_shorter_is_an_error_number(tmp_path: Path, data: np.ndarray) -> None:
    with (tmp_path / "hole").open("r+b") as file:
        file.truncate(2 * PAGE_BYTES)
    assert populate(address_of(data), 2 * PAGE_BYTES) == 0
    assert populate(address_of(data), PAGES * PAGE_BYTES) == errno.EFAULT
