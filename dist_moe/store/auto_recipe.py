"""The formats of a model's matrices that cost the least divergence at a given number of bits per weight.

What a format costs a matrix: the divergence that was measured for its group (`Calibration.sensitive_G`), times its
calibrated rounding error over that of the whole group in the format that was measured. Groups add up.

R rows, C columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dist_moe.checkpoint.source import Source
from dist_moe.errors import UsageError
from dist_moe.kernels import Kernels
from dist_moe.kernels.formats import GROUP, MatrixFormat, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.calibrated import CalibratedImportance
from dist_moe.store.calibration import GROUPS_OF_LAYER, REFERENCE, Calibration, Doubles
from dist_moe.store.formats import LayerFormats, ModelFormats, check_formats
from dist_moe.store.rounded import round_weights
from dist_moe.store.units import output_group

_Q4, _Q8, _BF16 = WeightFormat.Q4, WeightFormat.Q8, WeightFormat.BF16
CANDIDATES = (
    *(MatrixFormat(_Q4, group) for group in (128, 64, 32)),
    *(MatrixFormat(_Q8, group) for group in (128, 64, 32)),
    MatrixFormat(_BF16, 0),
)
_BITS = {_Q4: 4, _Q8: 8, _BF16: 16}
_BLOCK_WEIGHTS = 1 << 22  # that are rounded at once

Progress = Callable[[int, int], None]  # matrices done, matrices in all


@dataclass(frozen=True)
class Item:
    """Matrices that get one format: one of attention, gate and up or down of an expert, or lm_head."""

    group: int
    layer: int
    keys: tuple[str, ...]
    expert: int

    def names(self) -> list[str]:
        """Their logical names."""
        if self.keys == ("lm_head",):
            return ["lm_head"]
        inside = f"experts.{self.expert}." if self.keys[0] in ("gate", "up", "down") else ""
        return [f"layers.{self.layer}.{inside}{key}" for key in self.keys]


@dataclass(frozen=True)
class Point:
    """A format of an item: its bits, and the divergence (nats per token) that it is expected to cost."""

    format: MatrixFormat
    bits: int
    cost: float


@dataclass(frozen=True)
class AutoRecipe:
    """What was chosen.

    Attributes:
        formats: Of all matrices.
        bits_per_weight: On average, scales included; at most what was asked for.
        cost: The divergence (nats per token) that is expected of them, as if groups added up.
        uniform: The largest single format that needs no more bits, or the smallest there is.
        uniform_cost: What is expected of that.
    """

    formats: ModelFormats
    bits_per_weight: float
    cost: float
    uniform: MatrixFormat
    uniform_cost: float


def auto_recipe(
    source: Source, calibration: Calibration, target_bits: float, kernels: Kernels, progress: Progress
) -> AutoRecipe:
    """Choose a format for every matrix; the same for the same input on any number of threads.

    Args:
        source: The model.
        calibration: Of it, with sensitivities.
        target_bits: Bits per packed weight at most, on average, scales included.
        kernels: What rounds.
        progress: Told often.

    Raises:
        UsageError: The calibration has no sensitivities, or no format has so few bits, or there is but one.
    """
    require_choice(source)
    if not calibration.sensitive_tokens:
        raise UsageError(
            "--recipe auto: this calibration does not say how sensitive matrices are: make it again with dist-moe "
            "calibrate --sensitivity 1024"
        )
    if not calibration.sensitive_G.any():
        raise UsageError(
            "--recipe auto: in this calibration rounding to q4 changes nothing, as in a store of q4 weights: make it "
            "again in one with exact weights, such as dist-moe shard --quant bf16 makes"
        )
    config = source.config
    candidates, items = usable_candidates(config), list(model_items(config))
    meter, errors = _Meter(source, calibration, kernels), []
    for done, item in enumerate(items):
        errors.append(meter.errors(item, candidates))
        progress(done + 1, len(items))
    points = _points(source, items, candidates, np.array(errors), calibration)
    weights = sum(math.prod(source.shape(name)) for item in items for name in item.names())
    chosen = choose(points, int(target_bits * weights), target_bits)
    formats = _model_formats(config, items, [point.format for point in chosen])
    bits, cost = _sums(chosen)
    sums = [(*_sums(alike), alike[0].format) for alike in zip(*points, strict=True)]
    _, uniform_cost, uniform = max(
        (one for one in sums if one[0] <= target_bits * weights), default=min(sums, key=_bits), key=_bits
    )
    return AutoRecipe(formats, bits / weights, cost, uniform, uniform_cost)


def require_choice(source: Source) -> None:
    """Refuse a model that no quantized format fits, whatever its calibration says; UsageError."""
    if source.config.head_dim % GROUP:
        raise UsageError(
            f"--recipe auto: {source.path}: head_dim {source.config.head_dim} is not a multiple of {GROUP}, as q8 and "
            "q4 need, so there is nothing to choose: use --quant bf16 or --quant f32 for it, without --importance"
        )


def _bits(sums: tuple[int, float, MatrixFormat]) -> int:
    return sums[0]


def _sums(points: Sequence[Point]) -> tuple[int, float]:
    return sum(point.bits for point in points), sum(point.cost for point in points)


def usable_candidates(config: ModelConfig) -> list[MatrixFormat]:
    """Those that the model's shapes can have, together."""
    usable = []
    for found in CANDIDATES:
        try:
            check_formats(config, ModelFormats.uniform(config, found.format, found.group), found.group)
        except UsageError:
            continue
        usable.append(found)
    return usable


def model_items(config: ModelConfig) -> list[Item]:
    """All of a model's, group by group."""
    items, kinds = [], len(GROUPS_OF_LAYER)
    for layer in range(config.layers):
        for kind, keys in enumerate(GROUPS_OF_LAYER):
            experts = config.layer_experts(layer) if keys[0] in ("gate", "down") else 1
            items += [Item(layer * kinds + kind, layer, keys, expert) for expert in range(experts)]
    return [*items, Item(config.layers * kinds, 0, ("lm_head",), 0)]


def choose(points: Sequence[Sequence[Point]], budget_bits: int, target_bits: float) -> list[Point]:
    """One point for each item, of least cost: the steepest steps along each item's convex hull that fit.

    Args:
        points: Of each item.
        budget_bits: For all of them.
        target_bits: For the error message.

    Raises:
        UsageError: The points of fewest bits are too many.
    """
    hulls = [lower_hull(own) for own in points]
    chosen = [0] * len(hulls)
    left = budget_bits - sum(hull[0].bits for hull in hulls)
    if left < 0:
        least = target_bits * (budget_bits - left) / budget_bits
        raise UsageError(f"--target-bits {target_bits:g}: this model needs {least:.3f} at least: give more")
    steps = [
        ((low.cost - high.cost) / (high.bits - low.bits), -item, -place, high.bits - low.bits)
        for item, hull in enumerate(hulls)
        for place, (low, high) in enumerate(pairwise(hull))
    ]
    for _, item, place, bits in sorted(steps, reverse=True):
        if chosen[-item] == -place and bits <= left:
            chosen[-item] += 1
            left -= bits
    return [hull[place] for hull, place in zip(hulls, chosen, strict=True)]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points that no mixture of others beats: more bits, less cost, each step less worth than the one before."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.cost)):
        if hull and point.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(low: Point, high: Point) -> float:
    return (low.cost - high.cost) / (high.bits - low.bits)


class _Meter:
    """The calibrated rounding errors of items."""

    def __init__(self, source: Source, calibration: Calibration, kernels: Kernels) -> None:
        self._source, self._kernels = source, kernels
        self._importance = CalibratedImportance(calibration)

    def errors(self, item: Item, candidates: Sequence[MatrixFormat]) -> Doubles:
        """By REFERENCE, then by the candidates: what the residual gets of it, but for a factor of the item's group.

        A matrix alone: the error's energy in its output. Gate and up: both relative errors, times what the expert adds.
        """
        names = item.names()
        if len(names) == 1:
            return self._rounding(names[0], candidates)[0]
        down = self._rounding(f"layers.{item.layer}.experts.{item.expert}.down", [])[1]
        relative = np.zeros(len(candidates) + 1)
        for name in names:
            errors, energy = self._rounding(name, candidates)
            relative += errors / energy if energy else 0.0
        return relative * down

    def _rounding(self, name: str, candidates: Sequence[MatrixFormat]) -> tuple[Doubles, float]:
        """The energy that a matrix's inputs make of each rounding error, and that they make of the weights."""
        rows, columns = self._source.shape(name)
        importance_C = self._importance.importance_C(name)
        roundings = [(REFERENCE, None), *((found, importance_C) for found in candidates)]
        squares_nC, weights_C = np.zeros((len(roundings), columns)), np.zeros(columns)
        step = max(1, _BLOCK_WEIGHTS // columns)
        for first in range(0, rows, step):
            values_RC = self._source.read(name, slice(first, min(first + step, rows)))
            values_RC = np.where(np.isfinite(values_RC), values_RC, np.float32(0))  # as all formats but f32 keep them
            weights_C += np.einsum("rc,rc->c", values_RC, values_RC)
            for squares_C, (found, weighting_C) in zip(squares_nC, roundings if candidates else [], strict=False):
                group = output_group(self._source.config, found.group) if name.endswith(".o") else found.group
                rounded_RC = round_weights(self._kernels, values_RC, MatrixFormat(found.format, group), weighting_C)
                rounded_RC -= values_RC
                squares_C += np.einsum("rc,rc->c", rounded_RC, rounded_RC)
        input_C = self._importance.mean_energy(name)
        # No product of BLAS: its sums depend on its threads.
        return (squares_nC * input_C).sum(axis=1), float((weights_C * input_C).sum())


def matrix_bits(config: ModelConfig, name: str, shape: tuple[int, int], found: MatrixFormat) -> int:
    """Bits of a matrix's weights and scales, without what packing fills up with zeros."""
    rows, columns = shape
    bits = rows * columns * _BITS[found.format]
    if not found.format.quantized:
        return bits
    parts, group = (config.heads, output_group(config, found.group)) if name.endswith(".o") else (1, found.group)
    return bits + 16 * rows * parts * -(-(columns // parts) // group)


def _points(
    source: Source, items: Sequence[Item], candidates: Sequence[MatrixFormat], errors_in: Doubles, measured: Calibration
) -> list[list[Point]]:
    """Every item's formats with their costs; errors_in is [items, 1 + candidates]."""
    groups = np.array([item.group for item in items])
    reference_G = np.bincount(groups, errors_in[:, 0], minlength=len(measured.sensitive_G))
    with np.errstate(divide="ignore", invalid="ignore"):  # a group of zeros
        factor_G = np.where(reference_G > 0, measured.sensitive_G / measured.sensitive_tokens / reference_G, 0.0)
    points = []
    for item, costs in zip(items, errors_in[:, 1:] * factor_G[groups, np.newaxis], strict=True):
        shapes = [(name, _shape(source, name)) for name in item.names()]
        bits = [sum(matrix_bits(source.config, *named, found) for named in shapes) for found in candidates]
        points.append([Point(*point) for point in zip(candidates, bits, costs.tolist(), strict=True)])
    return points


def _shape(source: Source, name: str) -> tuple[int, int]:
    rows, columns = source.shape(name)
    return rows, columns


def _model_formats(config: ModelConfig, items: Sequence[Item], formats: Sequence[MatrixFormat]) -> ModelFormats:
    found = {(item.layer, item.keys[0], item.expert): own for item, own in zip(items, formats, strict=True)}
    layers = []
    for layer in range(config.layers):
        experts = range(config.layer_experts(layer))
        q, k, v, o = (found[layer, key, 0] for key in "qkvo")
        gate_up, down = (tuple(found[layer, key, expert] for expert in experts) for key in ("gate", "down"))
        layers.append(LayerFormats(q, k, v, o, gate_up, down))
    return ModelFormats(tuple(layers), found[0, "lm_head", 0])
