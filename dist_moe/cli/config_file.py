"""Where an option's value comes from: config file < environment < flag. All three are read by the same parser."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from dist_moe.checkpoint.model_toml import TABLE
from dist_moe.cli.environment import PREFIX, environment_warnings
from dist_moe.cli.text_files import read_text
from dist_moe.cli.values import CONFIG_KEYS, PathName, YesNo
from dist_moe.errors import UsageError
from dist_moe.parallel.launcher import detect_launcher

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_NOT_IN_FILES = {"config", "print_config", "help", "legacy"}


def option(*names: str, **attributes: Any) -> Callable[[Decorated], Decorated]:
    """A click option that also reads DIST_MOE_<NAME> from the environment."""
    long_name = next(name for name in names if name.startswith("--"))
    variable = PREFIX + long_name.split("/")[0].lstrip("-").replace("-", "_").upper()
    attributes.setdefault("show_default", True)
    return click.option(*names, envvar=variable, **attributes)


def flag(name: str, help_text: str) -> Callable[[Decorated], Decorated]:
    """A yes/no option with both spellings, so that a flag can also undo what a config file says."""
    spellings = f"{name}/--no-{name.lstrip('-')}"
    return option(spellings, type=YesNo(), default=False, show_default=False, help=help_text)


def apply(command: Decorated, decorators: Iterable[Callable[[Any], Any]]) -> Decorated:
    """The command with some options, in their order."""
    for decorate in reversed(tuple(decorators)):
        command = decorate(command)
    return command


def config_options(*commands: str) -> Callable[[Decorated], Decorated]:
    """`--config` and `--print-config`.

    Args:
        commands: The commands whose options a config file may hold; a command ignores those of the others.
    """

    def load(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
        if path is not None:
            parameters = _parameters(context, commands)
            known = {str(parameter.name) for parameter in parameters} - _NOT_IN_FILES
            lists = {str(parameter.name) for parameter in parameters if getattr(parameter, "multiple", False)}
            entries = read_config(Path(path), known, lists)
            context.default_map = {_option_name(key): text for key, text in entries.items()}
            context.meta[CONFIG_KEYS] = {_option_name(key): key for key in entries}
        return path

    def decorate(command: Decorated) -> Decorated:
        command = click.option(
            "--print-config", is_flag=True, help="Print every option's value and where it came from, and stop."
        )(command)
        return option(
            "--config",
            type=PathName(),
            metavar="FILE.toml",
            is_eager=True,
            callback=load,
            show_default=False,
            help="Options as TOML (max_tokens = 64). Flags win over DIST_MOE_* variables, those over this file.",
        )(command)

    return decorate


def warn_of_environment(context: click.Context) -> None:
    """Name the variables that do nothing, once per job, whatever the command.

    Args:
        context: The group's; its commands are imported only if there is a variable that may be one of theirs.
    """
    group = context.command
    if not isinstance(group, click.Group) or not detect_launcher(os.environ).is_first:
        return
    if not environment_warnings(os.environ, ()):
        return
    members = [group.get_command(context, name) for name in group.list_commands(context)]
    options = {str(parameter.envvar) for member in members if member for parameter in member.params if parameter.envvar}
    for warning in environment_warnings(os.environ, options):
        click.echo(f"dist-moe: warning: {warning}", err=True)


def read_config(path: Path, known: Iterable[str], lists: Iterable[str] = ()) -> dict[str, str | list[str]]:
    """A TOML file's options as the strings that the flags would have, under the names that stand in the file.

    A table [architecture], which bench --synthetic reads, is passed over.

    Args:
        path: The file.
        known: Option names that may stand in it, with underscores.
        lists: Those that may be given several times: a list of texts, or one.

    Raises:
        UsageError: The file cannot be read, is not TOML, or holds an unknown name, a name twice or a table.
    """
    text = read_text(path, "--config")
    try:
        entries = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config: {path} is not valid TOML: {error}") from error
    names, seen = sorted(known), set[str]()
    if isinstance(entries.get(TABLE), dict):
        del entries[TABLE]
    for key, value in entries.items():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            raise UsageError(
                f"--config: {path}: {key} is a table: tables are not used, write options like max_tokens = 64 outside"
            )
        if _option_name(key) not in names:
            raise UsageError(f"--config: {path}: unknown option {key!r}; known are {', '.join(names)}")
        if _option_name(key) in seen:
            raise UsageError(f"--config: {path}: {key} is there twice, spelled with - and with _: keep one of them")
        seen.add(_option_name(key))
    return {
        key: [_as_flag(path, key, item) for item in (value if isinstance(value, list) else [value])]
        if _option_name(key) in lists
        else _as_flag(path, key, value)
        for key, value in entries.items()
    }


def print_config(context: click.Context, derived: dict[str, tuple[Any, str]]) -> None:
    """Print all options of a command as TOML that `--config` reads back, each with its origin.

    Args:
        context: The command's parsed context.
        derived: Values that the model gives where no option was set, each with the place it comes from.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in _NOT_IN_FILES:
            continue
        value, origin = context.params[name], origin_of(context, parameter)
        if value is None and name in derived:
            value, origin = derived[name]
        if value is None or value == ():
            words = getattr(parameter, "show_default", None)
            click.echo(f"# {name}: {words if isinstance(words, str) else 'not set'}")
        else:
            click.echo(f"{name} = {json.dumps(value, ensure_ascii=False)}  # {origin}")


def origin_of(context: click.Context, parameter: click.Parameter) -> str:
    """Words for where a parameter's value came from."""
    source = context.get_parameter_source(str(parameter.name))
    if source is ParameterSource.ENVIRONMENT:
        return f"environment {parameter.envvar}"
    if source is ParameterSource.DEFAULT_MAP:
        return f"config {context.params.get('config')}"
    return "flag" if source is ParameterSource.COMMANDLINE else "default"


def keep_one(context: click.Context, names: Sequence[str]) -> None:
    """Of some mutually exclusive options, forget those of weaker places: a flag replaces what a config file names.

    Raises:
        UsageError: Two are set in the strongest place.
    """
    chosen = _strongest(context, names)
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(map(_spelled, chosen))} exclude each other: give one of them")
    context.params.update({name: None for name in names if name not in chosen})


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def _strongest(context: click.Context, names: Iterable[str]) -> list[str]:
    """Those that were set in the strongest place: flags, environment or config."""
    order = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
    for source in order:
        found = [name for name in names if context.get_parameter_source(name) is source]
        if found:
            return found
    return []


def _option_name(key: str) -> str:
    return key.replace("-", "_")


def _parameters(context: click.Context, commands: Iterable[str]) -> list[click.Parameter]:
    group = context.find_root().command
    members = [group.get_command(context, name) for name in commands] if isinstance(group, click.Group) else []
    return [parameter for member in [context.command, *members] if member for parameter in member.params]


def _as_flag(path: Path, key: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return ",".join(str(item) for item in value)
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UsageError(f"--config: {path}: {key}: expected a string, a number or true/false, found {value!r}")
