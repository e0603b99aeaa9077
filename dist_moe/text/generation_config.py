"""What a model says about its own generation: which tokens end a text, and the sampling its makers advise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.errors import CheckpointError
from dist_moe.text.json_file import read_json_object

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationConfig:
    """A model's defaults; greedy when its files say nothing."""

    stop_ids: frozenset[int]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0


def read_generation_config(directory: Path) -> GenerationConfig:
    """Read `generation_config.json` and the end-of-text ids of `config.json` beside it.

    The two files name different ids (a chat model's list and a base model's single one), so all of them stop.

    Args:
        directory: A model's directory or a store; either file may be missing.

    Raises:
        CheckpointError: A file is not a JSON object, or a value has the wrong type or range.
    """
    path = directory / GENERATION_FILE
    values = read_json_object(path)
    stop_ids = _token_ids(values.get("eos_token_id"), path)
    config = directory / "config.json"
    stop_ids |= _token_ids(read_json_object(config).get("eos_token_id"), config)
    repetition_penalty = float(_number(values, "repetition_penalty", 1.0, 100, path, least=0.01))
    if not values.get("do_sample"):
        return GenerationConfig(stop_ids, repetition_penalty=repetition_penalty)
    return GenerationConfig(
        stop_ids,
        temperature=float(_number(values, "temperature", 1.0, 100, path)),
        top_k=int(_number(values, "top_k", 0, 2**31 - 1, path)),
        top_p=float(_number(values, "top_p", 1.0, 1, path)),
        min_p=float(_number(values, "min_p", 0.0, 1, path)),
        typical_p=float(_number(values, "typical_p", 1.0, 1, path)),
        repetition_penalty=repetition_penalty,
    )


def _token_ids(value: Any, path: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{path}: eos_token_id: expected a token id or a list of them, found {value!r}")
    return frozenset(ids)


def _number(values: dict[str, Any], name: str, default: float, most: float, path: Path, least: float = 0) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise CheckpointError(f"{path}: {name}: expected a number from {least} to {most}, found {value!r}")
    return value
