"""Whole jobs whose ranks do not fit, or whose hosts lack room: one table or line, the code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dist_moe
from dist_moe.checkpoint.reader import Checkpoint
from helpers import launching
from helpers.tiny_model import TinyModel
from helpers.tiny_store import run_convert

MpiRun = Callable[..., launching.Finished]
PROGRAM = (sys.executable, "-m", "dist_moe")
RANK = "${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}"
MUST_END_WITHIN_S = 30

# Runs the command line with one thing changed on one rank.
CHANGED = """
import os, sys
from dist_moe.cli.main import main
from dist_moe.parallel.launcher import detect_launcher
if detect_launcher(os.environ).rank == {rank}:
{change}
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIST_MOE_THREADS", "1")


@pytest.fixture
def nothing_is_left() -> object:
    """No file of ours in /dev/shm after the test that was not there before."""
    before = set(Path("/dev/shm").glob("dist-moe*"))
    yield
    assert set(Path("/dev/shm").glob("dist-moe*")) <= before


pytestmark = pytest.mark.usefixtures("nothing_is_left")


def own_lines(done: launching.Finished) -> list[str]:
    """What we printed, without the prefix that every line has."""
    prefix = "dist-moe: error: "
    return [line.removeprefix(prefix) for line in done.stderr.splitlines() if line.startswith(prefix)]


def on_rank(rank: int, script: str, *command: str) -> tuple[str, ...]:
    """A command before which one rank runs a line of shell."""
    return "sh", "-c", f'if [ {RANK} = {rank} ]; then {script}; fi; exec "$@"', "sh", *command


def changed(directory: Path, rank: int, change: str) -> tuple[str, str]:
    """The command line with some Python run first on one rank."""
    path = directory / "changed.py"
    path.write_text(CHANGED.format(rank=rank, change="\n".join("    " + line for line in change.splitlines())))
    return sys.executable, str(path)


def make_store(directory: Path, seed: int = 1) -> Path:
    run_convert(Checkpoint.open(TinyModel(seed=seed).write(directory / "source")), directory / "store")
    return directory / "store"


def expect_table(done: launching.Finished, rank: int, *words: str) -> None:
    assert done.code == 3, done.output
    assert done.seconds < MUST_END_WITHIN_S
    sentence, _, *rows = own_lines(done)
    assert sentence.startswith(f"rank {rank} on "), done.output
    assert "differs from the other ranks in " in sentence
    (odd,) = [row for row in rows if row.endswith("<- differs")]
    for word in words:
        assert word in odd, done.output
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("odd", [0, 2])
def test_another_version_of_the_package_on_a_rank(mpirun: MpiRun, tmp_path: Path, odd: int) -> None:
    other = tmp_path / "other" / "dist_moe"
    shutil.copytree(Path(dist_moe.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "__init__.py").write_text('"""Another version."""\n__version__ = "99.0"\n')
    # What the ranks say after the versions may be anything in another version.
    job = other / "cli" / "job.py"
    text = job.read_text()
    first_words = "    options = fields_of_leader(world, options, _OWN_OPTIONS)\n"
    assert text.count(first_words) == 1
    job.write_text(text.replace(first_words, "    world.barrier()\n"))
    script = f'PYTHONPATH="{other.parent}:$PYTHONPATH"; export PYTHONPATH'
    done = mpirun(3, *on_rank(odd, script, *PROGRAM, "run", "-p", "Once"), cwd=tmp_path)
    expect_table(done, odd, "99.0")
    assert "install the same version" in own_lines(done)[0]


@pytest.mark.parametrize("odd", [0, 2])
def test_another_store_on_a_rank(mpirun: MpiRun, tmp_path: Path, odd: int) -> None:
    make_store(tmp_path / "here")
    make_store(tmp_path / "there", seed=2)
    command = (*PROGRAM, "run", "-m", "store", "--prompt-ids", "1,2", "-n", "2")
    done = mpirun(3, *on_rank(odd, f"cd {tmp_path / 'there'}", *command), cwd=tmp_path / "here")
    expect_table(done, odd, str(tmp_path / "there" / "store"))
    assert done.stdout == ""


def test_a_store_that_is_missing_on_a_rank(mpirun: MpiRun, tmp_path: Path) -> None:
    make_store(tmp_path / "here")
    (tmp_path / "there").mkdir()
    command = (*PROGRAM, "run", "-m", "store", "--prompt-ids", "1,2")
    done = mpirun(3, *on_rank(1, f"cd {tmp_path / 'there'}", *command), cwd=tmp_path / "here")
    assert done.code == 2, done.output
    (line,) = own_lines(done)
    assert line.startswith("rank 1 on ")
    assert "does not exist" in line


def test_the_kernels_of_a_rank_compute_other_bits(mpirun: MpiRun, tmp_path: Path) -> None:
    program = changed(tmp_path, 1, "from dist_moe.kernels import Kernels\nKernels.self_test = lambda self: 0xBAD")
    expect_table(mpirun(3, *program, "run", "-p", "Once", "-n", "2"), 1, "0000000000000bad")


def test_ranks_of_other_instruction_sets_and_paths_fit(mpirun: MpiRun, tmp_path: Path) -> None:
    make_store(tmp_path / "here")
    shutil.copytree(tmp_path / "here" / "store", tmp_path / "there" / "store")
    script = f"cd {tmp_path / 'there'}; export DIST_MOE_ISA=portable DIST_MOE_THREADS=2"
    command = (*PROGRAM, "run", "-m", "store", "--prompt-ids", "1,2", "-n", "2", "--check", "full", "-v", "--quiet")
    done = mpirun(2, *on_rank(1, script, *command), cwd=tmp_path / "here")
    assert done.code == 0, done.output
    reported = [line.split(" INFO ")[1] for line in done.stderr.splitlines() if "[rank 0 on " in line]
    (row,) = [line for line in reported if line.startswith("1 ")]
    assert row.split()[2:4] == ["portable", "2"]
    assert row.endswith(str(tmp_path / "there" / "store"))
    assert "KV cache 0.0 MB for 4 positions in f16" in done.stderr
    assert done.stderr.count(" INFO verified ") == 2


def test_memory_is_checked_before_the_run(mpirun: MpiRun, tmp_path: Path) -> None:
    source = TinyModel().write(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**31 - 1}))
    run_convert(Checkpoint.open(source), tmp_path / "store")
    command = ("run", "-m", str(tmp_path / "store"), "--prompt-ids", "1,2", "--ctx", str(2**31 - 1), "--kv", "f32")
    done = mpirun(3, *PROGRAM, *command)
    assert done.code == 2, done.output
    (line,) = own_lines(done)
    assert "for 2147483647 positions in f32" in line
    assert "not enough: lower --ctx" in line
    assert done.stdout == ""


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_runs_out_of_memory_ends_all(mpirun: MpiRun, tmp_path: Path, rank: int) -> None:
    program = changed(
        tmp_path,
        rank,
        "import numpy\nfrom dist_moe.engine.steps.worker import Worker\n"
        "Worker.run = lambda *_: numpy.empty(1 << 60, numpy.uint8)",
    )
    done = mpirun(3, *program, "run", "-p", "Once", "-n", "4")
    assert done.code == 2, done.output
    assert done.seconds < MUST_END_WITHIN_S
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dist-moe: ")]
    assert f"error on rank {rank} (" in line
    assert "out of memory (Unable to allocate 1.00 EiB" in line
    assert "Traceback" not in done.stderr


# ---- full disks ----


@pytest.fixture
def full_disk(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A directory, and the words before a command that make it a disk of 300 KB for that command alone."""
    small = tmp_path / "small"
    small.mkdir()
    users = () if os.getuid() == 0 else ("--map-root-user",)
    words = ("unshare", *users, "--mount", "sh", "-c", f'mount -t tmpfs -o size=300k none {small} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets a test mount nothing")
    return small, words


def test_a_cache_on_a_full_disk(full_disk: tuple[Path, tuple[str, ...]]) -> None:
    small, words = full_disk
    command = (launching.mpirun_path(), "-n", "3", *PROGRAM, "run", "-p", "Once")
    done = launching.run(*words, *command, env={"DIST_MOE_CACHE": str(small)})
    assert done.code == 2, done.output
    (line,) = own_lines(done)
    assert line.startswith("rank 0 on ")
    assert "packing the model: " in line
    assert "the disk is too full" in line


def test_logits_on_a_full_disk(full_disk: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    small, words = full_disk
    mpirun = (launching.mpirun_path(), "-n", "3")
    listing = f'"$@"; code=$?; ls -A {small}; exit $code'
    rest = ("run", "-p", "Once", "-n", "400", "--ignore-eos", "--quiet", "--logits", str(small / "x.npy"))
    done = launching.run(*words, "sh", "-c", listing, "sh", *mpirun, *PROGRAM, *rest)
    assert done.code == 2, done.output
    (line,) = own_lines(done)
    assert f"{small / 'x.npy'}: cannot be written (No space left on device)" in line
    assert "x.npy" not in done.stdout


def test_rows_that_a_step_cannot_write_end_all_ranks_after_it(
    full_disk: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    small, words = full_disk
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. " * 30)
    rest = ("perplexity", str(tmp_path / "text.txt"), "--kl-base", str(small / "base.npz"))
    done = launching.run(*words, launching.mpirun_path(), "-n", "2", *PROGRAM, *rest)
    assert done.code == 2, done.output
    assert own_lines(done) == [
        f"{small / 'base.npz'}: cannot be written (No space left on device): make room or choose another place"
    ]
    assert "Abort" not in done.output


def test_a_full_stdout_is_one_line(tmp_path: Path) -> None:
    done = launching.run("sh", "-c", 'exec "$@" > /dev/full', "sh", *PROGRAM, "run", "-p", "Once", "-n", "3")
    assert done.code == 2, done.output
    assert own_lines(done) == ["standard output cannot be written (No space left on device): send it elsewhere"], (
        done.output
    )


def test_a_rank_whose_disk_is_full_ends_all(mpirun: MpiRun, tmp_path: Path) -> None:
    program = changed(
        tmp_path,
        2,
        "import errno\nfrom dist_moe.engine.steps.worker import Worker\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device', '/scratch')\n"
        "Worker.run = full",
    )
    done = mpirun(3, *program, "run", "-p", "Once", "-n", "4")
    assert done.code == 2, done.output
    assert "error on rank 2 (" in done.stderr
    assert "/scratch: No space left on device" in done.stderr
