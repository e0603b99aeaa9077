"""Sizes of models for tests that need no weights."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.model_config import ModelConfig
from helpers.tiny_model import TinyModel


def model(**changes: object) -> ModelConfig:
    """The configuration of a TinyModel with other sizes."""
    with tempfile.TemporaryDirectory() as directory:
        text = json.dumps(replace(TinyModel(), **changes).config_json())  # type: ignore[arg-type]
        Path(directory, "config.json").write_text(text)
        return read_hf_config(Path(directory))
