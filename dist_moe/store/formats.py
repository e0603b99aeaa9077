"""The format of every packed matrix of a model: which of them a store keeps in how many bits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from dist_moe.errors import UsageError
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.units import check_format, chunks_per_expert, output_group

ATTENTION_KEYS = ("q", "k", "v", "o")
PARTS = ("attention", "experts", "lm_head")  # a dense MLP counts as experts
_LABEL = re.compile(r"(f32|bf16)|(q8|q4)g(0|32|64|128)")
_NAME = re.compile(r"layers\.(\d+)\.(?:experts\.(\d+)\.)?(\w+)")
_BITS = {WeightFormat.F32: 32, WeightFormat.BF16: 16, WeightFormat.Q8: 8, WeightFormat.Q4: 4}
_SCALE_BITS = 16


@dataclass(frozen=True)
class LayerFormats:
    """Of one layer; `gate_up` and `down` per expert, a dense MLP is one. Groups are as a user gives them."""

    q: MatrixFormat
    k: MatrixFormat
    v: MatrixFormat
    o: MatrixFormat
    gate_up: tuple[MatrixFormat, ...]
    down: tuple[MatrixFormat, ...]

    def matrix(self, key: str, expert: int) -> MatrixFormat:
        """As `ModelFormats.matrix`."""
        if key == "down":
            return self.down[expert]
        found: MatrixFormat = self.gate_up[expert] if key in ("gate", "up") else getattr(self, key)
        return found

    def all(self) -> Iterator[MatrixFormat]:
        """Every matrix, gate and up as one."""
        yield from (self.q, self.k, self.v, self.o, *self.gate_up, *self.down)


@dataclass(frozen=True)
class ModelFormats:
    """Of all packed matrices; router and embedding are not among them.

    Groups are as a user gives them: those of o become `output_group` of them, as `Manifest.matrix_format` says. f32 and
    bf16 have group 0.
    """

    layers: tuple[LayerFormats, ...]
    lm_head: MatrixFormat

    @classmethod
    def uniform(cls, config: ModelConfig, fmt: WeightFormat, group: int) -> ModelFormats:
        """All matrices alike."""
        one = matrix_format(fmt, group)

        counts = [config.layer_experts(layer) for layer in range(config.layers)]
        layers = {n: LayerFormats(one, one, one, one, (one,) * n, (one,) * n) for n in set(counts)}
        return cls(tuple(layers[count] for count in counts), one)

    def matrix(self, key: str, layer: int, expert: int = 0) -> MatrixFormat:
        """How a matrix is packed, the group of o as a user gives it.

        Args:
            key: "q", "k", "v", "o", "gate", "up", "down" or "lm_head"; gate and up of an expert are packed alike.
            layer: Its layer; of lm_head anything.
            expert: Of gate, up and down; a dense MLP is expert 0.
        """
        return self.lm_head if key == "lm_head" else self.layers[layer].matrix(key, expert)

    def of_name(self, name: str) -> MatrixFormat:
        """As `matrix`, of a logical name such as "layers.0.experts.3.down" or "lm_head"."""
        found = _NAME.fullmatch(name)
        return self.matrix(found[3], int(found[1]), int(found[2] or 0)) if found else self.lm_head

    def named_places(self) -> Iterator[tuple[str, tuple[str, int, int]]]:
        """Every matrix's logical name and what `matrix` takes for it; a dense MLP is expert 0."""
        for key, layer, expert in _places(self):
            inside = "" if _part(key) != "experts" else f"experts.{expert}."
            yield key if key == "lm_head" else f"layers.{layer}.{inside}{key}", (key, layer, expert)

    @cached_property
    def uniform_format(self) -> MatrixFormat | None:
        """The format of all matrices; None if they have several."""
        return self.lm_head if len(self.distinct) == 1 else None

    @cached_property
    def distinct(self) -> frozenset[MatrixFormat]:
        """Every format that a matrix has."""
        return frozenset(found for layer, _ in self._unlike_layers for found in layer.all()) | {self.lm_head}

    @cached_property
    def group_size(self) -> int | None:
        """The largest group, which decides the width of chunks; None if nothing is quantized."""
        return max((found.group for found in self.distinct if found.format.quantized), default=None)

    @cached_property
    def quantized(self) -> bool:
        """Whether any matrix is."""
        return any(found.format.quantized for found in self.distinct)

    @cached_property
    def default_scales(self) -> ScaleChoice:
        """How scales are chosen when nobody says it: q4 gains much from a search, q8 next to nothing."""
        has_q4 = any(found.format == WeightFormat.Q4 for found in self.distinct)
        return ScaleChoice.MSE if has_q4 else ScaleChoice.ABSMAX

    @cached_property
    def main(self) -> WeightFormat:
        """The format of most of the experts' weights, of equals the smaller one."""
        counts = Counter[WeightFormat]()
        for layer, times in self._unlike_layers:
            for own, weight in ((layer.gate_up, 2), (layer.down, 1)):
                for found, number in Counter(own).items():
                    counts[found.format] += weight * number * times
        return max(counts, key=lambda fmt: (counts[fmt], fmt))

    @property
    def label(self) -> str:
        """What to call them: "q4", or "q4-mixed" if some are of another format or group."""
        return self.main.label + ("" if self.uniform_format else "-mixed")

    def bits_per_weight(self, config: ModelConfig) -> float:
        """Of the packed matrices: bits of weights and scales, without what packing fills up with zeros."""
        parts = self.bits_by_part(config).values()
        return sum(bits for bits, _ in parts) / sum(weights for _, weights in parts)

    def bits_by_part(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """Bits (as in `bits_per_weight`) and weights of "attention", "experts" and "lm_head"."""
        parts = dict.fromkeys(PARTS, (0, 0))
        for key, layer, expert in _places(self):
            part = _part(key)
            bits, weights = _matrix_bits(config, self, key, layer, expert)
            parts[part] = (parts[part][0] + bits, parts[part][1] + weights)
        return parts

    def counts_by_part(self) -> dict[str, Counter[MatrixFormat]]:
        """How many matrices of each part have which format."""
        parts = {part: Counter[MatrixFormat]() for part in PARTS}
        for key, layer, expert in _places(self):
            parts[_part(key)][self.matrix(key, layer, expert)] += 1
        return parts

    def to_json(self) -> dict[str, Any]:
        """A short form: runs of equal layers, in them runs of equal experts."""
        layers, first = [], 0
        for layer, same in groupby(self.layers):
            stop = first + len(list(same))
            fields = {key: format_label(getattr(layer, key)) for key in ATTENTION_KEYS}
            runs = {"gate_up": _runs_text(layer.gate_up), "down": _runs_text(layer.down)}
            layers.append({"first_layer": first, "stop_layer": stop, **fields, **runs})
            first = stop
        return {"lm_head": format_label(self.lm_head), "layers": layers}

    @cached_property
    def _unlike_layers(self) -> list[tuple[LayerFormats, int]]:
        """Layers that are different objects, and how often each stands in the model."""
        layers = {id(layer): layer for layer in self.layers}
        return [(layers[key], times) for key, times in Counter(map(id, self.layers)).items()]


def matrix_format(fmt: WeightFormat, group: int) -> MatrixFormat:
    """With group 0 where there are no scales."""
    return MatrixFormat(fmt, group if fmt.quantized else 0)


def format_label(found: MatrixFormat) -> str:
    """Such as "bf16", "q4g32", or "q8g0" for scales of whole rows."""
    return f"{found.format.label}g{found.group}" if found.format.quantized else found.format.label


def format_words(found: MatrixFormat) -> str:
    """For people: "bf16", "q4, groups of 32" or "q8, whole rows"."""
    if not found.format.quantized:
        return found.format.label
    return f"{found.format.label}, {f'groups of {found.group}' if found.group else 'whole rows'}"


def label_words(label: str) -> str:
    """`format_words` of what `format_label` wrote; anything else as it is."""
    found = parse_label(label)
    return label if found is None else format_words(found)


def check_formats(config: ModelConfig, formats: ModelFormats, group_size: int) -> None:
    """Refuse formats that a store of this model cannot have together.

    Args:
        config: The model.
        formats: Of all its matrices.
        group_size: Of the store: the largest group, which decides chunk widths.

    Raises:
        UsageError: Groups do not go together or do not fit the model's shapes; says what works.
    """
    groups = {found.group for found in formats.distinct if found.format.quantized}
    listed = " and ".join(map(str, sorted(groups)))
    if 0 in groups and len(groups) > 1:
        raise UsageError(f"groups of {listed} in a store: whole rows (0) go with no other size; give only 0, or none")
    if unfit := [group for group in sorted(groups) if group and (group_size == 0 or group_size % group)]:
        raise UsageError(
            f"groups of {unfit[0]} in a store with chunks for groups of {group_size}; give sizes that divide it"
        )
    experts = [config.layer_experts(layer) for layer in range(config.layers)]
    told = [(len(layer.gate_up), len(layer.down)) for layer in formats.layers]
    if told != [(count, count) for count in experts]:
        raise UsageError("these formats are of a model with other layers or experts; make them for this one")
    largest = max((found.format for found in formats.distinct), key=lambda fmt: fmt.quantized)
    check_format(config, largest, group_size)


def parse_label(label: str) -> MatrixFormat | None:
    """What `format_label` wrote; None if it is something else."""
    found = _LABEL.fullmatch(label)
    if found is None:
        return None
    return MatrixFormat(WeightFormat.parse(found[1] or found[2]), int(found[3] or 0))


def _runs_text(formats: Sequence[MatrixFormat]) -> str:
    return ",".join(f"{len(list(same))}*{format_label(found)}" for found, same in groupby(formats))


def _part(key: str) -> str:
    return "lm_head" if key == "lm_head" else "attention" if key in ATTENTION_KEYS else "experts"


def _places(formats: ModelFormats) -> Iterator[tuple[str, int, int]]:
    for layer, found in enumerate(formats.layers):
        yield from ((key, layer, 0) for key in ATTENTION_KEYS)
        yield from ((key, layer, expert) for expert in range(len(found.down)) for key in ("gate", "up", "down"))
    yield "lm_head", 0, 0


def _matrix_bits(config: ModelConfig, formats: ModelFormats, key: str, layer: int, expert: int) -> tuple[int, int]:
    """Bits of one matrix, and its weights."""
    found, D, P = formats.matrix(key, layer, expert), config.model_dim, config.head_dim
    hidden, slices, group = config.layer_hidden(layer), 1, found.group
    if key == "o":
        rows, columns, slices, group = D, P * config.heads, config.heads, output_group(config, group)
    elif key == "down":
        rows, columns, slices = D, hidden, 1 if group else chunks_per_expert(config, 0, layer)
    else:
        rows_of = {"q": P * config.heads, "k": P * config.kv_heads, "v": P * config.kv_heads}
        rows, columns = {**rows_of, "gate": hidden, "up": hidden, "lm_head": config.vocabulary}[key], D
    scales = rows * slices * (-(-(columns // slices) // group) if group else 1) if found.format.quantized else 0
    return rows * columns * _BITS[found.format] + scales * _SCALE_BITS, rows * columns
