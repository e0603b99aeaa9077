"""Examine all hosts of a job, or this one alone: what is wrong, and the fix."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_moe.engine.examination.findings import Finding, findings_of_hosts, shared_memory
from dist_moe.engine.examination.host_facts import HostFacts, StoreFacts, collect_facts
from dist_moe.engine.examination.leftovers import Leftovers, find_leftovers, remove_files
from dist_moe.engine.start.startup import open_exchange
from dist_moe.errors import EnvironmentMismatch
from dist_moe.parallel.cores import CoreShare, may_spin, share_cores
from dist_moe.parallel.cpu_limits import expected_threads
from dist_moe.parallel.hostfile import Hostfile
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.launching import family_of
from dist_moe.parallel.mpi import library_family
from dist_moe.parallel.node_exchange import NodeExchange
from dist_moe.parallel.world import World

_SSH_PORT = 22
_ANSWER_S = 2.0
_TITLES = {"mpich": "MPICH", "openmpi": "Open MPI"}


@dataclass(frozen=True)
class Report:
    """What was seen: the ranks, what each got of its host's cores, leftovers by host, and the findings."""

    launcher: Launcher
    ranks: tuple[HostFacts, ...]
    shares: tuple[CoreShare, ...]
    leftovers: dict[str, Leftovers]
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """3 if anything is wrong, else 0."""
        wrong = any(finding.level == "wrong" for finding in self.findings)
        return EnvironmentMismatch.exit_code if wrong else 0

    def as_json(self) -> dict[str, Any]:
        """As one JSON object."""
        threads = [{"threads": share.threads, "cores": sorted(share.mask)} for share in self.shares]
        return {
            "ok": self.exit_code == 0,
            "launcher": asdict(self.launcher),
            "ranks": [asdict(facts) | more for facts, more in zip(self.ranks, threads, strict=True)],
            "leftovers": {host: asdict(found) for host, found in self.leftovers.items()},
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(
    launcher: Launcher, cache: Path, store: StoreFacts | None, hostfile: Hostfile | None, clean: bool
) -> Report:
    """Look at every rank's machine; collective. The report is whole on rank 0, its exit code right on all ranks.

    Args:
        launcher: Who started this process.
        cache: Where packed models are kept.
        store: What is to run, as this host has it, or None.
        hostfile: The hosts that are to run it, or None.
        clean: Remove the files that killed jobs left.

    Raises:
        EnvironmentMismatch: On a rank other than the first, where MPI cannot start on its host.
    """
    facts = collect_facts(launcher, cache, store)
    early = [*shared_memory(facts, launcher.local_size)]
    try:
        if early:
            raise EnvironmentMismatch(f"{early[0].what}: {early[0].fix}")
        world = World.start(launcher, expected_threads(launcher))
    except EnvironmentMismatch as error:
        if not launcher.is_first:
            raise
        findings = early or [Finding("wrong", "MPI", str(error))]
        return Report(launcher, (facts,), (CoreShare(frozenset(facts.own), 1),), {}, tuple(findings))
    share = share_cores(world, launcher)
    leftovers = _leftovers(world, clean)
    ranks = [HostFacts.decode(text) for text in world.gather_texts(facts.encode())]
    own = json.dumps([sorted(share.mask), share.threads, share.widened_from and sorted(share.widened_from)])
    shares = [_share(*json.loads(text)) for text in world.gather_texts(own)]
    findings = [*_exchange(world, share), *findings_of_hosts(ranks, shares), *_of_leftovers(leftovers, clean)]
    if world.is_leader:
        findings += _of_ranks(world, launcher, facts)
        findings += [] if hostfile is None else of_hostfile(hostfile, facts.library, world.hosts, launcher)
    findings = [Finding(**entry) for entry in json.loads(world.gather_texts(json.dumps([*map(asdict, findings)]))[0])]
    return Report(launcher, tuple(ranks), tuple(shares), leftovers, tuple(findings))


def of_hostfile(hostfile: Hostfile, library: str, hosts: Sequence[str], launcher: Launcher) -> Iterator[Finding]:
    """A host file against the library, the name service, and the hosts on which ranks run."""
    family, path = library_family(library), hostfile.path
    if hostfile.dialect and family and hostfile.dialect != family:
        right = "node1 slots=4" if family == "openmpi" else "node1:4"
        what = f"{path} is written for {_TITLES[hostfile.dialect]}, but the library here is {library}"
        yield Finding("wrong", "hostfile", what, f"write its lines as {right}")
    for entry in hostfile.entries:
        yield from _reach(path, entry.host, hosts)
    command = f"{hostfile.command(family)} dist-moe doctor"
    if launcher.name == "none":
        what = f"{path}: only this host was looked into; looking into the others takes ranks that run there"
        yield Finding("note", "hostfile", what, f"run: {command}")
        return
    named = {_short(entry.host) for entry in hostfile.entries}
    seen = {_short(host) for host in hosts}
    for host in sorted(named - seen - {"localhost"}):
        yield Finding("wrong", "hostfile", f"{path} names {host}, but no rank runs there", f"start with: {command}")


def _leftovers(world: World, clean: bool) -> dict[str, Leftovers]:
    """By host; collective. The first rank of each host looks, and cleans while the others wait."""
    found = find_leftovers() if world.local_rank == 0 else Leftovers()
    if clean:
        found = Leftovers(**(asdict(remove_files(found)) | {"orphans": found.orphans}))
    texts = world.gather_texts(json.dumps(asdict(found)))
    firsts = [world.node_of_rank.index(node) for node in range(world.nodes)]
    decoded = {world.hosts[rank]: json.loads(texts[rank]) for rank in firsts}
    return {host: Leftovers(tuple(v["files"]), v["file_bytes"], tuple(v["orphans"])) for host, v in decoded.items()}


def _of_leftovers(leftovers: dict[str, Leftovers], cleaned: bool) -> Iterator[Finding]:
    for host, found in leftovers.items():
        if found.files:
            size = f"{len(found.files)} files, {found.file_bytes / 1e6:.1f} MB, in /dev/shm"
            what = f"{host}: removed {size}" if cleaned else f"{host}: killed MPI jobs left {size}"
            yield Finding("note", "leftovers", what, "" if cleaned else "dist-moe doctor --clean removes them")
        if found.orphans:
            numbers = " ".join(map(str, found.orphans))
            yield Finding(
                "wrong", "leftovers", f"{host}: ranks of a job whose launcher died still run", f"kill {numbers}"
            )


def _exchange(world: World, share: CoreShare) -> Iterator[Finding]:
    """Try the shared memory of each host for real; collective."""
    exchange = open_exchange(world, may_spin(world, share.threads, os.environ), {})
    if world.nodes < world.size and not isinstance(exchange, NodeExchange):
        what = "the ranks of a host cannot share memory, and exchange by MPI, which is slower"
        yield Finding("note", "/dev/shm", what, "see the log of dist-moe run -v for the reason")


def _of_ranks(world: World, launcher: Launcher, facts: HostFacts) -> Iterator[Finding]:
    """Ranks seen against ranks started, and the mpirun that would start them."""
    if launcher.name == "none":
        yield from _mpirun(facts)
        yield from shared_memory(facts, 2)
    elif launcher.size not in (0, world.size):
        what = f"the launcher started {launcher.size} ranks, and MPI sees {world.size}"
        yield Finding("wrong", "MPI", what, "start with the mpirun that belongs to the library")


def _mpirun(facts: HostFacts) -> Iterator[Finding]:
    """Whether the mpirun on PATH belongs to the library."""
    path, beside = shutil.which("mpirun"), Path(sys.prefix) / "bin" / "mpirun"
    if path is None:
        fix = f"PATH={beside.parent}:$PATH" if beside.exists() else "install one: pip install 'dist-moe[mpich]'"
        what = f"{facts.host}: there is no mpirun on PATH; dist-moe runs on one rank without it"
        yield Finding("note", "MPI", what, fix)
        return
    theirs = family_of(path)
    ours = library_family(facts.library)
    if theirs and ours and theirs != ours:
        yield Finding(
            "wrong",
            "MPI",
            f"{facts.host}: {path} is {_TITLES[theirs]}'s, but Python's MPI library is {facts.library}: every rank "
            "would see only itself",
            f"put the mpirun of {_TITLES[ours]} first on PATH, or install dist-moe[{theirs}] in a new environment",
        )


def _reach(path: Path, host: str, hosts: Sequence[str]) -> Iterator[Finding]:
    if _short(host) in {"localhost", *map(_short, hosts)}:
        return
    try:
        socket.getaddrinfo(host, _SSH_PORT)
    except OSError:
        what, fix = f"{path}: {host} has no address", "correct the name, or add it to the name service or /etc/hosts"
        yield Finding("wrong", "hostfile", what, fix)
        return
    try:
        socket.create_connection((host, _SSH_PORT), _ANSWER_S).close()
    except OSError as error:
        reason = str(error).partition("] ")[2] or str(error)
        what = f"{path}: {host} does not answer on port {_SSH_PORT} ({reason}), by which mpirun usually starts ranks"
        yield Finding("note", "hostfile", what, "start sshd there, or let the batch system start the ranks")


def _share(mask: list[int], threads: int, widened_from: list[int] | None) -> CoreShare:
    return CoreShare(frozenset(mask), threads, None if widened_from is None else frozenset(widened_from))


def _short(host: str) -> str:
    return host.partition(".")[0]
