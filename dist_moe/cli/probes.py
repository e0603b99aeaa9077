"""What `--debug`, `--routing`, `--stats` and `--trace` attach to a runtime, and what they print and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from dist_moe.cli.chrome_trace import dropped_steps_line, write_chrome_trace
from dist_moe.cli.debug_options import DebugOptions
from dist_moe.cli.ranks_table import ranks_as_json, ranks_table
from dist_moe.cli.routing_file import RoutingFile
from dist_moe.cli.times_table import TimesTable, step_line
from dist_moe.engine.routing.routing_facts import routing_facts
from dist_moe.engine.routing.routing_record import RoutingBatch, RoutingSink, recorded_routing
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import Interrupted, UsageError
from dist_moe.files import require_writable
from dist_moe.model.stopwatch import StepTimes
from dist_moe.model_config import ModelConfig

Piece = Callable[[int], str]  # how a token is shown


@dataclass
class Probes:
    """Checked wishes, and the times that were measured so far."""

    shows_routing: bool = False
    shows_times: bool = False
    shows_ranks: bool = False
    routing: Path | None = None
    trace: Path | None = None
    model_name: str = ""
    piece: Piece = str
    _times: TimesTable = field(default_factory=TimesTable)
    ranks: dict[str, Any] | None = None  # as data, once the block is over
    _ranks: list[str] = field(default_factory=list)
    _unwritten: UsageError | None = None

    @contextmanager
    def attached(self, engine: Runtime) -> Iterator[None]:
        """Watch what runs inside the block; files are written at its end, unless an error leaves it."""
        with ExitStack() as stack:
            if self.shows_ranks:
                stack.enter_context(self._watched_ranks(engine))
            if self.trace is not None:
                stack.enter_context(self._traced(engine, self.trace))
            sinks: list[RoutingSink] = []
            if self.shows_routing:
                sinks.append(self._print_routing)
            if self.routing is not None:
                facts = routing_facts(engine.model, self.model_name)
                sinks.append(stack.enter_context(RoutingFile(self.routing, facts)).append)
            stack.enter_context(recorded_routing(engine.model, *sinks))
            if self.shows_times:
                engine.model.stopwatch.on_step = self._take_times
            try:
                yield
            finally:
                engine.model.stopwatch.on_step = None

    def report(self) -> None:
        """Print what is known only at the end.

        Raises:
            UsageError: The trace could not be written; said last, so that nothing else is lost with it.
        """
        for line in (*self._times.lines(), *self._ranks):
            click.echo(line, err=True)
        if self._unwritten is not None:
            raise self._unwritten

    @contextmanager
    def _watched_ranks(self, engine: Runtime) -> Iterator[None]:
        """Keep the table of what runs inside the block."""
        yield
        accounts = engine.accounts()
        self.ranks, self._ranks = ranks_as_json(accounts, engine.hosts), ranks_table(accounts, engine.hosts)

    @contextmanager
    def _traced(self, engine: Runtime, path: Path) -> Iterator[None]:
        """Write the timeline of the block, also if Ctrl-C ends it."""
        interrupted: Interrupted | None = None
        with engine.timeline() as timeline:
            try:
                yield
            except Interrupted as error:
                interrupted = error
        try:
            write_chrome_trace(path, timeline, engine.hosts)
        except UsageError as error:
            self._unwritten = error
        if timeline.dropped_steps and self._unwritten is None:
            click.echo(dropped_steps_line(path, timeline), err=True)
        if interrupted is not None:
            raise interrupted

    def _take_times(self, times: StepTimes) -> None:
        self._times.add(times)
        click.echo(step_line(self._times.steps - 1, times), err=True)

    def _print_routing(self, batch: RoutingBatch) -> None:
        tokens = zip(batch.sequence_T.tolist(), batch.position_T.tolist(), batch.ids_T.tolist(), strict=True)
        for t, (sequence, position, token) in enumerate(tokens):
            where = f"sequence {sequence} position {position} {self.piece(token)}"
            for layer in np.flatnonzero(batch.experts_TLK[t, :, 0] >= 0).tolist():
                experts = batch.experts_TLK[t, layer].tolist()
                weights = batch.weights_TLK[t, layer].tolist()
                picks = " ".join(f"{e}:{weight:.4f}" for e, weight in zip(experts, weights, strict=True))
                click.echo(f"routing: {where} layer {layer}: {picks}", err=True)


def make_probes(
    options: DebugOptions, config: ModelConfig, model_name: Callable[[], str], piece: Piece = str
) -> Probes:
    """Check what is asked for, before any weight is read.

    Args:
        options: The command's.
        config: The model.
        model_name: Asked only where a record of the routing needs it.
        piece: How a token is shown; the id alone without a tokenizer.

    Raises:
        UsageError: The model has no experts, or a file cannot be written.
    """
    words = set((options.debug or "").split(","))
    if config.experts == 0 and ("routing" in words or options.routing is not None):
        option = "--debug routing" if "routing" in words else f"--routing {options.routing}"
        raise UsageError(f"{option}: this model is dense, no layer routes tokens to experts: leave the option out")
    return Probes(
        shows_routing="routing" in words,
        shows_times="timing" in words,
        shows_ranks=options.stats,
        routing=_writable(options.routing),
        trace=_writable(options.trace),
        model_name=model_name() if options.routing is not None else "",
        piece=piece,
    )


def _writable(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name)
    require_writable(path)
    return path
