"""Recipes as TOML files (docs/stores.md): ours, and those of users."""

from __future__ import annotations

import re
import sys
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

from dist_moe import files
from dist_moe.errors import UsageError
from dist_moe.kernels.formats import ScaleChoice, WeightFormat
from dist_moe.store.recipe import KINDS, Recipe, Rule, ranges
from dist_moe.store.units import GROUP_SIZES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_IN = ("q4", "q4-mixed", "q8", "bf16", "f32")
_TOP_KEYS = ("format", "group", "scales", "rule")
_MATCH_KEYS = ("kind", "layers", "experts", "regex")
_RULE_KEYS = (*_MATCH_KEYS, "format", "group")


def find_recipe(name: str) -> Recipe:
    """A recipe of ours by its name, or a TOML file.

    Raises:
        UsageError: It is neither, or the file is no recipe: one sentence says where and what is known.
    """
    if name in BUILT_IN:
        text = (resources.files("dist_moe.store") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
        return parse_recipe(text, f"--recipe {name}")
    path = Path(name)
    if not files.is_file(path):
        raise UsageError(f"--recipe {name}: is no file, and none of {', '.join(BUILT_IN)}; give one of these or a file")
    try:
        text = files.read_bytes(path).decode()
    except OSError as error:
        raise UsageError(f"--recipe {path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError:
        raise UsageError(f"--recipe {path}: is not UTF-8 text; give a TOML file") from None
    return parse_recipe(text, f"--recipe {path}")


def parse_recipe(text: str, where: str) -> Recipe:
    """Read TOML; raises UsageError, which begins with `where`."""
    try:
        entries = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not valid TOML: {error}") from error
    _check_keys(entries, _TOP_KEYS, where)
    if "format" not in entries:
        raise UsageError(f'{where}: has no format for what no rule fits; begin it with a line such as format = "q4"')
    rules = entries.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise UsageError(f"{where}: rules are tables: begin each with a line [[rule]]")
    fmt = _format(entries, where)
    assert fmt is not None
    return Recipe(
        where,
        fmt,
        _group(entries, where),
        _scales(entries, where),
        tuple(_rule(rule, f"{where}: rule {number}") for number, rule in enumerate(rules, 1)),
    )


def _rule(entries: dict[str, Any], where: str) -> Rule:
    _check_keys(entries, _RULE_KEYS, where)
    if not any(key in entries for key in _MATCH_KEYS):
        raise UsageError(f"{where}: says not what it is for: give {', '.join(_MATCH_KEYS[:-1])} or {_MATCH_KEYS[-1]}")
    if "format" not in entries and "group" not in entries:
        raise UsageError(f"{where}: changes nothing: give it a format or a group")
    return Rule(
        where,
        _keys(entries, where),
        _numbers(entries, "layers", where),
        _numbers(entries, "experts", where),
        _regex(entries, where),
        _format(entries, where),
        _group(entries, where),
    )


def _check_keys(entries: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in entries:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")


def _keys(entries: dict[str, Any], where: str) -> frozenset[str] | None:
    if "kind" not in entries:
        return None
    value = entries["kind"]
    kinds = value if isinstance(value, list) else [value]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in KINDS:
            raise UsageError(f"{where}: unknown kind {kind!r}; choose of {', '.join(KINDS)}")
    return frozenset(key for kind in kinds for key in KINDS[kind])


def _numbers(entries: dict[str, Any], key: str, where: str) -> str | None:
    if key not in entries:
        return None
    value = entries[key]
    text = str(value) if type(value) is int else value
    try:
        if not isinstance(text, str) or not list(ranges(text)):
            raise ValueError(text)
    except ValueError:
        raise UsageError(f'{where}: {key} = {value!r}; give numbers and ranges such as "0-3,40-"') from None
    return text


def _regex(entries: dict[str, Any], where: str) -> re.Pattern[str] | None:
    if "regex" not in entries:
        return None
    value = entries["regex"]
    try:
        if not isinstance(value, str):
            raise re.error("it is no text")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of brackets that a later Python may read otherwise
            return re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{where}: regex = {value!r} is no regular expression ({error})") from None


def _format(entries: dict[str, Any], where: str) -> WeightFormat | None:
    if "format" not in entries:
        return None
    labels = [fmt.label for fmt in WeightFormat]
    if entries["format"] not in labels:
        raise UsageError(f"{where}: unknown format {entries['format']!r}; choose one of {', '.join(labels)}")
    return WeightFormat.parse(entries["format"])


def _group(entries: dict[str, Any], where: str) -> int | None:
    if "group" not in entries:
        return None
    value = entries["group"]
    if type(value) is not int or value not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise UsageError(f"{where}: group = {value!r}; give one of {sizes}, of which 0 is a whole row")
    return value


def _scales(entries: dict[str, Any], where: str) -> ScaleChoice | None:
    if "scales" not in entries:
        return None
    labels = [choice.label for choice in ScaleChoice]
    if entries["scales"] not in labels:
        raise UsageError(f"{where}: unknown scales {entries['scales']!r}; choose one of {', '.join(labels)}")
    return ScaleChoice.parse(entries["scales"])
