"""Which part of mapped files lies in huge pages, as the kernel's own table says it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from dist_moe.huge_pages import huge_page_share

SMAPS = """\
7f00-7f10 r--s 00000000 fe:00 11                    {directory}/weights one.safetensors
Size:               4096 kB
Rss:                4096 kB
Pss:                4096 kB
AnonHugePages:         0 kB
FilePmdMapped:      2048 kB
ShmemPmdMapped:        0 kB
VmFlags: rd mr me ms
7f10-7f20 rw-p 00000000 00:00 0
Rss:                9999 kB
FilePmdMapped:      9999 kB
7f20-7f30 r--s 00000000 fe:00 12                    {directory}/other.safetensors
Rss:                4096 kB
FilePmdMapped:      4096 kB
ShmemPmdMapped:        0 kB
7f30-7f40 r--s 00001000 fe:00 13                    {directory}/two.safetensors
Rss:                4096 kB
FilePmdMapped:         0 kB
ShmemPmdMapped:     2048 kB
7f40-7f50 rw-p 00000000 00:00 0                     [heap]
Rss:                8888 kB
"""


@pytest.fixture
def smaps(tmp_path: Path) -> Path:
    path = tmp_path / "smaps"
    path.write_text(SMAPS.format(directory=tmp_path.resolve()))
    return path


@pytest.mark.parametrize(
    ("names", "share"),
    [
        (["weights one.safetensors"], 0.5),
        (["other.safetensors"], 1.0),
        (["weights one.safetensors", "two.safetensors"], 0.5),
        (["weights one.safetensors", "other.safetensors", "two.safetensors"], 2 / 3),
        (["absent.safetensors"], None),
        ([], None),
    ],
)
def test_only_the_named_files_count(tmp_path: Path, smaps: Path, names: list[str], share: float | None) -> None:
    assert huge_page_share([tmp_path / name for name in names], smaps) == share


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert huge_page_share([tmp_path / "a"], tmp_path / "no such file") is None
    old = tmp_path / "old"
    old.write_text(f"7f00-7f10 r--s 00000000 fe:00 11   {tmp_path.resolve()}/a\nRss:   4096 kB\n")
    assert huge_page_share([tmp_path / "a"], old) is None


def test_a_file_that_is_mapped_here(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"1" * 8192)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[5000] == ord("1")
        assert huge_page_share([path]) in (0.0, None)
