"""The formats of a model's matrices as a recipe in TOML, which gives the same formats again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from dist_moe.kernels.formats import MatrixFormat, ScaleChoice
from dist_moe.store.formats import ATTENTION_KEYS, ModelFormats

_EXPERT_KEYS = ("gate_up", "down")


def recipe_text(formats: ModelFormats, scales: ScaleChoice, comment: str) -> str:
    """TOML that `parse_recipe` reads.

    Args:
        formats: Of all matrices.
        scales: How scales are chosen.
        comment: What to say of it, one line.
    """
    default = _most_common(formats)
    rules = [_rule([f'kind = "{key}"', f'layers = "{layers}"'], own) for key, layers, own in _attention(formats)]
    for key in _EXPERT_KEYS:
        rules += [_rule([f'kind = "{key}"', *where], own) for where, own in _experts(formats, key)]
    rules.append(_rule(['kind = "lm_head"'], formats.lm_head))
    head = f'# {comment}\n{_lines(default)}scales = "{scales.label}"\n'
    same = _lines(default)
    return head + "".join(rule for rule in rules if not rule.endswith("\n" + same))


def numbers_text(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges: "0-3,7"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _attention(formats: ModelFormats) -> Iterator[tuple[str, str, MatrixFormat]]:
    """Key, layers and format."""
    for key in ATTENTION_KEYS:
        for own, layers in _places([getattr(layer, key) for layer in formats.layers]):
            yield key, layers, own


def _experts(formats: ModelFormats, key: str) -> Iterator[tuple[list[str], MatrixFormat]]:
    """Lines that say where, and the format: layers whose experts are alike share them."""
    of_layers: list[Sequence[MatrixFormat]] = [getattr(layer, key) for layer in formats.layers]
    for different in dict.fromkeys(tuple(own) for own in of_layers):
        layers = numbers_text(number for number, own in enumerate(of_layers) if tuple(own) == different)
        for own, experts in _places(different):
            only = [] if len(set(different)) == 1 else [f'experts = "{experts}"']
            yield [f'layers = "{layers}"', *only], own


def _places(formats: Sequence[MatrixFormat]) -> Iterator[tuple[MatrixFormat, str]]:
    for own in dict.fromkeys(formats):
        yield own, numbers_text(number for number, found in enumerate(formats) if found == own)


def _most_common(formats: ModelFormats) -> MatrixFormat:
    counts = Counter(found for layer in formats.layers for found in layer.all())
    return max(counts, key=lambda found: (counts[found], found.format, found.group))


def _rule(where: Sequence[str], own: MatrixFormat) -> str:
    return "\n[[rule]]\n" + "\n".join(where) + "\n" + _lines(own)


def _lines(own: MatrixFormat) -> str:
    group = f"group = {own.group}\n" if own.format.quantized else ""
    return f'format = "{own.format.label}"\n{group}'
