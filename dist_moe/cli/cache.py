"""`dist-moe cache`: list and remove the packed models in the cache directory."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
import click.shell_completion

from dist_moe.cli.values import PathName
from dist_moe.errors import DistMoeError, Interrupted, PlaceError, UsageError
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.store.cached import CachedModel

_DAY_S = 86400.0


@click.group("cache", invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> None:
    """List or remove what `run -m` packed: models from Hugging Face directories, GGUF and QW3W files.

    The cache directory is $DIST_MOE_CACHE, else $XDG_CACHE_HOME/dist-moe, else ~/.cache/dist-moe. Stores that
    `dist-moe shard` made lie elsewhere and are never touched.

    \b
    Examples:
      dist-moe cache ls
      dist-moe cache rm demo-q8-82e075dcd62a
      dist-moe cache rm --all --yes
    """  # noqa: D301  click wants the character
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_models(as_json: bool) -> None:
    """List the packed models, the last used first."""
    if not detect_launcher(os.environ).is_first:
        return
    directory, models = _models()
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "models": [asdict(model) for model in models]}))
        return
    if not models:
        click.echo(f"{directory}: no packed models")
        return
    width = max(len(model.name) for model in models)
    click.echo(f"{'NAME':<{width}}  {'FORMAT':<6}  {'SIZE':>9}  {'LAST USED':<14}  {'STATE':<10}  MODEL")
    for model in models:
        used = _ago(time.time() - model.used_s)
        size = f"{model.bytes / 1e6:,.1f} MB"
        click.echo(
            f"{model.name:<{width}}  {model.format:<6}  {size:>9}  {used:<12}  {model.state:<10}  {model.source}"
        )
    click.echo(f"{directory}: {_sum(models)}")


class _Name(PathName):
    """The name of a packed model."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        names = [model.name for model in _models()[1]]
        return [click.shell_completion.CompletionItem(name) for name in names if name.startswith(incomplete)]


@cache.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, type=_Name("the name of a packed model"))
@click.option("--all", "everything", is_flag=True, help="Remove all packed models.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove_models(names: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Remove packed models; they are packed again when they are needed.

    A model that a run uses or a process is packing stays, and so does every file that is not ours.
    """
    if not detect_launcher(os.environ).is_first:
        return
    if bool(names) == everything:
        raise UsageError("say which models to remove: one or more names from dist-moe cache ls, or --all")
    from dist_moe.store.cached import remove_cached

    directory, models = _models()
    chosen = models if everything else _find(directory, models, names)
    if not chosen:
        click.echo(f"{directory}: no packed models")
        return
    if not yes:
        _confirm(directory, chosen)
    refusals = []
    for model in chosen:
        try:
            remove_cached(directory, model.name)
        except DistMoeError as error:
            refusals.append(str(error))
        else:
            click.echo(f"removed {model.name}, {model.bytes / 1e6:,.1f} MB")
    if refusals:
        raise PlaceError("\n".join(refusals))


def _models() -> tuple[Path, list[CachedModel]]:
    from dist_moe.store.cached import cached_models
    from dist_moe.store.models import cache_directory

    directory = cache_directory()
    return directory, cached_models(directory)


def _find(directory: Path, models: list[CachedModel], names: tuple[str, ...]) -> list[CachedModel]:
    known = {model.name: model for model in models}
    for name in names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise UsageError(f"{directory} holds no packed model called {name!r}: there are {there}")
    return [known[name] for name in dict.fromkeys(names)]


def _confirm(directory: Path, models: list[CachedModel]) -> None:
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on: add --yes to remove without being asked")
    try:
        agreed = click.confirm(f"remove {_sum(models)} from {directory}?", err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        raise Interrupted("nothing was removed")


def _sum(models: list[CachedModel]) -> str:
    count = "1 packed model" if len(models) == 1 else f"{len(models)} packed models"
    return f"{count}, {sum(model.bytes for model in models) / 1e6:,.1f} MB"


def _ago(seconds: float) -> str:
    for unit, unit_s in (("day", _DAY_S), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= unit_s:
            count = int(seconds // unit_s)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"
