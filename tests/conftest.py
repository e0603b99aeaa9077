"""What all tests share: the ranks of `mpirun -n N pytest --with-mpi` and the running of commands under mpirun."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.world import World
from helpers import launching
from helpers.mpi_session import pytest_configure, world

__all__ = ["exchange", "mpirun", "pytest_configure", "world"]


@pytest.fixture
def exchange(world: World) -> Exchange:
    """Fresh exchanges over all ranks."""
    return Exchange(world)


@pytest.fixture
def mpirun() -> Callable[..., launching.Finished]:
    """`mpirun(ranks, *command, env=None, timeout_s=60)` of this environment; see `helpers.launching.mpirun`."""
    return launching.mpirun
