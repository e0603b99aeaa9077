"""A trace of greedy steps that another program wrote, and the comparison of a model with it.

Shape suffixes: V vocabulary, R rows of a trace's logits, N rows of a step.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.cli.probes import Probes
from dist_moe.cli.text_files import read_text
from dist_moe.cli.token_ids import read_ids, require_ids
from dist_moe.engine.engine import Engine
from dist_moe.errors import TraceMismatch, UsageError

IDS, LOGITS, PROBABILITIES = ".ids.npy", ".logits.npy", ".probs.npy"
_TRACE = "TRACE"


@dataclass(frozen=True)
class Trace:
    """Tokens that greedy steps are expected to give, and the logits and probabilities of some of them.

    Attributes:
        prompt_ids: Where the steps begin.
        expected_ids: What follows.
        first_row: The row of `logits_RV` for the first expected token; negative if they begin later.
        logits_RV: float [R, V], or None.
        probabilities_RV: Likewise.
    """

    prompt_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    first_row: int = 0
    logits_RV: npt.NDArray[Any] | None = None
    probabilities_RV: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class ComparedStep:
    """One step: what the trace says, what the model says, and how far its logits and probabilities are off."""

    step: int
    expected: int
    got: int
    logit_rmse: float | None
    prob_mae: float | None

    @property
    def ok(self) -> bool:
        """Whether the model agrees."""
        return self.expected == self.got

    @property
    def entries(self) -> dict[str, object]:
        """The step as JSON, which has no NaN: a trace that holds one compares as null."""
        numbers = {name: value for name, value in vars(self).items() if value is not None and math.isfinite(value)}
        return dict.fromkeys(vars(self)) | numbers | {"ok": self.ok}

    @property
    def line(self) -> str:
        """The step as it is printed."""
        errors = {"logit rmse": self.logit_rmse, "prob mae": self.prob_mae}
        shown = "".join(f", {name} {value:.6g}" for name, value in errors.items() if value is not None)
        return f"step {self.step}: expected {self.expected}, got {self.got} {'OK' if self.ok else 'MISMATCH'}{shown}"


@dataclass(frozen=True)
class Tolerances:
    """What still passes: steps whose token differs, and the largest errors of any step; None: whatever they are."""

    mismatches: int = 0
    logit_rmse: float | None = None
    prob_mae: float | None = None

    def complaint(self, step: ComparedStep) -> str | None:
        """What is too far off in a step's logits or probabilities, in words."""
        limits = {"logit rmse": (step.logit_rmse, self.logit_rmse), "prob mae": (step.prob_mae, self.prob_mae)}
        for name, (found, limit) in limits.items():
            if limit is not None and found is not None and not found <= limit:
                return f"{name} {found:.6g} is above {limit:g}"
        return None

    def verdict(self, steps: Sequence[ComparedStep]) -> str | None:
        """Why the steps do not pass, or None."""
        wrong = [step for step in steps if not step.ok]
        if len(wrong) > self.mismatches:
            first = wrong[0]
            return (
                f"step {first.step} expects token {first.expected}, the model gives {first.got} "
                f"({len(wrong)} of {len(steps)} steps differ)"
            )
        for step in steps:
            if complaint := self.complaint(step):
                return f"step {step.step}: {complaint}"
        return None


@dataclass
class TraceTask:
    """A checked trace and its comparison; each step continues the trace's own tokens, as its maker did."""

    name: str
    trace: Trace
    steps: int
    context: int
    valid_vocabulary: int
    as_json: bool
    probes: Probes
    interrupted: Callable[[], bool]
    tolerances: Tolerances = Tolerances()

    def lead_engine(self, engine: Engine) -> None:
        """Compare, print a line per step and a verdict.

        Raises:
            TraceMismatch: A token differs.
        """
        found: list[ComparedStep] = []
        first, next_row = len(self.trace.prompt_ids) - 1, 0

        def take(rows_NV: npt.NDArray[np.float32]) -> None:
            nonlocal next_row
            for logits_V in rows_NV[max(0, first - next_row) :]:
                found.append(self._compare(len(found), logits_V))
                if not self.as_json:
                    click.echo(found[-1].line)
            next_row += len(rows_NV)

        ids = [*self.trace.prompt_ids, *self.trace.expected_ids[: self.steps - 1]]
        with self.probes.attached(engine.runtime):
            engine.logits(ids, take, self.interrupted)
        self._judge(found)

    def _judge(self, found: Sequence[ComparedStep]) -> None:
        wrong = sum(not step.ok for step in found)
        failure = self.tolerances.verdict(found)
        if self.as_json:
            steps = [step.entries for step in found]
            click.echo(json.dumps({"trace": self.name, "passed": failure is None, "steps": steps}))
        else:
            words = f"{len(found) - wrong} of {len(found)} steps as in {self.name}"
            click.echo(f"{'PASS' if failure is None else 'FAIL'}: {words}{self._largest(found)}")
        self.probes.report()
        if failure is not None:
            raise TraceMismatch(
                f"{self.name}: {failure}: compare model, weight format and numerics with those of the trace's maker"
            )

    def _largest(self, found: Sequence[ComparedStep]) -> str:
        """The largest errors, where they are judged."""
        judged = {"logit rmse": self.tolerances.logit_rmse, "prob mae": self.tolerances.prob_mae}
        words = ""
        for name, limit in judged.items():
            values = [value for step in found if (value := getattr(step, name.replace(" ", "_"))) is not None]
            if limit is not None and values:
                words += f", largest {name} {max(values):.6g} (at most {limit:g})"
        return words

    def _compare(self, step: int, logits_V: npt.NDArray[np.float32]) -> ComparedStep:
        trace, row = self.trace, self.trace.first_row + step
        rmse = mae = None
        if trace.logits_RV is not None and 0 <= row < len(trace.logits_RV):
            rmse = float(np.sqrt(np.mean((logits_V.astype(np.float64) - trace.logits_RV[row]) ** 2)))
        if trace.probabilities_RV is not None and 0 <= row < len(trace.probabilities_RV):
            mae = float(np.mean(np.abs(_softmax(logits_V) - trace.probabilities_RV[row])))
        got = int(logits_V[: self.valid_vocabulary].argmax())
        return ComparedStep(step, trace.expected_ids[step], got, rmse, mae)


def read_trace(name: str, prompt_ids: tuple[int, ...] | None, steps: int, vocabulary: int) -> Trace:
    """Read a trace and cut it into prompt and expected tokens.

    Args:
        name: The base name of `.ids.npy` (and `.logits.npy`, `.probs.npy`), or a `.npy` or `.json` file of ids: prompt
            and answer together, or what `run --json` prints, which needs the prompt beside it.
        prompt_ids: The prompt, if one was given; else the tokens before the first row of logits, or the first one.
        steps: How many steps are asked for.
        vocabulary: Rows of the model's embedding table.

    Raises:
        UsageError: A file cannot be read, or does not fit the prompt, the steps or the model.
    """
    base = name.removesuffix(IDS)
    ids = _read_json(Path(name)) if name.endswith(".json") else _read_ids(base if base != name else name)
    if isinstance(ids, dict):
        ids = _whole_text(name, ids, prompt_ids)
    require_ids(ids, vocabulary, f"{_TRACE} {name}")
    logits_RV = _read_rows(Path(base + LOGITS), len(ids), vocabulary)
    first_row_id = 1 if logits_RV is None or len(logits_RV) == len(ids) else len(ids) - len(logits_RV)
    prompt = prompt_ids or tuple(ids[: max(1, first_row_id)])
    if tuple(ids[: len(prompt)]) != prompt:
        raise UsageError(f"{_TRACE} {name} begins with other tokens than the prompt: leave the prompt out")
    expected = tuple(ids[len(prompt) :])
    if steps > len(expected):
        raise UsageError(
            f"STEPS {steps}: {_TRACE} {name} has {len(expected)} tokens after its prompt of {len(prompt)}: "
            f"give {len(expected)} steps at most"
        )
    probabilities_RV = _read_rows(Path(base + PROBABILITIES), len(ids), vocabulary)
    return Trace(prompt, expected, len(prompt) - first_row_id, logits_RV, probabilities_RV)


def _read_ids(name: str) -> list[int]:
    path = Path(name + IDS) if files.exists(Path(name + IDS)) else Path(name)
    if path.suffix != ".npy" or not files.exists(path):
        raise UsageError(
            f"{_TRACE} {name}: there is no {name}{IDS}, and it is no .npy or .json file of token ids: give the "
            "base name of a trace, or such a file"
        )
    return read_ids(str(path.resolve()), _TRACE)


def _read_json(path: Path) -> Any:
    try:
        found = json.loads(read_text(path, _TRACE))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{_TRACE} {path}: not valid JSON: {error}") from error
    ids = found.get("ids") if isinstance(found, dict) else found
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise UsageError(f"{_TRACE} {path}: expected a list of token ids, or an object with one as `ids`")
    return found


def _whole_text(name: str, found: dict[str, Any], prompt_ids: tuple[int, ...] | None) -> list[int]:
    if prompt_ids is None:
        raise UsageError(
            f"{_TRACE} {name} holds the generated ids alone: give its prompt, too (--prompt or --prompt-ids)"
        )
    return [*prompt_ids, *found["ids"]]


def _read_rows(path: Path, ids: int, vocabulary: int) -> npt.NDArray[Any] | None:
    """Rows of logits or probabilities, mapped; None if there is no such file."""
    if not files.exists(path):
        return None
    try:
        rows_RV: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{_TRACE}: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{_TRACE}: {path}: not an array: {error}") from error
    is_array = isinstance(rows_RV, np.ndarray)  # else the archive of several
    if not is_array or rows_RV.dtype.kind != "f" or rows_RV.ndim != 2 or rows_RV.shape[1] != vocabulary:
        found = f"{rows_RV.dtype} {list(rows_RV.shape)}" if is_array else "an archive"
        raise UsageError(
            f"{_TRACE}: {path}: expected floats [rows, {vocabulary}], a row per token, found {found}: "
            "it is of another model"
        )
    if len(rows_RV) > ids:
        raise UsageError(f"{_TRACE}: {path} has {len(rows_RV)} rows, but the trace {ids} ids: it is of another trace")
    return rows_RV


def _softmax(logits_V: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    exponentials_V = np.exp(logits_V.astype(np.float64) - float(logits_V.max()))
    probabilities_V: npt.NDArray[np.float64] = exponentials_V / exponentials_V.sum()
    return probabilities_V
