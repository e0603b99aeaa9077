"""The rotary settings of a config.json, in the old (rope_theta, rope_scaling) and new (rope_parameters) spelling."""

from __future__ import annotations

from dist_moe.checkpoint.fields import Fields
from dist_moe.checkpoint.rope import RopeSettings, Yarn

COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
YARN_KEYS = frozenset(Yarn.__dataclass_fields__)
ADVICE = "dist-moe runs plain rotary embeddings and YaRN"


def rope_settings(fields: Fields, head_dim: int, max_positions: int) -> RopeSettings:
    """The rotary settings; where keys repeat, transformers' order of precedence decides.

    `rope_scaling` goes before `rope_parameters`, and a `rope_theta` inside either before the top-level one.

    Raises:
        CheckpointError: If the base is missing, the type is neither "default" nor "yarn", a key is unknown or a
            value is out of range.
    """
    inner = rope_object(fields)
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    if kind not in ("default", "yarn"):
        key = "rope_type" if "rope_type" in inner.values else "type"
        raise inner.refusal(key, '"default" or "yarn"', ADVICE)
    known = COMMON_KEYS | YARN_KEYS if kind == "yarn" else COMMON_KEYS
    for key in sorted(set(inner.values) - known):
        raise inner.refusal(key, f'no such key for rope_type "{kind}"', ADVICE)
    for place in (inner, fields):
        if place.has("partial_rotary_factor") and place.number("partial_rotary_factor") != 1:
            raise place.refusal("partial_rotary_factor", "1", "dist-moe rotates whole heads only")
    theta = (inner if inner.has("rope_theta") else fields).number("rope_theta", above=1)
    return RopeSettings(head_dim, theta, yarn_settings(fields, inner, max_positions) if kind == "yarn" else None)


def rope_object(fields: Fields) -> Fields:
    """The object that transformers would use: the first that is neither null nor empty, or an empty one."""
    for key in ("rope_scaling", "rope_parameters"):
        value = fields.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise fields.refusal(key, "an object or null")
        if value:
            return Fields(f"{fields.where}: {key}", value)
    return Fields(f"{fields.where}: rope_parameters", {})


def yarn_settings(fields: Fields, inner: Fields, max_positions: int) -> Yarn:
    """YaRN's settings with transformers' defaults; a zero beta or mscale counts as absent, as it does there."""
    outside = fields.has("original_max_position_embeddings")
    original = (fields if outside else inner).integer("original_max_position_embeddings", default=max_positions)
    if "factor" not in inner.values:
        raise inner.refusal("factor", "a number above 0, or null for the ratio of the context lengths")
    factor = inner.optional_number("factor")
    return Yarn(
        factor=max_positions / original if factor is None else factor,
        original_max_position_embeddings=original,
        attention_factor=inner.optional_number("attention_factor"),
        beta_fast=positive(inner, "beta_fast") or 32.0,
        beta_slow=positive(inner, "beta_slow") or 1.0,
        mscale=positive(inner, "mscale"),
        mscale_all_dim=positive(inner, "mscale_all_dim"),
        truncate=inner.flag("truncate", default=True),
    )


def positive(inner: Fields, key: str) -> float | None:
    """A number above 0, or None if it is absent or zero."""
    return None if inner.values.get(key) == 0 else inner.optional_number(key)
