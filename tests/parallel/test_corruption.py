"""Silent corruption under mpirun: what is flipped or cut is named, all ranks end, with the documented code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.demo import demo_model_directory
from dist_moe.kernels import WeightFormat
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers import corrupted_job
from helpers.launching import Finished

MpiRun = Callable[..., Finished]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The demo on two shards, to be damaged."""
    directory = tmp_path / "store"
    convert(
        Checkpoint.open(demo_model_directory()),
        directory,
        StoreOptions(format=WeightFormat.Q8, nodes=2),
        lambda done, total, what: None,
    )
    return directory


@pytest.fixture
def job(mpirun: MpiRun, store: Path) -> Callable[..., Finished]:
    """job(ranks, accident, rank, *arguments): a run of the store with an accident on one rank."""

    def run(ranks: int, accident: str, rank: int, *arguments: str) -> Finished:
        program = (sys.executable, corrupted_job.__file__, accident, str(rank))
        options = ("-m", str(store), "-p", "Once", "--quiet", "--temperature", "0", "--ignore-eos")
        return mpirun(ranks, *program, "run", *options, *arguments, env={"DIST_MOE_THREADS": "1"})

    return run


def own_lines(done: Finished) -> list[str]:
    """The lines that are ours: launchers add their own."""
    return [line for line in done.stderr.splitlines() if line.startswith("dist-moe: ")]


@pytest.mark.parametrize(("ranks", "odd"), [(3, 0), (3, 2), (4, 1)])
def test_a_flipped_bit_of_one_ranks_residual_is_named(job: Callable[..., Finished], ranks: int, odd: int) -> None:
    done = job(ranks, "residual=70", odd, "-n", "200")
    assert done.code == 3, done.output
    (line,) = own_lines(done)
    assert re.search(
        rf"error: rank {odd} \(\S+\) holds other numbers than the other ranks: .* of steps 65 to 128", line
    )


def test_two_ranks_cannot_know_which_one_is_wrong(job: Callable[..., Finished]) -> None:
    done = job(2, "residual=3", 0, "-n", "100")
    assert done.code == 3, done.output
    (line,) = own_lines(done)
    assert re.search(
        r"error: rank 1 .* than rank 0 \(without a majority, rank 0 itself may be wrong\): .* of steps 1 to 64", line
    )


def test_a_flip_in_the_last_steps_is_found_at_the_end_of_the_text(job: Callable[..., Finished]) -> None:
    done = job(3, "residual=5", 1, "-n", "8")
    assert done.code == 3, done.output
    (line,) = own_lines(done)
    assert re.search(r"rank 1 .* of steps 1 to 8 ", line)


def test_ranks_that_use_mpi_alone_compare_too(mpirun: MpiRun, store: Path) -> None:
    command = (
        sys.executable,
        corrupted_job.__file__,
        "residual=2",
        "2",
        "run",
        "-m",
        str(store),
        "-p",
        "Once",
        "-n",
        "9",
    )
    done = mpirun(3, *command, env={"DIST_MOE_THREADS": "1", "DIST_MOE_SHARED_MEMORY": "0"})
    assert done.code == 3, done.output
    assert "rank 2 " in own_lines(done)[0]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_flipped_byte_of_a_mapped_weight_is_named_by_the_scrub(
    job: Callable[..., Finished], store: Path, ranks: int
) -> None:
    sealed = Store.open(store).sealed_unit("chunk", 1, 5)
    at = sealed.path.read_bytes().index(sealed.data.tobytes()) + 77
    done = job(ranks, f"flip={sealed.path}@{at}", 0, "-n", "5", "--scrub")
    assert done.code == 2, done.output
    (line,) = own_lines(done)
    assert f"{sealed.path}: tensor 'layers.1.chunks', {sealed.unit} is damaged: its bytes have checksum" in line
    assert ranks == 1 or re.search(r"error: rank \d on \S+, re-checking mapped weights: ", line)


def test_without_an_accident_the_scrub_says_nothing(job: Callable[..., Finished]) -> None:
    done = job(3, "none", 0, "-n", "70", "--scrub")
    assert (done.code, own_lines(done)) == (0, []), done.output


@pytest.mark.parametrize(("ranks", "threads"), [(1, 1), (1, 2), (3, 1)])
def test_a_shard_that_shrinks_while_it_is_mapped_is_named(
    job: Callable[..., Finished], store: Path, ranks: int, threads: int
) -> None:
    path = store / "shard-00001-of-00002.safetensors"
    done = job(ranks, f"cut={path}@{path.stat().st_size // 2}", 0, "-n", "50", "--threads", str(threads))
    assert done.code == 2, done.output
    (line,) = own_lines(done)
    place = r"rank \d on \S+: " if ranks > 1 else ""
    unit = r"(layer \d+, (query|KV) head \d+|layer \d+, expert \d+, chunk \d+|vocabulary block \d+)"
    pattern = rf"dist-moe: error: {place}{re.escape(str(path))}: {unit} can no longer be read: the file became shorter"
    assert re.match(pattern, line), line
