"""The names of MPI's shared memory do not outlive the start."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from dist_moe.parallel.shared_names import forget_shared_names

SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_what_is_mapped_is_unlinked_and_nothing_else(tmp_path: Path) -> None:
    unique = uuid.uuid4().hex
    mine, others, ours = (SHARED_MEMORY / f"{name}{unique}" for name in ("mpich_shm_", "mpich_shm_other_", "dist-moe-"))
    for path in (mine, others, ours):
        path.touch()
    try:
        start = "7f00-7f01 rw-s 00000000 00:1a 7 "
        maps = tmp_path / "maps"
        maps.write_text("".join(f"{start}{name}\n" for name in (mine, mine, ours, f"{others} (deleted)", "[heap]")))
        forget_shared_names(maps)
        assert [path.exists() for path in (mine, others, ours)] == [False, True, True]
        forget_shared_names(maps)  # another rank was first
        forget_shared_names(tmp_path / "hidden")
    finally:
        for path in (mine, others, ours):
            path.unlink(missing_ok=True)
