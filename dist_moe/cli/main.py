"""The command line's entry: a group whose commands are imported when they are called, so that help needs nothing."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence

import click
import click.shell_completion

from dist_moe.cli.config_file import origin_of, warn_of_environment
from dist_moe.cli.version import version_lines
from dist_moe.errors import UsageError
from dist_moe.parallel.entry import guarded
from dist_moe.parallel.launcher import detect_launcher

# Each command is a function of the same name in a module of the same name.
COMMANDS = {
    "run": "Continue a text.",
    "chat": "Talk with a model, alone or on ranks that it starts itself.",
    "logits": "Write the logits at every position of a list of tokens.",
    "perplexity": "Measure how well a model predicts a text, and how far it is from a reference.",
    "calibrate": "Sum up over a text what each matrix reads, for shard --importance.",
    "shard": "Make a store, in shards for one or more nodes, from a Hugging Face directory.",
    "reshard": "Cut a store into another number of shards, without its source.",
    "plan": "Predict memory, bytes on the wire and speed of a model on a number of nodes.",
    "push": "Bring each host of a cluster its shard of a store, and verify it there.",
    "routing": "Show how tokens spread over experts and ranks, from what run --routing wrote.",
    "profile": "Count over a text which experts fire, and which of them together.",
    "place": "Decide which node gets which experts: hot ones on several, unequal nodes by weight.",
    "cache": "List or remove packed models in the cache directory.",
    "bench": "Measure prefill and decode, each as a share of what the machine allows.",
    "inspect": "List what a store holds, verify it, or compare it with its source or another store.",
    "export": "Write chosen tensors of a store as safetensors or .npy.",
    "verify": "Compare what this machine computes with definitions, other levels and other numbers of ranks.",
    "doctor": "Examine this machine, or all hosts of a job: what is wrong, and the fix.",
    "completion": "Print the script that completes commands and options in a shell.",
}


PROGRAM = "dist-moe"
COMPLETION_VARIABLE = "_DIST_MOE_COMPLETE"


class LazyGroup(click.Group):
    """Commands by name; neither the list nor the help of the group imports them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"dist_moe.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        """Names and options of the group, without importing a command."""
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        items = [click.shell_completion.CompletionItem(name, help=COMMANDS[name]) for name in names]
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo("\n".join(version_lines()))
        context.exit()


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version, the kernels' ISA levels and the MPI library.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Run Qwen3 mixture-of-experts models on CPUs, alone or on many ranks: mpirun -n 4 dist-moe run -p "Once"."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    else:
        warn_of_environment(context)


def execute(arguments: Sequence[str]) -> int:
    """Parse the arguments and run the command that they name.

    Returns:
        The exit code.

    Raises:
        UsageError: The arguments are wrong; one line says what and where.
        DistMoeError: Any other planned error.
    """
    if instruction := os.environ.get(COMPLETION_VARIABLE):  # set by the script of `dist-moe completion`
        return click.shell_completion.shell_complete(cli, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    with _stdout_of_first_rank():
        try:
            # Not cli.main(): it turns a closed pipe and Ctrl-C into exits of its own, on this rank alone.
            with cli.make_context(PROGRAM, list(arguments)) as context:
                cli.invoke(context)
        except click.exceptions.Exit as leaving:
            return leaving.exit_code
        except click.ClickException as error:
            raise UsageError(_one_line(error)) from error
    return 0


def main() -> int:
    """The console script: run the command and end the job, all ranks alike; returns the exit code."""
    return guarded(lambda: execute(sys.argv[1:]))


@contextlib.contextmanager
def _stdout_of_first_rank() -> Iterator[None]:
    """Only the first rank has anything to say on stdout, be it help, text or JSON."""
    if not detect_launcher(os.environ).is_first:
        with open(os.devnull, "w", encoding="utf-8") as silence, contextlib.redirect_stdout(silence):  # noqa: PTH123
            yield
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the run
    yield


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    if context is not None and parameter is not None:
        origin = origin_of(context, parameter)
        message += "" if origin in ("flag", "default") else f" (from {origin})"
    path = context.command_path if context is not None else "dist-moe"
    return f"{message}; see {path} --help"
