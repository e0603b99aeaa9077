"""Which file and unit an address belongs to, and what a SIGBUS says."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_moe.kernels import MappedFile, MappedTensor, address_of, describe_address

PROGRAM = """
import mmap, os, sys
import numpy as np
from dist_moe.kernels import *
path, size = sys.argv[1], 8 * mmap.PAGESIZE
with open(path, "w+b") as file:
    file.truncate(size)
    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
data = np.frombuffer(mapped, np.uint8)
units = np.array([3, 8, 9, 14], np.int64)
known = MappedFile(path, address_of(data), size, [MappedTensor(address_of(data), size, "expert %, chunk %", units, 5)])
{body}
"""
TOUCH = "os.truncate(path, 2 * mmap.PAGESIZE)\ndata[5 * mmap.PAGESIZE]"


def run(body: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(body=body), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def data() -> np.ndarray:
    return np.zeros(1000, np.uint8)


def test_units_are_named_by_their_numbers(data: np.ndarray) -> None:
    at = address_of(data)
    chunks = MappedTensor(at + 100, 400, "expert %, chunk %", np.array([3, 8, 9, 14], np.int64), 5)
    heads = MappedTensor(at + 500, 300, "query head %", np.array([7, 12345678901, 0], np.int64))
    whole = MappedTensor(at + 800, 100, "tensor 'a'", np.zeros(0, np.int64))
    known = MappedFile("/a/b.file", at, 1000, [chunks, heads, whole])
    places = {100: "expert 0, chunk 3", 199: "expert 0, chunk 3", 200: "expert 1, chunk 3", 499: "expert 2, chunk 4"}
    places |= {500: "query head 7", 600: "query head 12345678901", 799: "query head 0", 800: "tensor 'a'"}
    for offset, name in places.items():
        assert describe_address(at + offset) == f"/a/b.file: {name}"
    for offset in (0, 99, 900, 999):
        assert describe_address(at + offset) == "/a/b.file"
    assert describe_address(at - 1) is None
    assert describe_address(at + 1000) is None
    known.remove()
    assert describe_address(at + 100) is None
    known.remove()


def test_files_can_be_removed_in_any_order(data: np.ndarray) -> None:
    at = address_of(data)
    files = [MappedFile(f"file {i}", at + 100 * i, 100, []) for i in range(5)]
    for i in (2, 4, 0, 3, 1):
        assert describe_address(at + 100 * i) == f"file {i}"
        files[i].remove()
        assert describe_address(at + 100 * i) is None


def test_a_file_that_shrinks_is_named_with_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    done = run(f"catch_bus_errors('rank 1: ', 0.0, 2)\n{TOUCH}", path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"rank 1: {path}: expert 1, chunk 4 can no longer be read: the file became shorter")
    assert done.stderr.count("\n") == 1


def test_it_is_named_from_many_threads_once(tmp_path: Path) -> None:
    body = "import threading\ncatch_bus_errors('', 0.0, 2)\nos.truncate(path, 0)\n"
    body += "for _ in range(4): threading.Thread(target=lambda: hash_floats(data.view(np.float32))).start()"
    done = run(body, tmp_path / "shard")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_fault_elsewhere_ends_the_process_as_before(tmp_path: Path) -> None:
    done = run(f"catch_bus_errors('', 0.0, 2)\nknown.remove()\n{TOUCH}", tmp_path / "shard")
    assert done.returncode == -signal.SIGBUS
    assert done.stderr == ""


def test_a_signal_that_was_sent_ends_the_process_as_before(tmp_path: Path) -> None:
    body = "import signal, time\ncatch_bus_errors('', 0.0, 2)\nos.kill(os.getpid(), signal.SIGBUS)\ntime.sleep(9)"
    done = run(body, tmp_path / "shard")
    assert done.returncode == -signal.SIGBUS


def test_the_longest_path_fits_into_the_line(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 15)
    deep.mkdir(parents=True)
    done = run(f"catch_bus_errors('', 0.0, 2)\n{TOUCH}", deep / "shard")
    assert done.returncode == 2
    assert f"{deep / 'shard'}: expert 1, chunk 4 can no longer be read" in done.stderr


STARVED = """
import resource
import numpy as np
from dist_moe.kernels import Kernels, catch_bus_errors
{before}
kernels, experts = Kernels(1), 1 << 24
ids_TK, weights_TK = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
logits_TE, fault_T = np.zeros((1, experts), np.float32), np.full(1, 2**31 - 1, np.int32)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20),) * 2)
kernels.route(ids_TK, weights_TK, fault_T, logits_TE, False, 0)
"""


@pytest.mark.parametrize("before", ["", "catch_bus_errors('dist-moe: error: rank 1 on b: ', 0.0, 2)"])
def test_a_kernel_that_gets_no_memory_says_so(before: str) -> None:
    command = [sys.executable, "-c", STARVED.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"dist-moe: error: {'rank 1 on b: ' if before else ''}out of memory: a kernel could ")
    assert " could not get 100663360 bytes of working space; " in done.stderr
    assert done.stderr.count("\n") == 1


CRASH = """
import ctypes, os, sys, threading, time
from dist_moe.kernels import linger_after_crash
if sys.argv[1] != "at once":
    linger_after_crash(1.0)
threading.Thread(target=lambda: (time.sleep(0.3), os.write(1, b"spoke")), daemon=True).start()
if sys.argv[1] == "sent":
    os.kill(os.getpid(), 11)
ctypes.CDLL(None).strlen(None)
"""


@pytest.mark.parametrize(("how", "said"), [("at once", b""), ("linger", b"spoke"), ("sent", b"")])
def test_a_crash_gives_other_threads_time_to_speak(how: str, said: bytes) -> None:
    # CDLL lets go of the interpreter while it calls, as mpi4py does.
    done = subprocess.run([sys.executable, "-c", CRASH, how], capture_output=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout == said
