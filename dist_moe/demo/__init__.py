"""The bundled demo model: a small Qwen3-MoE that tells short stories."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def demo_model_directory() -> Path:
    """The demo's Hugging Face directory inside the installed package."""
    return Path(str(importlib.resources.files(__name__) / "model"))
