"""dist-moe doctor: what is wrong with this machine, or with all hosts of a job, and the fix."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.engine.examination.doctor import Report
    from dist_moe.engine.examination.host_facts import StoreFacts


@click.command("doctor")
@click.option(
    "-m",
    "--model",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A store that is to run here, or the GGUF or QW3W file or Hugging Face directory that a run would pack first.",
)
@click.option(
    "--hostfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The hosts, as mpirun reads them.",
)
@click.option("--clean", is_flag=True, help="Remove shared memory that killed MPI jobs of yours left behind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(context: click.Context, model: Path | None, hostfile: Path | None, clean: bool, as_json: bool) -> None:
    """Examine MPI, CPU, binding, memory, disk and a store: what is wrong, and the fix. Exit code 3 if anything is.

    Alone it looks at this machine; under mpirun at every host of the job.
    """
    from dist_moe.engine.examination.doctor import examine
    from dist_moe.parallel.hostfile import read_hostfile
    from dist_moe.store.models import cache_directory

    hosts = None if hostfile is None else read_hostfile(hostfile)
    found = None if model is None else _look_at(model)
    report = examine(detect_launcher(os.environ), cache_directory(), found, hosts, clean)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=1))
    else:
        for line in _as_text(report):
            click.echo(line)
    context.exit(report.exit_code)


def _look_at(path: Path) -> StoreFacts:
    """A store, or the one that was packed of a model, as it is; else how large the model's store will be."""
    from dist_moe.checkpoint.source import open_source
    from dist_moe.engine.examination.host_facts import StoreFacts, look_at_store
    from dist_moe.errors import DistMoeError
    from dist_moe.store.carry import default_format
    from dist_moe.store.layout import weight_files, weight_layout
    from dist_moe.store.manifest import MANIFEST_NAME
    from dist_moe.store.models import is_source, packed_directory
    from dist_moe.store.plan import StoreOptions, plan_store

    try:
        if not is_source(path):
            return look_at_store(path)
        model = open_source(path)
        fmt = default_format(model)
        packed = packed_directory(model, StoreOptions(format=fmt))
        if (packed / MANIFEST_NAME).is_file():
            return look_at_store(packed)
        manifest = plan_store(model, StoreOptions(format=fmt))
    except DistMoeError as error:
        return StoreFacts(str(path), error=str(error))
    packed_bytes = sum(weight_layout(manifest, name).file_bytes for name in weight_files(manifest))
    return StoreFacts(str(path), packed_bytes=packed_bytes)


def _as_text(report: Report) -> Iterator[str]:
    from dist_moe.engine.examination.findings import count

    first = report.ranks[0]
    ranks, hosts = len(report.ranks), list(dict.fromkeys(facts.host for facts in report.ranks))
    started = "a plain process" if report.launcher.name == "none" else f"started by {report.launcher.name}"
    yield f"dist-moe {first.package} (numerics {first.numerics}), Python {first.python}, MPI {first.library}"
    if report.launcher.size > ranks:
        yield f"{report.launcher.size} ranks, {started}; MPI was not started, so only {first.host} is examined"
    else:
        yield f"{count(ranks, 'rank')} on {count(len(hosts), 'host')}, {started}"
    for host in hosts:
        yield from _host_lines(report, host)
    for finding in report.findings:
        yield f"{'WRONG' if finding.level == 'wrong' else 'note '}  {finding.topic}: {finding.what}"
        if finding.fix:
            yield f"       -> {finding.fix}"
    wrong = sum(finding.level == "wrong" for finding in report.findings)
    yield f"{count(wrong, 'thing')} {'is' if wrong == 1 else 'are'} wrong" if wrong else "nothing is wrong"


def _host_lines(report: Report, host: str) -> Iterator[str]:
    from dist_moe.engine.examination.findings import count
    from dist_moe.engine.start.record import show_bytes
    from dist_moe.parallel.cores import describe_cores

    here = [pair for pair in zip(report.ranks, report.shares, strict=True) if pair[0].host == host]
    facts = here[0][0]
    yield f"{host}"
    yield f"  CPU       {facts.cpu}; {' '.join(facts.features)}"
    yield f"  kernels   {facts.isa or facts.asked_isa + ' (not available)'}"
    for rank, share in here:
        cores = f"{describe_cores(share.mask)} of {facts.host_cores}"
        yield f"  rank {rank.rank:<4} {count(share.threads, 'thread')} on {cores}"
    yield f"  memory    {show_bytes(facts.memory_bytes)} can be taken ({facts.memory_limit})"
    yield f"  /dev/shm  {show_bytes(facts.shared_free_bytes)} of {show_bytes(facts.shared_bytes)} free"
    yield f"  disk      {show_bytes(facts.cache_free_bytes)} free for {facts.cache}"
    store = facts.store
    if store is not None and store.packed_bytes:
        yield f"  model     {store.directory}: to be packed into a store of {show_bytes(store.packed_bytes)}"
    elif store is not None:
        yield f"  store     {store.directory}: {show_bytes(store.present_bytes)} here"
