"""Full disks and other processes: one clear sentence, and the next run goes on."""

from __future__ import annotations

import dataclasses
import errno
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError
from dist_moe.kernels import Kernels
from dist_moe.store import convert as conversion
from dist_moe.store import writer
from dist_moe.store.lock import store_lock
from dist_moe.store.manifest import Manifest
from dist_moe.store.pack import Packer
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.team import Team
from helpers.tiny_store import contents, ignore, run_convert

MakeStore = Callable[..., Path]


@pytest.mark.parametrize("limit", [0, 100, 2_000, 30_000, 60_000])
def test_a_full_disk_is_named_and_leaves_an_incomplete_store(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    class SmallDisk:
        left = limit

    real = writer.FileWriter._sync

    def sync(self: writer.FileWriter) -> None:
        SmallDisk.left -= self.position
        if SmallDisk.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(writer.FileWriter, "_sync", sync)
        with pytest.raises(StoreError, match=r"cannot be written \(No space left on device\)"):
            run_convert(checkpoint, tmp_path / "store", nodes=2)
    assert not list((tmp_path / "store").glob(".*.partial"))
    with pytest.raises(StoreError, match=r"incomplete|not a store"):
        Store.open(tmp_path / "store")
    run_convert(checkpoint, tmp_path / "store", nodes=2)
    assert contents(tmp_path / "store") == contents(make_store("fresh", nodes=2))


def test_a_limit_on_file_sizes_is_named(tmp_path: Path, checkpoint: Checkpoint) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreError, match=r"common.safetensors: cannot be written \(File too large\)"):
            run_convert(checkpoint, tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run_convert(checkpoint, tmp_path / "store")


def test_a_disk_that_is_known_to_be_too_full_is_refused_at_once(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StoreError, match=r"the disk is too full: \d+ bytes needed, 1000 free"):
        run_convert(checkpoint, tmp_path / "store")


def test_a_store_that_another_process_is_writing_is_left_to_it(tmp_path: Path, checkpoint: Checkpoint) -> None:
    directory = tmp_path / "store"
    directory.mkdir()
    hold = (
        "import sys; from pathlib import Path; from dist_moe.store.lock import store_lock\n"
        "with store_lock(Path(sys.argv[1]), None): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="another process is writing this store"):
            run_convert(checkpoint, directory)
        other.kill()  # the system releases the lock of a dead process
        other.wait()
    run_convert(checkpoint, directory)
    assert not (directory / ".lock").exists()


def test_a_waiting_conversion_reports_and_finds_the_work_done(tmp_path: Path, checkpoint: Checkpoint) -> None:
    directory = tmp_path / "store"
    directory.mkdir()
    seen: list[str] = []
    waiting, results = threading.Event(), []

    def report(done_bytes: int, total_bytes: int, what: str) -> None:
        assert 0 <= done_bytes <= total_bytes
        seen.append(what)
        waiting.set()

    def wait_for_it() -> None:
        results.append(conversion.convert(checkpoint, directory, StoreOptions(threads=1, wait=True), report))

    with store_lock(directory, None):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        assert waiting.wait(10)
        plan = conversion.plan_store(checkpoint, StoreOptions(threads=1))

        def make_packer(plan: Manifest, kernels: Kernels) -> Packer:
            return Packer(checkpoint, plan, kernels)

        origin = conversion.Origin(checkpoint.path, make_packer)
        run = conversion._Run(origin, directory, StoreOptions(threads=1), plan, ignore, 10**6, Team())
        run.write(checkpoint.text_files(), ())
        finished = (directory / "manifest.json").stat()
    thread.join(10)
    assert (directory / "manifest.json").stat().st_mtime_ns == finished.st_mtime_ns
    assert set(seen) == {"waiting for another process that writes this store"}
    assert results[0].written_files == ()
    assert dataclasses.replace(results[0].manifest, files=()).recipe() == plan.recipe()
