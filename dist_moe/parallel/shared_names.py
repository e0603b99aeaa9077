"""What MPI itself would leave on a host where a job is killed: the names of its shared memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

# MPICH unlinks it in MPI_Finalize, for which nobody misses the name.
_MPICH = "/dev/shm/mpich_shm_"


def forget_shared_names(maps: Path = Path("/proc/self/maps")) -> None:
    """Unlink what MPICH's ranks of a host share, once all of them have mapped it.

    Args:
        maps: The kernel's list of this process's mappings.
    """
    with contextlib.suppress(OSError):
        for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
            name = line.split(maxsplit=5)[-1]
            if name.startswith(_MPICH) and not name.endswith(" (deleted)"):
                with contextlib.suppress(OSError):
                    Path(name).unlink()
