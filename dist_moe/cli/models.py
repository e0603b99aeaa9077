"""What `-m` names."""

from __future__ import annotations

from dist_moe.cli.options import ModelOptions
from dist_moe.store import models
from dist_moe.store.models import ModelSource


def find_model(options: ModelOptions) -> ModelSource:
    """Tell the forms of `-m` apart.

    Raises:
        UsageError: The path is none of them, or --quant contradicts the store.
        StoreError: The store's manifest is damaged.
    """
    return models.find_model(options.model, options.quant)
