"""The scales of least error of q8 and q4, bit for bit, in NumPy: the specification of csrc/portable/scales.h.

One float32 operation at a time, in the order that the kernels have. R matrix rows, C matrix columns, G groups, n the
weights of a group.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.arrays import Array, F32Array
from dist_moe.kernels.formats import WeightFormat
from dist_moe.kernels.reference import weight_scales

CANDIDATES = {
    WeightFormat.Q4: (-8.0, -8.375, -7.75, -8.125, -7.25, -8.625, -6.875, -9.0),
    WeightFormat.Q8: (126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0, 127.25),
}
_FITS = 2


def fma(a: Array, b: Array, c: Array) -> F32Array:
    """Round a * b + c once: the f64 sum is rounded to odd, then f32 is right (Boldo and Melquiond 2008)."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    product, addend = np.broadcast_arrays(product, np.asarray(c, np.float64))
    total = product + addend
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    inexact = (error != 0) & (total.view(np.int64) % 2 == 0)
    odd = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    rounded: F32Array = odd.astype(np.float32)
    return rounded


def least_error_scales(
    weights_RC: F32Array, fmt: WeightFormat, group: int, importance_C: F32Array | None = None
) -> npt.NDArray[np.float16]:
    """The f16 scales [R, G] of ScaleChoice.MSE; of finite weights.

    Args:
        weights_RC: The matrix.
        fmt: Q8 or Q4.
        group: Weights per scale, 0 for a whole row.
        importance_C: How much the squared error of each column counts; None: all the same.
    """
    columns = weights_RC.shape[1]
    absmax_RG = weight_scales(weights_RC, fmt, group)
    best_RG = absmax_RG.copy()
    for g in range(absmax_RG.shape[1]):
        part = slice(g * group, min((g + 1) * group, columns) if group else columns)
        importance_n = np.ones(columns, np.float32)[part] if importance_C is None else importance_C[part]
        usable_R = (absmax_RG[:, g] != 0) & np.isfinite(absmax_RG[:, g])
        if usable_R.any():
            absmax_R = absmax_RG[usable_R, g].astype(np.float32)
            best_RG[usable_R, g] = _search(weights_RC[usable_R, part], importance_n, absmax_R, fmt)
    return best_RG


def _search(weights_Rn: F32Array, importance_n: F32Array, absmax_R: F32Array, fmt: WeightFormat) -> F32Array:
    """The best f16 scale of every row, as float32."""
    extreme_R = np.take_along_axis(weights_Rn, np.abs(weights_Rn).argmax(axis=1)[:, None], 1)[:, 0]
    if fmt == WeightFormat.Q8:
        extreme_R = np.abs(extreme_R)
    with np.errstate(invalid="ignore", divide="ignore"):
        inverse_R = np.float32(1) / extreme_R
        gain_R, scale_R = np.zeros_like(absmax_R), absmax_R.copy()
        for candidate in CANDIDATES[fmt]:
            _, products_R, squares_R = _sums(weights_Rn, importance_n, absmax_R, inverse_R * np.float32(candidate), fmt)
            fitted_R = products_R / squares_R
            fitted_gain_R = products_R * fitted_R
            better_R = fitted_gain_R > gain_R
            gain_R[better_R], scale_R[better_R] = fitted_gain_R[better_R], fitted_R[better_R]
        best_R = absmax_R.copy()
        least_R, _, _ = _sums(weights_Rn, importance_n, absmax_R, np.float32(1) / absmax_R, fmt)
        for _ in range(_FITS):
            rounded_R = _round_f16(scale_R)
            rounded_R = np.where((rounded_R != 0) & np.isfinite(rounded_R), rounded_R, absmax_R)
            error_R, products_R, squares_R = _sums(weights_Rn, importance_n, rounded_R, np.float32(1) / rounded_R, fmt)
            better_R = error_R < least_R
            best_R[better_R], least_R[better_R] = rounded_R[better_R], error_R[better_R]
            scale_R = products_R / squares_R
    return best_R


def _sums(
    weights_Rn: F32Array, importance_n: F32Array, scale_R: F32Array, inverse_R: F32Array, fmt: WeightFormat
) -> tuple[F32Array, F32Array, F32Array]:
    """The sums of i (w - d q)^2, i w q and i q^2 of every row, over its columns in order."""
    lowest, highest = (-127, 127) if fmt == WeightFormat.Q8 else (-8, 7)
    error_R, products_R, squares_R = (np.zeros(len(weights_Rn), np.float32) for _ in range(3))
    for weight_R, importance in zip(weights_Rn.T, importance_n, strict=True):
        q_R = np.rint(np.clip(weight_R * inverse_R, np.float32(lowest), np.float32(highest)))
        off_R = fma(q_R, -scale_R, weight_R)
        error_R = fma(off_R * importance, off_R, error_R)
        products_R = fma(q_R * importance, weight_R, products_R)
        squares_R = fma(q_R * importance, q_R, squares_R)
    return error_R, products_R, squares_R


def _round_f16(scale_R: F32Array) -> F32Array:
    with np.errstate(over="ignore"):
        return scale_R.astype(np.float16).astype(np.float32)
