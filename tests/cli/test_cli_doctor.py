"""dist-moe doctor for real, on machines that were broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.source import open_source
from dist_moe.demo import demo_model_directory
from dist_moe.kernels import WeightFormat
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from helpers import launching
from helpers.tiny_gguf import WIDE, write_gguf
from helpers.tiny_model import TinyModel

DOCTOR = (sys.executable, "-m", "dist_moe", "doctor")
MpiRun = Callable[..., launching.Finished]
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    beside = str(Path(sys.executable).parent)
    return {"DIST_MOE_CACHE": str(tmp_path / "cache"), "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def alone(environment: dict[str, str]) -> MpiRun:
    def run(*arguments: str, prefix: tuple[str, ...] = (), **more: str) -> launching.Finished:
        return launching.run(*prefix, *DOCTOR, *arguments, env=environment | more)

    return run


def wrong(done: launching.Finished) -> list[str]:
    """The topics of what is wrong, from the JSON, which must agree with the exit code."""
    report = json.loads(done.stdout)
    topics = [finding["topic"] for finding in report["findings"] if finding["level"] == "wrong"]
    assert done.code == (3 if topics else 0), done.output
    assert report["ok"] is (not topics)
    return topics


def test_a_healthy_machine(alone: MpiRun) -> None:
    done = alone()
    assert done.code == 0, done.output
    assert "nothing is wrong" in done.stdout
    assert wrong(alone("--json")) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_report_once(mpirun: MpiRun, environment: dict[str, str], ranks: int) -> None:
    done = mpirun(ranks, *DOCTOR, "--json", env=environment)
    assert wrong(done) == []
    report = json.loads(done.stdout)
    assert [facts["rank"] for facts in report["ranks"]] == list(range(ranks))


@two_cores
def test_one_core_binding_by_the_user_is_wrong(alone: MpiRun) -> None:
    core = str(min(os.sched_getaffinity(0)))
    assert wrong(alone("--json", prefix=("taskset", "-c", core))) == ["binding"]


@two_cores
def test_one_core_binding_by_the_launcher_is_widened(mpirun: MpiRun, environment: dict[str, str]) -> None:
    core = str(min(os.sched_getaffinity(0)))
    done = mpirun(1, "taskset", "-c", core, *DOCTOR, env=environment)
    assert done.code == 0, done.output
    assert "the launcher bound rank 0 to too few cores" in done.stdout


def test_a_library_of_another_mpi_is_named_alone(alone: MpiRun, environment: dict[str, str], tmp_path: Path) -> None:
    says = "HYDRA build details:" if launching.flavour() == "openmpi" else "mpirun (Open MPI) 5.0.11"
    fake = tmp_path / "bin" / "mpirun"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho '{says}'\n")
    fake.chmod(0o755)
    done = alone(PATH=f"{fake.parent}{os.pathsep}{environment['PATH']}")
    assert done.code == 3, done.output
    assert "every rank would see only itself" in done.stdout


def test_a_library_of_another_mpi_is_named_under_its_launcher(alone: MpiRun) -> None:
    other = (
        {"HYDI_CONTROL_FD": "0", "PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
        if launching.flavour() == "openmpi"
        else {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    )
    done = alone(**other)
    assert done.code == 3, done.output
    assert "which sees only itself: start with the mpirun of the same MPI" in done.stdout


def own_shared_memory(size: str, then: str = "true") -> tuple[str, ...]:
    """What to put before a command to give it a /dev/shm of its own, prepared by `then`."""
    shell = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && {then} && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", shell, "sh")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount (root)")
    return prefix


def test_leftovers_are_counted_and_cleaned(environment: dict[str, str]) -> None:
    old = own_shared_memory("64m", "touch -d '1 hour ago' /dev/shm/dist-moe-old /dev/shm/mpich_shm_1_0 /dev/shm/other")
    found = launching.run(*old, *DOCTOR, env=environment)
    assert "killed MPI jobs left 2 files" in found.stdout, found.output
    then = (
        sys.executable,
        "-c",
        "import os, subprocess, sys; subprocess.call(sys.argv[1:]); print(os.listdir('/dev/shm'))",
    )
    for ranks in ((), (launching.mpirun_path(), "-n", "2")):
        cleaned = launching.run(*old, *then, *ranks, *DOCTOR, "--clean", env=environment)
        assert "removed 2 files" in cleaned.stdout, cleaned.output
        assert cleaned.stdout.splitlines()[-1] == "['other']", cleaned.output


def test_little_shared_memory_is_found_before_mpi_starts(environment: dict[str, str]) -> None:
    mount = own_shared_memory("1m")
    done = launching.run(*mount, launching.mpirun_path(), "-n", "2", *DOCTOR, env=environment)
    assert done.code == 3, done.output
    assert "WRONG  /dev/shm" in done.stdout
    assert "--shm-size" in done.stdout


def test_a_missing_shard_is_named(alone: MpiRun, mpirun: MpiRun, environment: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    convert(Checkpoint.open(demo_model_directory()), store, StoreOptions(nodes=2), lambda *_: None)
    assert wrong(alone("--json", "-m", str(store))) == []
    lost = sorted(store.glob("shard-*"))[1]
    lost.unlink()
    assert wrong(alone("--json", "-m", str(store))) == ["store"]
    done = mpirun(2, *DOCTOR, "-m", str(store), env=environment)
    assert done.code == 3, done.output
    assert done.stdout.count(f"{lost} is missing on") == 1
    (store / "manifest.json").unlink()
    assert wrong(alone("--json", "-m", str(store))) == ["store"]


@pytest.mark.parametrize("kind", ["GGUF", "Hugging Face"])
def test_what_a_store_is_packed_from(alone: MpiRun, environment: dict[str, str], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    if kind == "GGUF":
        write_gguf(path)
    else:
        path = TinyModel().write(tmp_path / "hf")
    found = json.loads(alone("--json", "-m", str(path)).stdout)
    (note,) = [finding for finding in found["findings"] if finding["topic"] == "disk"]
    assert note["level"] == "note"
    assert f"{path} is packed into the cache directory" in note["what"]
    convert(open_source(path), tmp_path / "store", StoreOptions(format=WeightFormat.Q4), lambda *_: None)
    weights_bytes = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.safetensors"))
    assert found["ranks"][0]["store"]["packed_bytes"] == weights_bytes
    run = ("-m", "dist_moe", "run", "-m", str(path), "--prompt-ids", "1", "-n", "1")
    done = launching.run(sys.executable, *run, env=environment)
    assert done.code == 0, done.output
    store = json.loads(alone("--json", "-m", str(path)).stdout)["ranks"][0]["store"]
    assert store["packed_bytes"] == 0
    assert store["present_bytes"] >= weights_bytes
    text = alone("-m", str(path)).stdout
    assert f"store     {store['directory']}" in text


def test_a_gguf_file_that_cannot_be_run(alone: MpiRun, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE, matrices="TQ1_0")
    done = alone("--json", "-m", str(tmp_path / "m.gguf"))
    assert wrong(done) == ["store"]
    assert "have a type that dist-moe does not read" in done.stdout


def test_a_bad_isa_and_a_cache_that_cannot_be_written(alone: MpiRun, tmp_path: Path) -> None:
    assert wrong(alone("--json", DIST_MOE_ISA="sse1")) == ["ISA"]
    (tmp_path / "file").touch()
    assert wrong(alone("--json", DIST_MOE_CACHE=str(tmp_path / "file"))) == ["disk"]


def test_a_hostfile(alone: MpiRun, mpirun: MpiRun, environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("localhost\nno-such-host.invalid\n")
    done = alone("--hostfile", str(path))
    assert done.code == 3, done.output
    assert "no-such-host.invalid has no address" in done.stdout
    assert wrong(mpirun(2, *DOCTOR, "--json", "--hostfile", str(path), env=environment)) == ["hostfile"] * 2
    path.write_text("a b c\n")
    assert alone("--hostfile", str(path)).code == 2
