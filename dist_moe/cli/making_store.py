"""What `dist-moe shard` and `reshard` share: the options of a cut, and how a store is made and reported."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dist_moe import files
from dist_moe.cli.shard_progress import ShardProgress, report_store
from dist_moe.cli.values import OneOf, PathName
from dist_moe.errors import Interrupted, PlaceError, UsageError

if TYPE_CHECKING:
    from dist_moe.store.convert import Conversion
    from dist_moe.store.placement import Placement

Command = TypeVar("Command", bound=Callable[..., Any])

quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")


def cut_options(experts_default: str, directory_of: str) -> Callable[[Command], Command]:
    """Decorate a command with --experts, --placement, --output and --force.

    Args:
        experts_default: What --experts is where it is not given, as the help says it.
        directory_of: Of what -o names the directory.
    """
    options = (
        click.option(
            "--experts",
            type=OneOf(["whole", "sliced"]),
            help=f"Each shard gets whole experts, or a slice of every expert.  [default: {experts_default}]",
        ),
        click.option(
            "--placement",
            metavar="FILE|STORE",
            type=PathName(),
            help="What each node gets, as dist-moe place wrote it or as another store has it; in place of --nodes and "
            "--experts.",
        ),
        click.option(
            "-o",
            "--output",
            metavar="DIR",
            type=PathName(),
            help=f"Directory of the {directory_of}.  [default: ./<source>-<quant>-<nodes>]",
        ),
        click.option("--force", is_flag=True, help="Replace a store that stands there; anything else is left alone."),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def default_directory(source_name: str, format_label: str, shards: int, placed: bool) -> str:
    """What -o is where it is not given."""
    return f"{source_name}-{format_label}-{shards}{'-placed' if placed else ''}"


def make_store(make: Callable[[ShardProgress], Conversion], destination: Path, shards: int, quiet: bool) -> None:
    """Make a store and say what stands there, and how it is run.

    Raises:
        PlaceError: `make` cannot write there.
        Interrupted: Ctrl-C or SIGTERM; what was written stays.
    """
    try:
        with ShardProgress(quiet) as progress:
            result = make(progress)
    except PlaceError as error:
        raise PlaceError(f"{error} or choose another -o") from error
    except KeyboardInterrupt as error:
        message = f"{destination}: interrupted; repeat the same command to continue where it stopped"
        raise Interrupted.by(error, message) from None
    report_store(result.manifest.files, destination, result.written_files, result.manifest.nonfinite)
    click.echo(shlex.join(["mpirun", "-n", str(shards), "dist-moe", "run", "-m", str(destination)]))


def read_cut(path: Path, nodes: int | None, experts: str | None) -> Placement:
    """What --placement names: a file, or the cut of a store.

    Raises:
        UsageError: --nodes or --experts is given, too.
        StoreError: There is neither.
    """
    from dist_moe.store.placement_json import read_placement
    from dist_moe.store.reader import read_store_manifest

    for name, value in (("--nodes", nodes), ("--experts", experts)):
        if value is not None:
            raise UsageError(f"{name} {value}: the placement says that; leave out {name} or --placement")
    if files.is_directory(path):
        return read_store_manifest(path).placement
    return read_placement(path)
