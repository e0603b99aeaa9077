"""Threads and bindings under a launcher: widened, kept, by host, and spinning only where there is room."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.kernels import Kernels
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.world import World
from helpers import launching

RUN = (sys.executable, "-m", "dist_moe", "run", "-p", "Once", "-n", "2", "--quiet", "-v")
CORES = len(os.sched_getaffinity(0))
ONE_CORE = ("taskset", "-c", str(min(os.sched_getaffinity(0))))

MpiRun = Callable[..., launching.Finished]
two_cores = pytest.mark.skipif(CORES < 2, reason="needs two cores")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache"))}


def threads_logged(done: launching.Finished) -> list[int]:
    """From the log's line: "... N threads on cores ..."."""
    assert done.code == 0, done.output
    return [
        int(line.split(" threads on ")[0].split()[-1]) for line in done.stderr.splitlines() if " threads on " in line
    ]


@two_cores
def test_a_lone_rank_bound_to_one_core_uses_all(mpirun: MpiRun, environment: dict[str, str]) -> None:
    done = mpirun(1, *ONE_CORE, *RUN, env=environment)
    assert threads_logged(done) == [CORES]
    assert "the launcher bound this rank to core" in done.stderr
    kept = mpirun(1, *ONE_CORE, *RUN, "--bind", "keep", env=environment)
    assert threads_logged(kept) == [1]
    assert "widened" not in kept.stderr


@two_cores
def test_a_widened_rank_really_runs_on_all_cores(mpirun: MpiRun) -> None:
    program = (
        "import os; from dist_moe.parallel.cores import share_cores; from dist_moe.parallel.world import World; "
        "from dist_moe.parallel.launcher import detect_launcher as d; launcher = d(os.environ); "
        "world = World.start(launcher); before = len(os.sched_getaffinity(0)); share_cores(world, launcher); "
        "print(before, len(os.sched_getaffinity(0))); world.finalize()"
    )
    done = mpirun(1, *ONE_CORE, sys.executable, "-c", program)
    assert done.stdout.split() == ["1", str(CORES)], done.output


@two_cores
def test_open_mpi_binds_a_lone_rank_and_it_is_widened(mpirun: MpiRun, environment: dict[str, str]) -> None:
    if launching.flavour() != "openmpi":
        pytest.skip("MPICH does not bind")
    done = mpirun(1, *RUN, env=environment | {"PRTE_MCA_rmaps_default_mapping_policy": "core"})
    assert threads_logged(done) == [CORES]


def test_a_users_own_restriction_of_the_job_is_kept(environment: dict[str, str]) -> None:
    done = launching.run(*ONE_CORE, launching.mpirun_path(), "-n", "1", *RUN, env=environment)
    assert threads_logged(done) == [1]


def test_ranks_share_the_cores(mpirun: MpiRun, environment: dict[str, str]) -> None:
    assert threads_logged(mpirun(2, *RUN, env=environment)) == [max(1, CORES // 2)] * 2


def test_threads_by_host(mpirun: MpiRun, environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "threads.toml"
    path.write_text(f'"{socket.gethostname()}" = 3\n')
    done = mpirun(2, *RUN, "--threads", "1", "--threads-file", str(path), env=environment)
    assert threads_logged(done) == [3, 3]
    path.write_text('"elsewhere" = 3\n')
    done = mpirun(2, *RUN, "--threads", "1", "--threads-file", str(path), env=environment)
    assert threads_logged(done) == [1, 1]
    path.write_text("one = 0\n")
    done = mpirun(2, *RUN, "--threads-file", str(path), env=environment)
    assert done.code == 2, done.output
    assert done.stderr.count("expected a number of threads") == 1


@pytest.mark.mpi
def test_nobody_spins_where_threads_outnumber_cores(world: World) -> None:
    fits = world.local_size <= CORES
    assert may_spin(world, 1, {}) is fits
    assert may_spin(world, CORES + 1, {}) is False
    assert may_spin(world, 1, {"DIST_MOE_YIELD": "1"}) is False


def test_a_pool_that_does_not_spin_computes_the_same() -> None:
    with Kernels(threads=3, spin=True) as spinning, Kernels(threads=3, spin=False) as sleeping:
        assert spinning.self_test() == sleeping.self_test()
        x_TD = np.random.default_rng(1).standard_normal((64, 4096)).astype(np.float32)
        outs = []
        for kernels in (spinning, sleeping):
            out_TD = np.empty_like(x_TD)
            for _ in range(50):
                kernels.rmsnorm(out_TD, x_TD, np.ones(4096, np.float32), 1e-6)
            outs.append(out_TD.tobytes())
        assert outs[0] == outs[1]
