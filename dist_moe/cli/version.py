"""What `--version` says: the package, the kernels' ISA levels, and the MPI that would be used. Starts no MPI."""

from __future__ import annotations

import os
import platform

import dist_moe


def version_lines() -> list[str]:
    """One line each for the package, Python, the kernels and MPI."""
    return [
        f"dist-moe {dist_moe.__version__}",
        f"Python: {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"kernels: {_kernels()}",
        f"MPI: {_mpi()}",
    ]


def _kernels() -> str:
    try:
        from dist_moe.kernels import isa_levels
    except ImportError as error:
        return f"not built ({error}); install the package again with pip"
    levels = isa_levels()
    wish = os.environ.get("DIST_MOE_ISA") or levels[-1]
    chosen = f"chosen {wish}" if wish in levels else f"DIST_MOE_ISA={wish} is none of them and will be refused"
    return f"ISA levels available here {', '.join(levels)}; {chosen}"


def _mpi() -> str:
    from dist_moe.parallel.mpi import mpi_library

    return mpi_library()
