"""The architecture of a model from a TOML file of configs/: the keys of its config.json in a table [architecture]."""

from __future__ import annotations

import sys
from pathlib import Path

from dist_moe.checkpoint.fields import Fields
from dist_moe.checkpoint.hf_config import model_config, read_architecture, refuse_unsupported
from dist_moe.errors import CheckpointError
from dist_moe.model_config import ModelConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = "architecture"


def read_model_toml(path: Path) -> ModelConfig:
    """The model that a file's [architecture] table describes; what else stands in the file is ignored.

    Raises:
        CheckpointError: The file cannot be read, is not TOML or has no such table, or the table's keys are not those
            of a model that dist-moe runs.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid TOML: {error}; see configs/ for examples") from error
    table = entries.get(TABLE)
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{path}: expected a table [{TABLE}] with the keys of the model's config.json, found none;"
            " see configs/ for examples"
        )
    fields = Fields(f"{path}: [{TABLE}]", table)
    architecture = read_architecture(fields)
    refuse_unsupported(fields)
    return model_config(fields, architecture)
