"""Tokens as bytes: what is unpacked is what was packed, and damaged bytes are noticed."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.errors import EnvironmentMismatch
from dist_moe.kernels import Kernels, Operand, OperandParts, OperandRows, RoutingRows, SumRows

FLOATS, INT8 = OperandParts.FLOATS, OperandParts.INT8
T = 7
ROWS = np.array([0, 2, 3, 6], np.int32)


def filled(operand: Operand, kernels: Kernels) -> Operand:
    operand.x_TC[:] = np.random.default_rng(3).normal(size=operand.x_TC.shape).astype(np.float32)
    if operand.quantized:
        kernels.quantize(operand, np.zeros(T, np.int32), T, 0)
    return operand


@pytest.mark.parametrize("columns", [1, 32, 33, 96])
@pytest.mark.parametrize("parts", [FLOATS, INT8, FLOATS | INT8])
@pytest.mark.parametrize("quantized", [False, True])
def test_operands_arrive_as_they_were(kernels: Kernels, columns: int, quantized: bool, parts: OperandParts) -> None:
    source, target = filled(Operand(T, columns, quantized), kernels), Operand(T, columns, quantized)
    if parts & INT8 and not quantized:
        with pytest.raises(TypeError):
            OperandRows(source, parts)
        return
    rows = OperandRows(source, parts)
    packed = np.empty(rows.bound(len(ROWS)) + 5, np.uint8)
    groups = -(-columns // 32)
    assert rows.pack(packed, ROWS) == len(ROWS) * (
        36 * groups * bool(parts & INT8) + 4 * columns * bool(parts & FLOATS)
    )
    OperandRows(target, parts).unpack(packed, ROWS)
    for name, part in (("x_TC", FLOATS), ("q_TC", INT8), ("scale_TG", INT8), ("sum_TG", INT8)):
        expected, found = getattr(source, name), getattr(target, name)
        if not quantized and part == INT8:
            continue
        assert (found[ROWS] == expected[ROWS]).all() == bool(parts & part), name
        assert not found[[1, 4, 5]].any(), name


@pytest.mark.parametrize("model_dim", [1, 31, 64, 100])
def test_sums_are_added_to_those_of_their_tokens(model_dim: int) -> None:
    random = np.random.default_rng(5)
    sent_TD, kept_TD = (random.integers(-(2**51), 2**51, (T, model_dim)) for _ in range(2))
    sent_TD[2] = 0
    expected_TD = kept_TD.copy()
    expected_TD[ROWS] += sent_TD[ROWS]
    packed = np.empty(SumRows(sent_TD).bound(len(ROWS)), np.uint8)
    used = SumRows(sent_TD).pack(packed, ROWS)
    SumRows(kept_TD).unpack(packed[:used], ROWS)
    assert (kept_TD == expected_TD).all()


def test_bytes_that_are_no_packed_sums_are_noticed() -> None:
    sums_TD = np.arange(T * 40, dtype=np.int64).reshape(T, 40)
    rows = SumRows(sums_TD)
    packed = np.empty(rows.bound(len(ROWS)) + 1, np.uint8)
    used = rows.pack(packed, ROWS)
    for cut in (used - 1, used + 1, 0):
        with pytest.raises(EnvironmentMismatch, match="packed rows"):
            rows.unpack(packed[:cut], ROWS)


def test_routing_arrives_as_it_was() -> None:
    ids_TK = np.arange(T * 3, dtype=np.int32).reshape(T, 3)
    weights_TK = (ids_TK / 7).astype(np.float32)
    weights_TK[2, 1] = np.nan
    rows = RoutingRows(ids_TK, weights_TK)
    packed = np.empty(rows.bound(len(ROWS)), np.uint8)
    assert rows.pack(packed, ROWS) == len(ROWS) * 24
    found_ids_TK, found_weights_TK = np.zeros_like(ids_TK), np.zeros_like(weights_TK)
    RoutingRows(found_ids_TK, found_weights_TK).unpack(packed, ROWS)
    assert (found_ids_TK[ROWS] == ids_TK[ROWS]).all()
    assert (found_weights_TK.view(np.int32)[ROWS] == weights_TK.view(np.int32)[ROWS]).all()


def test_rows_beyond_the_array_are_refused(kernels: Kernels) -> None:
    beyond = np.array([T], np.int32)
    with pytest.raises(TypeError):
        OperandRows(Operand(T, 32, True), INT8).pack(np.empty(999, np.uint8), beyond)
    with pytest.raises(TypeError):
        SumRows(np.zeros((T, 8), np.int64)).pack(np.empty(999, np.uint8), beyond)
