"""dist-moe verify: whether this machine computes the right numbers, from single kernels to whole models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dist_moe.cli.config_file import option
from dist_moe.cli.values import OneOf, PathName, Whole, WholeList, numbers, refuse
from dist_moe.cli.verify_trace import trace
from dist_moe.errors import UsageError, VerificationFailed
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.store.models import ModelSource
    from dist_moe.verify.check import Check
    from dist_moe.verify.session import Session, Wanted

LEVELS = ("kernel", "expert", "moe", "attn", "layer", "model")
_JOB_S = 3600.0
_START_S = 60.0
_NEVER_STALLED_S = 86400.0  # rank 0 computes in NumPy while the others sleep


class Levels(click.types.StringParamType):
    """Levels with commas between them; the value stays a text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        words = [word.strip() for word in super().convert(value, param, ctx).split(",")]
        if any(word not in LEVELS for word in words):
            refuse(f"{', '.join(LEVELS[:-1])} or {LEVELS[-1]}, or several with commas between them", value, param, ctx)
        return ",".join(words)


@click.group("verify", invoke_without_command=True)
@click.option(
    "--level",
    type=Levels(),
    metavar="LEVEL,...",
    default=",".join(LEVELS),
    show_default="all",
    help="What is verified: kernel, expert, moe, attn, layer, model.",
)
@click.option(
    "-m",
    "--model",
    metavar="PATH",
    type=PathName(),
    show_default="the bundled demo model",
    help="A store, or a model that is packed first, as run takes it.",
)
@option("--quant", type=OneOf(["f32", "bf16", "q8", "q4"]), show_default=False, help="Format when a model is packed.")
@click.option(
    "--against",
    metavar="SRC",
    type=PathName(),
    help="What the store was made from: compare with its unrounded weights, too. The demo model brings its own.",
)
@click.option(
    "--ranks",
    type=WholeList(1, 4096),
    metavar="1,2,4",
    help="Start mpirun on this machine for each number of ranks, and compare the bits with those of one rank.",
)
@click.option(
    "--layer",
    type=WholeList(0, 1 << 20),
    metavar="0,3",
    help="Layers that are looked at; unasked all of a small model, else the first, the middle and the last.",
)
@click.option("--expert", type=Whole(min=0), metavar="E", help="The expert; unasked the busiest of each layer.")
@click.option(
    "--tokens", type=Whole(min=1, max=4096), default=70, show_default=True, help="Length of the sequence of tokens."
)
@click.option("-o", "format", type=OneOf(["text", "json"]), default="text", help="A table, or one JSON object.")
@click.option("--hashes-of-ranks", "is_rank", is_flag=True, hidden=True)
@click.pass_context
def verify(context: click.Context, /, **values: Any) -> None:
    """Compare what this machine computes with definitions in float64, and bit for bit with itself.

    Kernels at every instruction set level and thread count; experts, MoE blocks, attention, layers and logits of a
    model, also on other numbers of ranks. One line per comparison; exit code 0 if all pass, else 2. Under mpirun the
    job's own ranks are compared with one rank.

    \b
    Examples:
      dist-moe verify
      dist-moe verify --ranks 1,2,4
      dist-moe verify --level expert,moe --layer 0 --expert 3
      dist-moe verify trace reference.npz
    """  # noqa: D301  click wants the character
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    launcher = detect_launcher(os.environ)
    if values["ranks"] is not None and launcher.name != "none":
        raise UsageError(
            "--ranks starts mpirun itself, but this process was started by "
            f"{launcher.name} already: leave --ranks out (the {launcher.size} ranks of this job are compared with one "
            "rank), or start dist-moe verify --ranks without a launcher"
        )
    _run(values)


def _run(values: dict[str, Any]) -> None:
    from dist_moe.cli.shard_progress import ShardProgress
    from dist_moe.engine.start.job import Job, local_store
    from dist_moe.engine.start.startup import agreed, open_exchange
    from dist_moe.store.models import find_model
    from dist_moe.store.reader import Store
    from dist_moe.verify.session import Session, checks_of_job

    wanted = _wanted(values)
    _require_mpirun(values)
    job = Job(1, _START_S, lambda _: _NEVER_STALLED_S)
    world, directory, store, source = job.world, None, None, None
    try:
        if wanted.levels != ("kernel",):
            model = agreed(world, "reading the model", lambda: find_model(values["model"], values["quant"]))
            source = _source(values, model)
            directory = local_store(world, model, full_check=False, show=ShardProgress)
            store = agreed(world, "opening the store", lambda: Store.open(directory, with_text=False))
        session = agreed(world, "verifying", lambda: Session(store, source, wanted))
        exchange = open_exchange(world, False, os.environ)
        if values["is_rank"]:
            hashes = session.hashes(world, exchange)
            if world.is_leader:
                click.echo(json.dumps({"ranks": world.size, "hashes": hashes}))
            return
        table = Table(values["format"] == "json")
        checks_of_job(session, world, exchange, table.show)
        if values["ranks"] is not None:
            _other_ranks(session, values, directory, table.show)
        session.close()
        job.on_leader(table.end)
    finally:
        job.leave()


class Table:
    """Prints a line per check as it is made, or all as JSON, and a verdict."""

    def __init__(self, as_json: bool) -> None:
        """Choose."""
        self._as_json, self._checks = as_json, list[Any]()

    def show(self, check: Check) -> None:
        """Take the next line."""
        if not self._as_json:
            if not self._checks:
                click.echo(_line("level", "what", "expected", "worst", "tolerance", "verdict"))
            click.echo(check_line(check))
        self._checks.append(check)

    def end(self) -> None:
        """Print the verdict.

        Raises:
            VerificationFailed: A check did not pass.
        """
        wrong = [check for check in self._checks if not check.passed]
        count = f"{len(self._checks)} check{'' if len(self._checks) == 1 else 's'}"
        if self._as_json:
            entries = [check.entries for check in self._checks]
            click.echo(json.dumps({"passed": not wrong, "checks": entries}, indent=1))
        elif not wrong:
            click.echo(f"PASS: {count}")
        else:
            click.echo(f"FAIL: {len(wrong)} of {count}")
        if wrong:
            first = wrong[0]
            raise VerificationFailed(
                f"{len(wrong)} of {count} failed, first {first.level}, {first.what}, against {first.expected}: do not "
                "trust what this machine computes; run it again, also with DIST_MOE_ISA=portable, examine the store "
                "with dist-moe inspect --verify, and report what stays"
            )


def check_line(check: Check) -> str:
    """A check as a line of the table."""
    if check.tolerance is None:
        worst = "equal" if check.deviation == 0 else f"{check.deviation:.0f} differ"
    else:
        worst = f"{check.deviation:.1e}"
    tolerance = "bits" if check.tolerance is None else f"{check.tolerance:.1g}"
    return _line(check.level, check.what, check.expected, worst, tolerance, "PASS" if check.passed else "FAIL")


def _line(level: str, what: str, expected: str, worst: str, tolerance: str, verdict: str) -> str:
    return f"{level:<6}  {what:<52}  {expected:<10}  {worst:>12}  {tolerance:>9}  {verdict}"


def _other_ranks(
    session: Session, values: dict[str, Any], directory: Path | None, show: Callable[[Check], object]
) -> None:
    """Each number of ranks, started with mpirun."""
    from dist_moe.parallel.launching import output_of_ranks
    from dist_moe.verify.rank_hashes import compare_hashes
    from dist_moe.verify.session import parse_hashes

    expected = session.own_hashes()
    for ranks in numbers(values["ranks"]):
        if ranks > 1:
            printed = output_of_ranks(ranks, _arguments(values, directory), os.environ, _JOB_S)
            for check in compare_hashes(ranks, parse_hashes(printed, ranks), expected):
                show(check)


def _require_mpirun(values: dict[str, Any]) -> None:
    """Look for the mpirun that --ranks needs before anything is computed; EnvironmentMismatch."""
    from dist_moe.parallel.launching import launcher_command

    if values["ranks"] is not None and (most := max(numbers(values["ranks"]))) > 1:
        launcher_command(most, None, os.environ, "verify")


def _arguments(values: dict[str, Any], directory: Path | None) -> Sequence[str]:
    """The command line of the ranks that are started."""
    arguments = ["verify", "--hashes-of-ranks", "--level", values["level"], "--tokens", str(values["tokens"])]
    arguments += ["--layer", values["layer"]] if values["layer"] is not None else []
    arguments += [] if directory is None else ["-m", str(directory.resolve())]
    return arguments


def _wanted(values: dict[str, Any]) -> Wanted:
    from dist_moe.verify.session import Wanted

    levels = values["level"].split(",")
    layers = () if values["layer"] is None else numbers(values["layer"])
    ordered = tuple(level for level in LEVELS if level in levels)
    return Wanted(ordered, layers, values["expert"], values["tokens"])


def _source(values: dict[str, Any], model: ModelSource) -> Path | None:
    """What to compare a store's weights with."""
    if values["is_rank"]:
        return None
    if values["against"] is not None:
        return Path(values["against"])
    return model.path if model.format is not None else None


def _refuse_options(context: click.Context) -> None:
    for parameter in context.command.params:
        if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
            name = max(parameter.opts, key=len)
            raise UsageError(f"{name}: write options behind the word trace: dist-moe verify trace REFERENCE -m STORE")


verify.add_command(trace)
