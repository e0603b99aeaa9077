"""dist-moe: Qwen3 mixture-of-experts models on CPUs across MPI ranks, the same bits on any number of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_moe.engine.engine import Engine
    from dist_moe.engine.requests.pieces import Piece, Result, Usage
    from dist_moe.engine.requests.request import SamplingOptions
    from dist_moe.errors import DistMoeError

__all__ = ["DistMoeError", "Engine", "Piece", "Result", "SamplingOptions", "Usage", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine.engine",
    "Piece": "engine.requests.pieces",
    "Result": "engine.requests.pieces",
    "Usage": "engine.requests.pieces",
    "SamplingOptions": "engine.requests.request",
    "DistMoeError": "errors",
}


def __getattr__(name: str) -> object:
    """Import what is asked for: the package itself stays cheap, for it is imported by every command."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
