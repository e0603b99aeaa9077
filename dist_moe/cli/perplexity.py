"""`dist-moe perplexity`: how well a model predicts a text, and how far it is from a reference.

Shape suffixes: N positions, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.cli import config_file
from dist_moe.cli.config_file import flag, option
from dist_moe.cli.documents import documents_of, split_option
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.kl_base import KlBase, new_base
from dist_moe.cli.models import find_model
from dist_moe.cli.npz_arrays import NpzArrays
from dist_moe.cli.options import PerplexityOptions, model_options
from dist_moe.cli.values import PathName, Whole
from dist_moe.engine.engine import Engine
from dist_moe.engine.perplexity import (
    Comparison,
    Perplexity,
    RowPair,
    compare,
    compare_rows,
    logprobs_of,
)
from dist_moe.engine.text_windows import windows_of
from dist_moe.errors import UsageError

DEFAULT_WINDOW = 2048
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """A window of one document: what is read, and of which rows the next token is predicted and counted."""

    ids: list[int]
    first_row: int

    @property
    def targets(self) -> list[int]:
        """The predicted tokens."""
        return self.ids[self.first_row + 1 :]


@dataclass(frozen=True)
class PerplexityTask:
    """Checked input of the command."""

    pieces: list[Piece]
    documents: int
    context: int
    write_base: Callable[[], NpzArrays] | None
    base: KlBase | None
    as_json: bool
    words: str
    interrupted: Callable[[], bool]

    def lead_engine(self, engine: Engine) -> None:
        """Read all windows and print what was found."""
        started_s = time.perf_counter()
        scores = Scores(self.base)
        with ExitStack() as stack:
            if self.base is not None:
                stack.enter_context(self.base)
            written = stack.enter_context(self.write_base()) if self.write_base is not None else None
            for piece in self.pieces:
                reader = _PieceReader(piece, scores, written)
                engine.logits(piece.ids, reader.take, self.interrupted)
        seconds = time.perf_counter() - started_s
        rate = sum(len(piece.ids) for piece in self.pieces) / seconds
        found, comparison = scores.perplexity(), scores.comparison()
        if self.as_json:
            click.echo(json.dumps(self._as_json(found, comparison, rate)))
        else:
            self._print(found, comparison, rate)

    def _print(self, found: Perplexity, comparison: Comparison | None, rate: float) -> None:
        click.echo(f"perplexity {found.value:.4f} ± {found.error:.4f} over {found.tokens} tokens")
        if comparison is not None:
            assert self.base is not None
            base, ratio, kl, same = comparison.base, comparison.ratio, comparison.kl, comparison.same_top
            click.echo(f"base       {base.value:.4f} ± {base.error:.4f} ({self.base.model_name})")
            click.echo(f"ratio      {ratio.value:.5f} ± {ratio.error:.5f}")
            click.echo(
                f"KL         mean {kl.value:.3e} ± {kl.error:.1e}, median {comparison.kl_median:.3e}, "
                f"99 % below {comparison.kl_99:.3e}, largest {comparison.kl_max:.3e} (nats)"
            )
            click.echo(f"same top   {100 * same.value:.2f} ± {100 * same.error:.2f} % of the most probable tokens")
        click.echo(f"{self.words}, {rate:.1f} tokens/s", err=True)

    def _as_json(self, found: Perplexity, comparison: Comparison | None, rate: float) -> dict[str, Any]:
        entries = {"perplexity": found.value, "error": found.error, "tokens": found.tokens}
        entries |= {"documents": self.documents, "windows": len(self.pieces), "tokens_per_s": round(rate, 1)}
        return entries if comparison is None else {**entries, "comparison": asdict(comparison)}


class Scores:
    """What the rows that were read say, in their order."""

    def __init__(self, base: KlBase | None) -> None:
        """Compare with a base that is open, or with nothing."""
        self._base = base
        self._logprobs: list[npt.NDArray[np.float64]] = []
        self._pairs: list[RowPair] = []

    def add(self, logits_NV: Floats, targets: Sequence[int]) -> None:
        """The next rows, and the token that follows each."""
        targets_N = np.array(targets, np.int32)
        if self._base is None:
            self._logprobs.append(logprobs_of(logits_NV, targets_N))
            return
        self._pairs.append(compare_rows(logits_NV, self._base.rows(len(targets_N)), targets_N))
        self._logprobs.append(self._pairs[-1].logprob)

    def perplexity(self) -> Perplexity:
        """Of all rows."""
        return Perplexity.of(np.concatenate(self._logprobs))

    def comparison(self) -> Comparison | None:
        """With the base, over all rows; None without one."""
        return compare(self._pairs) if self._base is not None else None


class _PieceReader:
    """Takes a window's rows as they come, and gives on those whose next token is counted."""

    def __init__(self, piece: Piece, scores: Scores, written: NpzArrays | None) -> None:
        self._piece, self._scores, self._written = piece, scores, written
        self._row = 0

    def take(self, rows_NV: Floats) -> None:
        """The next rows, in the order of the window."""
        first, last = self._row, self._row + len(rows_NV)
        self._row = last
        begin, end = max(first, self._piece.first_row), min(last, len(self._piece.ids) - 1)
        if begin >= end:
            return
        counted_NV = rows_NV[begin - first : end - first]
        self._scores.add(counted_NV, self._piece.ids[begin + 1 : end + 1])
        if self._written is not None:
            self._written.append({"logits": counted_NV})


def make_task(options: PerplexityOptions, setting: Setting) -> PerplexityTask:
    """Check the text and the base before any weight is read.

    Raises:
        UsageError: A file cannot be read, the text has no token to predict, or the base is of another text.
        CheckpointError: The model has no tokenizer.
    """
    config = setting.config
    window = options.window or min(DEFAULT_WINDOW, config.max_positions)
    if window > config.max_positions:
        raise UsageError(
            f"--window {window} is more than the model's maximum of {config.max_positions} positions: lower it"
        )
    stride = options.stride or window // 2
    if stride >= window:
        raise UsageError(f"--stride {stride}: expected less than --window {window}, so that windows overlap")
    documents = documents_of(Path(options.text), options.split, setting.text.require_tokenizer())
    pieces = pieces_of(documents, window, stride)
    if not pieces:
        raise UsageError(f"{options.text}: a single token predicts nothing: give a longer text")
    targets_N = np.array([token for piece in pieces for token in piece.targets], np.int32)
    base, write_base = None, None
    if options.kl_base is not None:
        path = Path(options.kl_base)
        if files.exists(path):
            base = KlBase(path, targets_N, config.vocabulary)
        else:
            files.require_writable(path)
            name = find_model(options).name()

            def write_base() -> NpzArrays:
                return new_base(path, name, targets_N)

    count = f"{len(documents)} document{'s' if len(documents) > 1 else ''}"
    words = f"{count}, {len(pieces)} windows of up to {window} tokens, stride {stride}"
    context = max(len(piece.ids) for piece in pieces)
    return PerplexityTask(pieces, len(documents), context, write_base, base, options.json, words, setting.interrupted)


def pieces_of(documents: Sequence[list[int]], window: int, stride: int) -> list[Piece]:
    """The windows of all documents that have a token to predict."""
    return [
        Piece(ids[part.first : part.stop], part.scored - 1 - part.first)
        for ids in documents
        if len(ids) > 1
        for part in windows_of(len(ids), window, stride)
    ]


@click.command()
@model_options
@click.argument("text", metavar="TEXTFILE", type=PathName("the name of a text file"))
@option(
    "--window",
    type=Whole(min=2),
    show_default=f"{DEFAULT_WINDOW}, or the model's maximum",
    help="Positions that are read together.",
)
@option(
    "--stride",
    type=Whole(min=1),
    show_default="half a window",
    help="Each window begins so much later than the one before it; every token is predicted once.",
)
@split_option
@option(
    "--kl-base",
    type=PathName(),
    metavar="FILE.npz",
    show_default=False,
    help="If FILE is not there, write this model's logits to it (4 bytes x vocabulary per token); if it is, compare "
    "with them: Kullback-Leibler divergence and agreement of the most probable token.",
)
@flag("--json", "Print one JSON object.")
@click.pass_context
def perplexity(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Measure how well a model predicts a text: exp of the mean negative log-probability of its tokens.

    The standard error is that of independent tokens. The same numbers on any number of ranks.

    \b
    Examples:
      dist-moe perplexity -m store-f32/ wiki.txt --kl-base f32.npz
      mpirun -n 4 dist-moe perplexity -m store-q4/ wiki.txt --kl-base f32.npz
    """  # noqa: D301  click wants the character
    if print_config:
        config_file.print_config(context, {})
        return
    run_job(PerplexityOptions(**values), make_task)
