"""The .npz file of `--routing`: written step by step, read back in bounded memory.

Arrays, one row per token that was computed, in the order of the steps: `experts` int16 [tokens, layers, K], best first,
-1 in dense layers; `weights` float32 [tokens, layers, K]; `ids`, `positions`, `sequence` and `step` int32 [tokens].
`facts` is a JSON text: `RoutingFacts`, and the format's version.

Shape suffixes: T tokens, L layers, K experts per token.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.cli.npz_arrays import NpzArrays
from dist_moe.cli.npz_reading import RowStream, open_npz, read_array
from dist_moe.engine.routing.routing_facts import RoutingFacts
from dist_moe.engine.routing.routing_record import RoutingBatch
from dist_moe.errors import UsageError

FORMAT_VERSION = 1
LARGEST_SIZE = 32767  # experts are int16

_MAKE_ONE = "make one with dist-moe run --routing OUT.npz"


class RoutingFile:
    """A record that is being written; a context manager, see `NpzArrays`."""

    def __init__(self, path: Path, facts: RoutingFacts) -> None:
        """Prepare an empty record.

        Raises:
            UsageError: The file cannot be written.
        """
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(facts)}, ensure_ascii=False)
        self._arrays = NpzArrays(path, {"facts": np.array(text)})

    def append(self, batch: RoutingBatch) -> None:
        """Write one step (a sink of `RoutingRecorder`)."""
        self._arrays.append(
            {
                "experts": batch.experts_TLK,
                "weights": batch.weights_TLK,
                "ids": batch.ids_T,
                "positions": batch.position_T,
                "sequence": batch.sequence_T,
                "step": np.full(len(batch.ids_T), batch.step, np.int32),
            }
        )

    def __enter__(self) -> RoutingFile:
        """Return the record itself."""
        self._arrays.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the file, or nothing after an error."""
        self._arrays.__exit__(kind, error, trace)


class RoutingReader:
    """A record on disk, checked; the picks are read one step at a time."""

    def __init__(self, path: Path) -> None:
        """Read all but the picks.

        Raises:
            UsageError: The file cannot be read, or is no record of the routing.
        """
        self.path = path
        with self._reading() as archive:
            self.facts = self._read_facts(archive)
            self._step_T = read_array(archive, "step")
            shape = _open_experts(archive).shape
        expected = (len(self._step_T), self.facts.layers, self.facts.experts_per_token)
        if shape != expected:
            raise UsageError(f"{path}: experts has the shape {shape}, but its facts say {expected}: {_MAKE_ONE}")

    @property
    def tokens(self) -> int:
        """Tokens of the record."""
        return len(self._step_T)

    def steps(self) -> Iterator[npt.NDArray[Any]]:
        """The experts of one step after the other, [T, L, K].

        Raises:
            UsageError: The file is damaged.
        """
        ends = [*(np.flatnonzero(np.diff(self._step_T)) + 1).tolist(), len(self._step_T)]
        with self._reading() as archive:
            rows = _open_experts(archive)
            first = 0
            for end in ends:
                experts_TLK = rows.read(end - first)
                self._check_range(experts_TLK)
                yield experts_TLK
                first = end

    def _check_range(self, experts_TLK: npt.NDArray[Any]) -> None:
        routed = experts_TLK[:, list(self.facts.routed_layers)]
        if routed.size and not 0 <= int(routed.min()) <= int(routed.max()) < self.facts.experts:
            raise UsageError(
                f"{self.path}: an expert {int(routed.min())} or {int(routed.max())} is not one of 0 to "
                f"{self.facts.experts - 1}: the file is damaged: {_MAKE_ONE}"
            )

    def _read_facts(self, archive: zipfile.ZipFile) -> RoutingFacts:
        entries: dict[str, Any] = dict(json.loads(str(read_array(archive, "facts"))))
        version = entries.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{self.path}: a record of version {version}, but this program reads {FORMAT_VERSION}: make it again"
            )
        known = {field.name for field in fields(RoutingFacts)}
        facts: dict[str, Any] = {}
        for name, value in entries.items():
            facts[name] = tuple(value) if isinstance(value, list) else value
        found = RoutingFacts(**{name: value for name, value in facts.items() if name in known})
        _require_sizes(found)
        return found

    def _reading(self) -> AbstractContextManager[zipfile.ZipFile]:
        return open_npz(self.path, "a record of a run's routing", _MAKE_ONE)


def _open_experts(archive: zipfile.ZipFile) -> RowStream:
    rows = RowStream.open(archive, "experts")
    if rows.dtype.kind != "i":
        raise ValueError(f"its experts are {rows.dtype}, not integers")
    return rows


def read_records(paths: list[Path]) -> list[RoutingReader]:
    """Open records of one model.

    Raises:
        UsageError: One cannot be read, is there twice, or is of another model than the first.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("the same file is given twice: its tokens would be counted twice; give each once")
    records = [RoutingReader(path) for path in paths]
    for record in records[1:]:
        if record.facts.of_the_model != records[0].facts.of_the_model:
            raise UsageError(
                f"{record.path} is of another model than {records[0].path} ({_describe(record.facts)}; "
                f"{_describe(records[0].facts)}): give records of one model"
            )
    return records


def _require_sizes(facts: RoutingFacts) -> None:
    """Refuse facts that no job wrote, before arrays of those sizes are made.

    Raises:
        ValueError, TypeError: One is no number from 1 to LARGEST_SIZE, no text, or names layers that are not there.
    """
    for name in ("layers", "experts", "experts_per_token", "chunks_per_expert", "ranks"):
        size = getattr(facts, name)
        if type(size) is not int or not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"{name}: expected a number from 1 to {LARGEST_SIZE}, found {size!r}")
    if not isinstance(facts.model, str) or not isinstance(facts.layout, str):
        raise TypeError(f"expected texts for model and layout, found {facts.model!r} and {facts.layout!r}")
    if not facts.routed_layers or sorted({*facts.routed_layers} & {*range(facts.layers)}) != [*facts.routed_layers]:
        raise ValueError(f"routed_layers: expected layers below {facts.layers}, found {facts.routed_layers!r}")


def _describe(facts: RoutingFacts) -> str:
    return (
        f"{facts.model}: {facts.layers} layers, {facts.experts} experts of {facts.chunks_per_expert} chunks, "
        f"{facts.experts_per_token} per token"
    )
