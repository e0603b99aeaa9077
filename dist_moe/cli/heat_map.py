"""The one door to matplotlib, an optional extra: a heat map of experts and layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dist_moe.errors import UsageError
from dist_moe.files import NewFile, write_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TICKS = 16


def require_matplotlib(path: Path) -> None:
    """Find out before any work whether a plot can be drawn.

    Raises:
        UsageError: matplotlib is missing, or cannot write files with this ending.
    """
    figure = _new_figure()
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise UsageError(f"--plot {path}: expected a name that ends in one of .{', .'.join(sorted(known))}")


def draw_heat_map(path: Path, counts_LE: npt.NDArray[np.int64], layers: Sequence[int], title: str) -> None:
    """Draw how often each expert was picked in each layer, over the layer's mean: 1 is balanced.

    Args:
        path: Where the picture goes; its ending is its format.
        counts_LE: Picks, int64 [routed layers, experts].
        layers: The routed layers' numbers.
        title: Above the picture.

    Raises:
        UsageError: The file cannot be written.
    """
    figure = _new_figure()
    axes = figure.add_subplot()
    mean_L1 = np.maximum(counts_LE.mean(axis=1, keepdims=True), 1e-30)
    picture = axes.imshow(counts_LE / mean_L1, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title)
    shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _MOST_TICKS)).astype(int))
    axes.set_yticks(shown, [str(layers[row]) for row in shown])
    figure.colorbar(picture, label="picks / mean of the layer")
    with NewFile(path) as file:
        with write_errors(path):
            figure.savefig(file.stream, format=path.suffix.lstrip(".").lower(), dpi=150)
        file.commit()


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"--plot needs matplotlib, which cannot be imported ({error}): pip install 'dist-moe[plot]'"
        ) from error
    return Figure(figsize=(12, 6), layout="constrained")
