"""What all tests share: the ranks of `mpirun -n N pytest --with-mpi` and the running of commands under mpirun."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from dist_moe.engine.startup import open_exchange
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.world import World
from helpers import launching
from helpers.mpi_session import pytest_configure, world

__all__ = ["exchange", "mpirun", "pytest_configure", "world"]


@pytest.fixture(params=["MPI", "shared memory"])
def exchange(world: World, request: pytest.FixtureRequest) -> Exchange:
    """Fresh exchanges over all ranks, by MPI alone and through shared memory."""
    return open_exchange(
        world, may_spin(world, 1, os.environ), {"DIST_MOE_SHARED_MEMORY": "0" if request.param == "MPI" else "1"}
    )


@pytest.fixture
def mpirun() -> Callable[..., launching.Finished]:
    """`mpirun(ranks, *command, env=None, timeout_s=60)` of this environment; see `helpers.launching.mpirun`."""
    return launching.mpirun
