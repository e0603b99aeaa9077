"""The formats of a store's matrices, read from its manifest."""

from __future__ import annotations

from dist_moe.errors import UsageError
from dist_moe.kernels.formats import MatrixFormat, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.fields import Fields
from dist_moe.store.formats import ATTENTION_KEYS, LayerFormats, ModelFormats, check_formats, parse_label

MOST_EXPERTS = 1 << 20  # of all layers
_RUNS = r"[1-9]\d{0,6}\*[a-z0-9]{1,8}(?:,[1-9]\d{0,6}\*[a-z0-9]{1,8}){0,8191}"


def read_formats(entry: Fields, config: ModelConfig, group_size: int, *, mixed: bool) -> ModelFormats:
    """What a manifest says of its matrices.

    Args:
        entry: The manifest.
        config: Its model.
        group_size: Of the store.
        mixed: Whether it says each matrix's format, not one for all.

    Raises:
        StoreError: These are no formats, or none that go together.
    """
    if mixed:
        formats = _read_runs(entry.object("formats"), config)
        entry.require(entry.text("weights") == formats.label, f"'weights' must be {formats.label!r}")
        entry.require(formats.group_size in (None, group_size), "'group_size' must be the largest of its formats")
    else:
        label = entry.choice("weights", [fmt.label for fmt in WeightFormat])
        formats = ModelFormats.uniform(config, WeightFormat.parse(label), group_size)
    try:
        check_formats(config, formats, group_size)
    except UsageError as error:
        entry.require(False, str(error))
    return formats


def _read_runs(entry: Fields, config: ModelConfig) -> ModelFormats:
    """Read what `to_json` wrote; raises StoreError if it is something else."""
    entry.require(config.layers * max(1, config.experts) <= MOST_EXPERTS, "is of more experts than any store has")
    lm_head = _format(entry, "lm_head")
    layers: list[LayerFormats] = []
    for part in entry.objects("layers"):
        first, stop = (part.integer(key, 0, config.layers) for key in ("first_layer", "stop_layer"))
        part.require(first == len(layers) < stop, f"its layers {first} to {stop} do not follow {len(layers)}")
        q, k, v, o = (_format(part, key) for key in ATTENTION_KEYS)
        experts = config.layer_experts(first)
        part.require(all(config.layer_experts(layer) == experts for layer in range(first, stop)), "joins unlike layers")
        gate_up, down = (_experts(part, key, experts) for key in ("gate_up", "down"))
        part.done()
        layers += [LayerFormats(q, k, v, o, gate_up, down)] * (stop - first)
    entry.done()
    entry.require(len(layers) == config.layers, f"has {len(layers)} layers of {config.layers}")
    return ModelFormats(tuple(layers), lm_head)


def _format(entry: Fields, key: str) -> MatrixFormat:
    text = entry.text(key, r"[a-z0-9]{1,8}")
    found = parse_label(text)
    entry.require(found is not None, f"{key!r} is the unknown format {text!r}")
    assert found is not None
    return found


def _experts(entry: Fields, key: str, experts: int) -> tuple[MatrixFormat, ...]:
    found: list[MatrixFormat] = []
    for run in entry.text(key, _RUNS).split(","):
        count, label = run.split("*")
        fmt = parse_label(label)
        if fmt is None or int(count) > experts - len(found):
            break
        found += [fmt] * int(count)
    entry.require(len(found) == experts, f"{key!r} must hold runs of known formats, together {experts} experts")
    return tuple(found)
