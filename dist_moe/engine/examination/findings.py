"""What `dist-moe doctor` makes of the ranks' facts: pure, so that every illness can be tried in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_moe.engine.examination.host_facts import HostFacts, StoreFacts
from dist_moe.engine.start.record import show_bytes
from dist_moe.parallel.cores import CoreShare, describe_cores
from dist_moe.parallel.mpi import library_family

Level = Literal["wrong", "note"]
# What the libraries' own shared memory takes of a rank in /dev/shm (MPICH 5.0.2, Open MPI 5.0.11).
_LIBRARY_SHARED_BYTES = {"mpich": 1 << 21, "openmpi": 1 << 24}
_LITTLE_DISK_BYTES = 100e6
_LITTLE_MEMORY_BYTES = 500e6


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing: what, where, and what to do about it."""

    level: Level
    topic: str
    what: str
    fix: str = ""


def findings_of_hosts(ranks: Sequence[HostFacts], shares: Sequence[CoreShare]) -> list[Finding]:
    """Everything that the ranks' facts show, hosts in order of rank.

    Args:
        ranks: Facts by rank.
        shares: What each rank got of its host's cores, by rank.
    """
    found = [*_differences(ranks)]
    for host in dict.fromkeys(facts.host for facts in ranks):
        here = [facts for facts in ranks if facts.host == host]
        found += _mpi(here[0])
        found += _isa(here)
        found += _cores(here, [share for facts, share in zip(ranks, shares, strict=True) if facts.host == host])
        found += shared_memory(here[0], len(here))
        found += _memory_and_disk(here[0])
    return [*found, *_store(ranks)]


def shared_memory(facts: HostFacts, local_ranks: int) -> Iterator[Finding]:
    """Whether /dev/shm holds what MPI wants of it, which else fails at its start; our own memory is not there."""
    if local_ranks < 2:
        return
    needed_bytes = _LIBRARY_SHARED_BYTES.get(library_family(facts.library), 0) * local_ranks
    if facts.shared_free_bytes < needed_bytes:
        yield Finding(
            "wrong",
            "/dev/shm",
            f"{facts.host}: {show_bytes(facts.shared_free_bytes)} of {show_bytes(facts.shared_bytes)} are free, and "
            f"{local_ranks} ranks need {show_bytes(needed_bytes)}",
            "give the container more (docker run --shm-size=1g), or remove what fills it (dist-moe doctor --clean)",
        )


def _differences(ranks: Sequence[HostFacts]) -> Iterator[Finding]:
    """What must be the same on all ranks."""
    fix = "install the same version of dist-moe everywhere"
    questions: list[tuple[str, Callable[[HostFacts], Any], str]] = [
        ("versions", lambda facts: f"dist-moe {facts.package}, numerics {facts.numerics}", fix),
        ("versions", lambda facts: facts.library, "use one MPI library on all hosts"),
        ("self-test", lambda facts: f"{facts.self_test:016x}", f"{fix}, and check that host's memory and CPU"),
    ]
    for topic, ask, remedy in questions:
        answers: dict[Any, list[HostFacts]] = {}
        for facts in ranks:
            answers.setdefault(ask(facts), []).append(facts)
        if len(answers) > 1:
            texts = [f"{answer} on {_places(group)}" for answer, group in answers.items()]
            yield Finding("wrong", topic, f"the ranks differ: {'; '.join(texts)}", remedy)


def _mpi(facts: HostFacts) -> Iterator[Finding]:
    if len(facts.packaged_mpi) > 1:
        yield Finding(
            "wrong",
            "MPI",
            f"{facts.host}: {' and '.join(facts.packaged_mpi)} are installed in one environment, where they overwrite "
            "each other's files: mpirun may start ranks that do not see one another",
            f"make a new environment with one of them, or: pip uninstall {' '.join(facts.packaged_mpi)}, then "
            "pip install 'dist-moe[mpich]'",
        )


def _isa(here: Sequence[HostFacts]) -> Iterator[Finding]:
    facts = here[0]
    if not facts.isa:
        yield Finding(
            "wrong",
            "ISA",
            f"{facts.host}: DIST_MOE_ISA={facts.asked_isa} is not available on this CPU",
            f"unset it (the best level here is {facts.best_isa})",
        )
    elif facts.isa != facts.best_isa:
        yield Finding("note", "ISA", f"{facts.host}: DIST_MOE_ISA forces {facts.isa}; {facts.best_isa} is faster")
    elif facts.best_isa == "portable":
        lacks = "this CPU lacks AVX2, FMA or F16C, or the hypervisor hides them"
        yield Finding("note", "ISA", f"{facts.host}: only the slow portable kernels can run: {lacks}")


def _cores(here: Sequence[HostFacts], shares: Sequence[CoreShare]) -> Iterator[Finding]:
    facts, ranks = here[0], len(here)
    used = frozenset().union(*(share.mask for share in shares))
    threads = sum(share.threads for share in shares)
    usable = len(facts.cpuset) if facts.quota is None else min(len(facts.cpuset), facts.quota)
    widened = [rank.rank for rank, share in zip(here, shares, strict=True) if share.widened_from is not None]
    if widened:
        yield Finding(
            "note",
            "binding",
            f"{facts.host}: the launcher bound {_ranks(widened)} to too few cores; dist-moe uses "
            f"{describe_cores(used)} (--bind keep opts out)",
        )
    if len(used) < usable:
        yield Finding(
            "wrong",
            "binding",
            f"{facts.host}: {_ranks([rank.rank for rank in here])} may use only {describe_cores(used)} of "
            f"{describe_cores(frozenset(facts.cpuset))}: {count(usable - len(used), 'core')} unused",
            "start without taskset, numactl or --bind keep around it, or with mpirun --bind-to none",
        )
    elif threads > usable:
        yield Finding(
            "note",
            "threads",
            f"{facts.host}: {count(ranks, 'rank')} share {count(usable, 'core')}, so that they sleep instead of "
            "spinning while they wait",
            f"{count(usable, 'rank')} on this host would be faster",
        )
    if facts.quota is not None and facts.quota < len(facts.cpuset):
        yield Finding(
            "note",
            "threads",
            f"{facts.host}: the cgroup allows {facts.quota} cores' worth of time on {len(facts.cpuset)} cores",
        )


def _memory_and_disk(facts: HostFacts) -> Iterator[Finding]:
    if 0 < facts.memory_bytes < _LITTLE_MEMORY_BYTES:
        what = f"{facts.host}: only {show_bytes(facts.memory_bytes)} can be taken ({facts.memory_limit})"
        yield Finding("note", "memory", what, "end what uses it, or raise the container's limit")
    if not facts.cache_writable:
        what = f"{facts.host}: the cache directory {facts.cache} cannot be written"
        yield Finding("wrong", "disk", what, "set DIST_MOE_CACHE to a directory of yours")
    elif facts.cache_free_bytes < _LITTLE_DISK_BYTES:
        what = f"{facts.host}: {show_bytes(facts.cache_free_bytes)} are free for the cache directory {facts.cache}"
        yield Finding("wrong", "disk", what, "free some, or set DIST_MOE_CACHE to a directory with room")


def _store(ranks: Sequence[HostFacts]) -> Iterator[Finding]:
    stores = {facts.host: facts.store for facts in ranks if facts.store is not None}
    for host, store in stores.items():
        if store.error:
            yield Finding("wrong", "store", f"{host}: {store.error}")
        for damage in store.damaged:
            fix = "copy the file again, or repeat dist-moe shard"
            yield Finding("wrong", "store", f"{host}: {store.directory}: {damage}", fix)
        yield from _packing(next(facts for facts in ranks if facts.host == host), store)
        memory_bytes = next(facts.memory_bytes for facts in ranks if facts.host == host)
        if 0 < memory_bytes < store.present_bytes:
            yield Finding(
                "note",
                "memory",
                f"{host}: {store.directory} has {show_bytes(store.present_bytes)} here, and "
                f"{show_bytes(memory_bytes)} of memory can be taken: weights will be read from the disk again "
                "and again",
                "use more hosts, or a smaller format (dist-moe shard --quant q4)",
            )
    readable = {host: store for host, store in stores.items() if not store.error}
    for name in dict.fromkeys(name for store in readable.values() for name in store.missing):
        lacking = [host for host, store in readable.items() if name in store.missing]
        holders = [host for host in readable if host not in lacking]
        directory = readable[lacking[0]].directory
        yield Finding(
            "note" if holders and name != "common.safetensors" else "wrong",
            "store",
            f"{directory}/{name} is missing on {', '.join(lacking)}"
            + (f"; {', '.join(holders)} has it" if holders else " and on no host that was examined"),
            f"copy it there{f' from {holders[0]}' if holders else ' from the machine that made the store'}, or repeat "
            "the dist-moe shard command there",
        )


def _packing(facts: HostFacts, model: StoreFacts) -> Iterator[Finding]:
    """Room for the store that the first run makes of a model."""
    if not model.packed_bytes:
        return
    what = (
        f"{facts.host}: {model.directory} is packed into the cache directory {facts.cache} by its first run, which "
        f"takes about {show_bytes(model.packed_bytes)} there; {show_bytes(facts.cache_free_bytes)} are free"
    )
    short = facts.cache_free_bytes < model.packed_bytes
    fix = "free some, set DIST_MOE_CACHE to a directory with room, or pack it elsewhere with dist-moe shard"
    yield Finding("wrong" if short else "note", "disk", what, fix if short else "")


def _places(group: Iterable[HostFacts]) -> str:
    group = list(group)
    hosts = ", ".join(dict.fromkeys(facts.host for facts in group))
    return f"{hosts} ({_ranks([facts.rank for facts in group])})"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 rank", "2 ranks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
