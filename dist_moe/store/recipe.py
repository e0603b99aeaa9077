"""Recipes: rules that give each matrix of a model its format."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dist_moe.errors import UsageError
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.formats import ATTENTION_KEYS, LayerFormats, ModelFormats, matrix_format

DEFAULT_GROUP = 32
KINDS: dict[str, tuple[str, ...]] = {
    **{key: (key,) for key in ATTENTION_KEYS},
    "attention": ATTENTION_KEYS,
    "gate_up": ("gate", "up"),
    "down": ("down",),
    "experts": ("gate", "up", "down"),
    "lm_head": ("lm_head",),
}
_RANGE = re.compile(r"(\d{1,7})(-)?(\d{1,7})?")


@dataclass(frozen=True)
class Rule:
    """What fits all that it names gets its format or group; None is anything.

    Attributes:
        where: What errors call it.
        keys: Of matrices, such as "q" or "gate".
        layers: Text such as "0-3,40-".
        experts: The same; fits only matrices of experts.
        regex: Matches whole logical names, such as "layers.3.experts.5.down".
        format: What they get; None leaves it.
        group: The same.
    """

    where: str
    keys: frozenset[str] | None
    layers: str | None
    experts: str | None
    regex: re.Pattern[str] | None
    format: WeightFormat | None
    group: int | None

    @cached_property
    def layer_numbers(self) -> Numbers:
        """As numbers."""
        return Numbers(self.layers)

    @cached_property
    def expert_numbers(self) -> Numbers:
        """As numbers."""
        return Numbers(self.experts)

    def fits(self, name: str, key: str, layer: int | None, expert: int | None) -> bool:
        """Whether a matrix gets what the rule says."""
        return (
            (self.keys is None or key in self.keys)
            and (self.layers is None or (layer is not None and layer in self.layer_numbers))
            and (self.experts is None or (expert is not None and expert in self.expert_numbers))
            and (self.regex is None or self.regex.fullmatch(name) is not None)
        )


@dataclass(frozen=True)
class Recipe:
    """A read recipe; `group` and `scales` are None where it leaves them to the command."""

    where: str
    format: WeightFormat
    group: int | None
    scales: ScaleChoice | None
    rules: tuple[Rule, ...]

    def formats(self, config: ModelConfig, group: int | None = None) -> ModelFormats:
        """The format of each matrix of a model; `group`, if given, takes the place of the recipe's own default.

        Raises:
            UsageError: A rule fits no matrix of this model, or would pack gate and up differently.
        """
        default = group if group is not None else DEFAULT_GROUP if self.group is None else self.group
        for rule in self.rules:
            rule.layer_numbers.check(f"{rule.where}: layers", "layer", config.layers)
            rule.expert_numbers.check(f"{rule.where}: experts", "expert", max(1, config.experts))
        fitting = _Fitting(self, default)
        layers = tuple(fitting.layer(config, layer) for layer in range(config.layers))
        found = ModelFormats(layers, fitting.of("lm_head", "lm_head"))
        fitting.require_all()
        return found


class _Fitting:
    """The rules of a recipe, applied to one matrix after another."""

    def __init__(self, recipe: Recipe, group: int) -> None:
        self._recipe = recipe
        self._group = group
        self._used: set[int] = set()

    def layer(self, config: ModelConfig, layer: int) -> LayerFormats:
        """Of a layer's matrices."""
        q, k, v, o = (self.of(f"layers.{layer}.{key}", key, layer) for key in ATTENTION_KEYS)
        experts = [self._expert(layer, expert) for expert in range(config.layer_experts(layer))]
        return LayerFormats(q, k, v, o, tuple(gate for gate, _ in experts), tuple(down for _, down in experts))

    def of(self, name: str, key: str, layer: int | None = None, expert: int | None = None) -> MatrixFormat:
        """Of one matrix: the last rule that fits decides."""
        fmt, group = self._recipe.format, self._group
        for number, rule in enumerate(self._recipe.rules):
            if rule.fits(name, key, layer, expert):
                self._used.add(number)
                fmt = fmt if rule.format is None else rule.format
                group = group if rule.group is None else rule.group
        return matrix_format(fmt, group)

    def require_all(self) -> None:
        """Refuse a rule that fits nothing."""
        for number, rule in enumerate(self._recipe.rules):
            if number not in self._used:
                raise UsageError(
                    f"{rule.where}: fits no matrix of this model; names are such as layers.0.q, "
                    "layers.0.experts.0.gate (or up, or down) and lm_head, and a regex must match the whole name"
                )

    def _expert(self, layer: int, expert: int) -> tuple[MatrixFormat, MatrixFormat]:
        prefix = f"layers.{layer}.experts.{expert}"
        gate, up, down = (self.of(f"{prefix}.{key}", key, layer, expert) for key in ("gate", "up", "down"))
        if gate != up:
            raise UsageError(
                f"{self._recipe.where}: {prefix} would get another format for gate than for up, which are packed "
                'alike; let a rule fit both or none, as kind = "gate_up" does'
            )
        return gate, down


class Numbers:
    """Numbers from a text such as "0-3,40-"; None is no text, whose numbers nobody asks for."""

    def __init__(self, text: str | None) -> None:
        self._text = text
        self._ranges = list(ranges(text or ""))

    def __contains__(self, number: int) -> bool:
        return any(first <= number <= (number if last is None else last) for first, last in self._ranges)

    def check(self, where: str, what: str, count: int) -> None:
        """Refuse numbers from `count` on."""
        for first, last in self._ranges:
            if (most := first if last is None else last) >= count:
                raise UsageError(f"{where} = {self._text!r}: this model has no {what} {most}; give 0 to {count - 1}")


def ranges(text: str) -> Iterator[tuple[int, int | None]]:
    """First and last of each part of a text such as "0-3,40-"; None is no end. ValueError if it is none such."""
    for part in text.split(",") if text else ():
        found = _RANGE.fullmatch(part.strip())
        if found is None or (found[3] and not found[2]) or (found[3] and int(found[3]) < int(found[1])):
            raise ValueError(part)
        yield int(found[1]), (int(found[3]) if found[3] else None) if found[2] else int(found[1])
