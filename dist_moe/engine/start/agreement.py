"""The start-up agreement: every rank shows one record, and ranks that do not fit end the job with a table."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import dist_moe
from dist_moe.engine.start.available_memory import available_memory, is_in_memory
from dist_moe.engine.start.options import EngineOptions
from dist_moe.engine.start.rank_table import name_hosts, number_runs, rank_table
from dist_moe.engine.start.record import Record, compared, reported
from dist_moe.errors import EnvironmentMismatch
from dist_moe.kernels import Kernels
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store.checksum import checksum_text
from dist_moe.store.manifest import NUMERICS_VERSION, Manifest
from dist_moe.store.reader import Store

# What ranks say to each other: to be raised when an order, a step, an exchange or a record changes.
PROTOCOL_VERSION = 3

AnyRecord = TypeVar("AnyRecord", bound=Record)
logger = logging.getLogger(__name__)

_SAME_PACKAGE = "install the same version of dist-moe on every host"
_SAME_STORE = "give every host the same store (copy it again, manifest.json included)"
_SAME_BITS = (
    "the kernels' self-test gives other bits there: install the same version of dist-moe everywhere, and check that "
    "host's memory and CPU"
)
_SAME_OPTIONS = "start every rank with the same options"


@dataclass(frozen=True)
class Versions(Record):
    """What ranks compare before anything else. Its layout never changes, so that all versions can read it."""

    protocol: int = compared("protocol", 0, _SAME_PACKAGE)
    package: str = compared("package", 32, _SAME_PACKAGE)
    numerics: int = compared("numerics", 0, _SAME_PACKAGE)


@dataclass(frozen=True)
class StartRecord(Versions):
    """What ranks compare and report when each has opened its store, before any weight is read."""

    manifest: str = compared("manifest", 16, _SAME_STORE, ("directory",))
    known_answers: str = compared("known answers", 16, _SAME_BITS, ("isa",))
    kv: str = compared("KV", 8, _SAME_OPTIONS)
    context: int = compared("context", 0, _SAME_OPTIONS)
    resident: int = compared("resident positions", 0, _SAME_OPTIONS)
    prefill_chunk: int = compared("prefill chunk", 0, _SAME_OPTIONS)
    experts: str = compared("experts", 16, _SAME_OPTIONS)
    exchange: str = compared("exchange", 16, _SAME_OPTIONS)
    wire: str = compared("wire", 8, _SAME_OPTIONS)
    check: str = compared("check", 8, _SAME_OPTIONS)
    scrub: str = compared("scrub", 8, _SAME_OPTIONS)
    weights: str = compared("weights", 8, _SAME_OPTIONS)
    isa: str = reported("ISA", 16)
    threads: int = reported("threads")
    available_bytes: int = reported("memory")  # 0: not known
    memory_limit: str = reported("limited by", 32)
    medium: str = reported("store on", 8)  # "memory": mapping it takes no more
    library: str = reported("MPI", 64)
    directory: str = reported("store", 192)


def own_versions() -> Versions:
    """This rank's versions."""
    return Versions(PROTOCOL_VERSION, dist_moe.__version__, NUMERICS_VERSION)


def own_record(store: Store, kernels: Kernels, library: str, options: EngineOptions) -> StartRecord:
    """This rank's record.

    Args:
        store: The open store.
        kernels: What will compute; its self-test runs here (1 ms).
        library: The MPI library.
        options: How this rank would run.
    """
    memory = available_memory()
    versions = own_versions()
    return StartRecord(
        protocol=versions.protocol,
        package=versions.package,
        numerics=versions.numerics,
        manifest=weights_checksum(store.manifest),
        known_answers=f"{kernels.self_test():016x}",
        kv=options.kv.label,
        context=options.context,
        resident=options.resident_positions,
        prefill_chunk=options.prefill_chunk,
        experts=options.experts,
        exchange=options.exchange,
        wire=options.wire,
        check=options.check,
        scrub="on" if options.scrub else "off",
        weights="copy" if options.copy_weights else "mapped",
        isa=kernels.isa,
        threads=kernels.threads,
        available_bytes=memory.available_bytes,
        memory_limit=memory.limited_by,
        medium="memory" if is_in_memory(store.directory) else "disk",
        library=library,
        directory=str(store.directory.absolute()),
    )


def weights_checksum(manifest: Manifest) -> str:
    """A checksum of what a manifest says; not of who wrote it: other versions pack the same bytes."""
    return checksum_text(replace(manifest, package_version="").render().encode())


def agree_on_versions(world: World) -> None:
    """The first words between ranks, before any that another version of this package might say differently.

    Collective.

    Raises:
        AgreedError: A rank runs another version.
    """
    agree_on(world, own_versions())


def agree_on(world: World, own: AnyRecord) -> list[AnyRecord]:
    """Compare the ranks' records; collective, one exchange.

    Args:
        world: All ranks.
        own: This rank's record; all are of one class.

    Returns:
        Every rank's record, by rank, on every rank.

    Raises:
        AgreedError: Ranks differ in a field that is compared; a table names the odd ones.
    """
    records = [own.decode(data) for data in world.gather_equal_bytes(own.encode())]
    differences = find_differences(records)
    if differences:
        lines = describe_differences(records, world.hosts, differences)
        raise AgreedError(tuple(lines), EnvironmentMismatch.exit_code)
    return records


def log_records(records: Sequence[Record], hosts: Sequence[str]) -> None:
    """Log what the ranks reported, on rank 0."""
    names = [name for name, fact in records[0].facts().items() if not fact.remedy]
    for line in rank_table(records, hosts, names):
        logger.info("%s", line)


def find_differences(records: Sequence[Record]) -> dict[str, list[int]]:
    """The ranks that differ from most others, by field; of equally frequent values the lowest rank's is usual."""
    differences: dict[str, list[int]] = {}
    for name, fact in records[0].facts().items():
        values = [getattr(record, name) for record in records]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if fact.remedy and odd:
            differences[name] = odd
    return differences


def describe_differences(
    records: Sequence[Record], hosts: Sequence[str], differences: dict[str, list[int]]
) -> list[str]:
    """One sentence and a table for what `find_differences` found."""
    facts = records[0].facts()
    odd = sorted({rank for ranks in differences.values() for rank in ranks})
    titles = ", ".join(facts[name].title for name in differences)
    remedies = dict.fromkeys(facts[name].remedy for name in differences)
    who = f"rank{'s' if len(odd) > 1 else ''} {number_runs(odd)} on {name_hosts(hosts[rank] for rank in odd)}"
    verb = "differ" if len(odd) > 1 else "differs"
    sentence = f"{who} {verb} from the other ranks in {titles}: {'; '.join(remedies)}"
    columns = dict.fromkeys([*differences, *(beside for name in differences for beside in facts[name].beside)])
    return [sentence, *rank_table(records, hosts, list(columns), odd)]
