"""`dist-moe completion`: the script that lets a shell complete commands, options and names of files."""

from __future__ import annotations

import os

import click
import click.shell_completion

from dist_moe.cli.values import OneOf
from dist_moe.parallel.launcher import detect_launcher

_INSTALLATION = {
    "bash": 'add to ~/.bashrc: eval "$(dist-moe completion bash)"',
    "zsh": 'add to ~/.zshrc, after compinit: eval "$(dist-moe completion zsh)"',
    "fish": "run once: dist-moe completion fish > ~/.config/fish/completions/dist-moe.fish",
}


@click.command("completion")
@click.argument("shell", metavar="bash|zsh|fish", type=OneOf(list(_INSTALLATION)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in a shell; its last line says how to install it.

    \b
    Example:
      eval "$(dist-moe completion bash)"
    """  # noqa: D301  click wants the character
    if not detect_launcher(os.environ).is_first:
        return
    from dist_moe.cli.main import COMPLETION_VARIABLE, PROGRAM

    maker = click.shell_completion.get_completion_class(shell)
    assert maker is not None
    group = context.find_root().command
    click.echo(maker(group, {}, PROGRAM, COMPLETION_VARIABLE).source().strip())
    click.echo(f"# To install, {_INSTALLATION[shell]}")
