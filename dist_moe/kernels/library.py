"""The compiled library, or one clear sentence where it was not built."""

from __future__ import annotations

from dist_moe.errors import EnvironmentMismatch

try:
    from dist_moe.kernels._native import ffi, lib
except ImportError as error:
    raise EnvironmentMismatch(
        f"the compiled kernels cannot be loaded ({error}): this may be the source folder, which is found before the "
        "installed package; run from another directory, or build it here with pip install -e ."
    ) from error

__all__ = ["ffi", "lib"]
