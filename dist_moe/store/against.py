"""How far a store's weights are from those of its source, and whether its scales and groups make sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from dist_moe.checkpoint.source import Source
from dist_moe.errors import UsageError
from dist_moe.store.decoded import DecodedStore, Floats, Scales, Slice
from dist_moe.store.formats import format_words


@dataclass
class Errors:
    """Sums over weights; two of them can be added up.

    Attributes:
        tensors: How many.
        weights: Those that are finite in the source.
        nonfinite: The others.
        largest: The largest error.
        error_squares: Of store - source; `source_squares`, `store_squares` and `products` are sums of those.
        scales: Scales of q8 and q4.
        bad_scales: Of those, NaN or infinite.
        empty_groups: Groups whose scale is 0 and whose source is not: all their weights are lost.
        wrong_groups: Groups that are farther from the source than zeros would be, which no rounding does.
        padding: Values that are not 0 where the packing fills up.
    """

    tensors: int = 0
    weights: int = 0
    nonfinite: int = 0
    largest: float = 0.0
    error_squares: float = 0.0
    source_squares: float = 0.0
    store_squares: float = 0.0
    products: float = 0.0
    scales: int = 0
    bad_scales: int = 0
    empty_groups: int = 0
    wrong_groups: int = 0
    padding: int = 0

    @property
    def rms(self) -> float:
        """Root mean square of the error."""
        return math.sqrt(self.error_squares / max(1, self.weights))

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the source; 0 for a source of zeros that is kept."""
        if not self.error_squares:
            return 0.0
        return math.sqrt(self.error_squares / self.source_squares) if self.source_squares else math.inf

    @property
    def cosine(self) -> float:
        """Of the angle between source and store; 1 where both are equal."""
        if not self.error_squares:
            return 1.0
        lengths = math.sqrt(self.source_squares) * math.sqrt(self.store_squares)
        return self.products / lengths if lengths else 0.0

    def add(self, other: Errors) -> None:
        """Add the sums of other weights."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(ours, theirs) if field.name == "largest" else ours + theirs)

    def problems(self) -> list[str]:
        """What no sound store has, in words."""
        found = {
            "scales that are NaN or infinite": self.bad_scales,
            "groups farther from the source than zeros would be": self.wrong_groups,
            "values beside their matrix that are not 0": self.padding,
        }
        return [f"{count} {words}" for words, count in found.items() if count]


@dataclass(frozen=True)
class TensorErrors:
    """One tensor by its logical and its Hugging Face name, and how the store keeps it ("q4, groups of 32")."""

    name: str
    tensor: str
    format: str
    errors: Errors

    @property
    def layer(self) -> int | None:
        """None outside the layers."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def kind(self) -> str:
        """The last part of its name, such as "q" or "down"; "norms" for all norms, "biases" for all biases."""
        last = self.name.split(".")[-1]
        return "norms" if last.endswith("_norm") else "biases" if last.endswith("_bias") else last


def compare(decoded: DecodedStore, source: Source, progress: Callable[[int], object]) -> Iterator[TensorErrors]:
    """Compare every tensor with the source's, in the order of the forward pass.

    Args:
        decoded: The store; all its shards must be here.
        source: What it was made from, or another version of the same model.
        progress: Called with every number of weights compared.

    Raises:
        UsageError: The source is another model.
        StoreError: A shard is not here, or a unit is damaged.
    """
    check_same_model(decoded, source)
    for name in decoded.names():
        decoded.require(name)
    for name in decoded.names():
        total = Errors(tensors=1)
        for part in decoded.slices(name):
            columns = None if len(decoded.shape(name)) == 1 or part.columns == slice(None) else part.columns
            total.add(_errors(part, source.read(name, part.rows, columns)))
            progress(part.values.size)
        yield TensorErrors(name, decoded.tensor(name), _label(decoded, name, total), total)


def check_same_model(decoded: DecodedStore, source: Source) -> None:
    """Raise UsageError unless the source has the store's tensors."""
    theirs = {name: tuple(source.shape(name)) for name in source.names()}
    ours = {name: tuple(decoded.shape(name)) for name in decoded.names()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            words = [f"of shape {list(shape)}" if shape else "absent" for shape in (ours.get(name), theirs.get(name))]
            raise UsageError(
                f"{source.path}: is another model than the store's {decoded.manifest.source_name}: {name} is "
                f"{words[0]} in the store and {words[1]} there; give the checkpoint that the store was made from"
            )


def grouped(tensors: Iterable[TensorErrors], with_layer: bool) -> list[tuple[int | None, str, str, Errors]]:
    """Errors by layer (or over all layers), kind and format, in the order of their first appearance."""
    groups: dict[tuple[int | None, str, str], Errors] = {}
    for tensor in tensors:
        key = (tensor.layer if with_layer else None, tensor.kind, tensor.format)
        groups.setdefault(key, Errors()).add(tensor.errors)
    return [(*key, errors) for key, errors in groups.items()]


def _errors(part: Slice, expected: Floats) -> Errors:
    finite = np.isfinite(expected)
    lost = expected.size - int(np.count_nonzero(finite))
    own = part.values
    if lost:
        expected, own = np.where(finite, expected, np.float32(0)), np.where(finite, own, np.float32(0))
    error = own.astype(np.float64) - expected
    squares, expected_squares = error * error, np.square(expected, dtype=np.float64)
    errors = Errors(
        weights=expected.size - lost,
        nonfinite=lost,
        largest=float(np.abs(error).max(initial=0.0)),
        error_squares=float(squares.sum()),
        source_squares=float(expected_squares.sum()),
        store_squares=float(np.square(own, dtype=np.float64).sum()),
        products=float((own * expected.astype(np.float64)).sum()),
        padding=part.padding,
    )
    if part.scales is not None:
        errors.add(_group_errors(part.scales, squares, expected_squares))
    return errors


def _group_errors(scales: Scales, error_RC: np.ndarray, source_RC: np.ndarray) -> Errors:
    """From the squares of errors and of the source."""
    columns = error_RC.shape[1]
    starts = np.arange(0, columns, scales.group or columns)
    error_RG, source_RG = (np.add.reduceat(squares, starts, axis=1) for squares in (error_RC, source_RC))
    scale_RG = scales.scale_RG[:, : len(starts)]
    return Errors(
        scales=scale_RG.size,
        bad_scales=int(np.count_nonzero(~np.isfinite(scale_RG))),
        empty_groups=int(np.count_nonzero((scale_RG == 0) & (source_RG > 0))),
        wrong_groups=int(np.count_nonzero(error_RG > source_RG)),
    )


def _label(decoded: DecodedStore, name: str, errors: Errors) -> str:
    found = decoded.format(name)
    return format_words(found) if errors.scales else found.format.label
