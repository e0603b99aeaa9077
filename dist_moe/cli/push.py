"""dist-moe push: each host gets its shard of a store, and what every node needs."""

from __future__ import annotations

import os
import shlex
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dist_moe.cli.values import PathName, TextPattern, Whole
from dist_moe.errors import EnvironmentMismatch, Interrupted, UsageError
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.cli.push_host import Pusher
    from dist_moe.store.manifest import Manifest
    from dist_moe.store.parts import HostPart

_HERE = ("localhost", "127.0.0.1")


@click.command("push")
@click.argument("store", metavar="STORE", type=PathName())
@click.option("--hostfile", metavar="FILE", type=PathName(), help="The hosts, as mpirun reads them: one per line.")
@click.option("--hosts", metavar="A,B,...", help="The hosts, instead of a file.")
@click.option(
    "--to",
    metavar="DIR",
    type=PathName(),
    help="Absolute path of the store on the hosts.  [default: its path on this machine]",
)
@click.option(
    "--assign",
    multiple=True,
    metavar="HOST=1,2",
    help="Shards of a host, once per host; HOST=all, or all alone, for all of them.  [default: shard i to host i]",
)
@click.option(
    "--bwlimit",
    type=TextPattern(r"[0-9]+(\.[0-9]+)?[KMG]?", "a rate per second such as 80M or 500K"),
    metavar="RATE",
    help="Bytes per second for each host at most: 80M, 500K; without a letter KiB.",
)
@click.option("--jobs", type=Whole(min=1, max=256), default=4, show_default=True, help="Hosts at the same time.")
@click.option("--ssh", metavar="COMMAND", help="How to reach a host, such as 'ssh -p 2222 -i KEY'.")
@click.option("--force", is_flag=True, help="Replace another store that stands there.")
@click.option("--dry-run", is_flag=True, help="Print what each host would get and the commands; reach no host.")
def push(
    store: str,
    hostfile: str | None,
    hosts: str | None,
    to: str | None,
    assign: tuple[str, ...],
    bwlimit: str | None,
    jobs: int,
    ssh: str | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Bring every host its shard of STORE with rsync over ssh, and verify it there.

    An interrupted push continues where it stopped when it is repeated. One line per host; exit code 3 if a host could
    not be served.

    \b
    Examples:
      dist-moe push Qwen3-30B-A3B-q4-4 --hostfile hosts
      dist-moe push Qwen3-30B-A3B-q4-4 --hosts node1,node2 --assign node1=1,2,3 --assign node2=4
    """  # noqa: D301  click wants the character
    if not detect_launcher(os.environ).is_first:
        return
    from dist_moe.cli.push_host import Pusher
    from dist_moe.parallel.remote import Commands
    from dist_moe.store.parts import host_parts
    from dist_moe.store.reader import read_store_manifest

    directory = Path(store).resolve()
    manifest = read_store_manifest(directory)
    there = _destination(directory, to)
    parts = host_parts(manifest, _host_names(hostfile, hosts), assign)
    _require_files(directory, manifest, parts)
    pusher = Pusher(Commands(_ssh_command(ssh)), directory, there, manifest, _limits(bwlimit), force)
    if dry_run:
        _show(pusher, parts)
        return
    _push(pusher, [part for part in parts if not _is_here(part.host, directory, there)], jobs)


def _destination(directory: Path, to: str | None) -> str:
    """The absolute path on the hosts."""
    there = to or str(directory)
    if not there.startswith("/") or any(not character.isprintable() for character in there):
        raise UsageError(f"--to: expected an absolute path such as /data/{directory.name}, found {there!r}")
    if not there.strip("/"):
        raise UsageError(f"--to {there}: a store needs a directory of its own: give one such as /data/{directory.name}")
    return there.rstrip("/")


def _ssh_command(ssh: str | None) -> str:
    """How to reach a host."""
    from dist_moe.parallel.remote import SSH

    if ssh is not None and not ssh.strip():
        raise UsageError(f"--ssh {shlex.quote(ssh)}: names no command: give one such as 'ssh -p 2222', or leave it out")
    return SSH if ssh is None else ssh


def _host_names(hostfile: str | None, hosts: str | None) -> list[str]:
    """The hosts in their order, each once."""
    from dist_moe.parallel.hostfile import read_hostfile
    from dist_moe.parallel.remote import require_host_name

    if (hostfile is None) == (hosts is None):
        raise UsageError("give the hosts either as --hostfile FILE or as --hosts A,B")
    if hostfile is not None:
        names = [entry.host for entry in read_hostfile(Path(hostfile)).entries]
    else:
        names = [name.strip() for name in (hosts or "").split(",")]
    for name in names:
        require_host_name(name)
    return list(dict.fromkeys(names))


def _require_files(directory: Path, manifest: Manifest, parts: list[HostPart]) -> None:
    """Refuse what would arrive damaged: sizes and headers of all that is to be sent."""
    from dist_moe.store.verify import check_header

    for entry in {file.name: file for part in parts for file in part.files}.values():
        check_header(directory / entry.name, entry)


def _limits(bwlimit: str | None) -> list[str]:
    return [] if bwlimit is None else [f"--bwlimit={bwlimit}"]


def _is_here(host: str, directory: Path, there: str) -> bool:
    """Whether a host is this machine and has the very store that is sent."""
    own = {*_HERE, socket.gethostname(), socket.gethostname().split(".")[0]}
    if host not in own or Path(there).resolve() != directory:
        return False
    click.echo(f"{host}: this machine, where the store is: nothing is sent")
    return True


def _show(pusher: Pusher, parts: list[HostPart]) -> None:
    for part in parts:
        click.echo(f"{part.host}: {pusher.describe(part)}")
        names = " ".join(shlex.quote(file.name) for file in part.files)
        click.echo(f"  printf '%s\\n' {names} | {shlex.join(pusher.command(part))}")


def _push(pusher: Pusher, parts: list[HostPart], jobs: int) -> None:
    """Serve the hosts, some at a time.

    Raises:
        EnvironmentMismatch: Not all of them have their part.
        Interrupted: By Ctrl-C.
    """
    failed = []
    with _stops(pusher), ThreadPoolExecutor(jobs, "push") as pool:
        running = {pool.submit(pusher.serve, part): part for part in parts}
        for done in as_completed(running):
            host, outcome = running[done].host, done.result()
            if not pusher.stopped:
                click.echo(f"{host}: {outcome.line}", err=not outcome.served)
            failed += [] if outcome.served else [host]
    if pusher.stopped:
        raise Interrupted("interrupted; repeat the same command to continue where it stopped")
    if failed:
        raise EnvironmentMismatch(
            f"{len(failed)} of {len(parts)} hosts do not have their part ({', '.join(failed)}): mend what the lines "
            "above say and repeat the same command, it continues where it stopped"
        )


@contextmanager
def _stops(pusher: Pusher) -> Iterator[None]:
    """Let Ctrl-C end the commands and raise nothing: an exception amid the waiting for threads breaks their locks."""
    before = signal.signal(signal.SIGINT, lambda number, frame: pusher.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
