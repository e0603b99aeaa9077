"""Matrix products and o_proj's exact sums over heads.

T tokens, R matrix rows, C matrix columns, D model dim, P head dim, u units (heads).
"""

import numpy as np
import pytest

from dist_moe.kernels import MatrixFormat, MatrixList, WeightFormat, reference

U = 2.0**-24  # half an ulp of f32 at 1
SIZES = [(1, 1, 1), (3, 16, 31), (2, 17, 32), (5, 33, 33), (17, 31, 64), (4, 48, 130), (1, 130, 128), (33, 64, 48)]
SIZES += [(6, 49, 200), (8, 32, 96), (15, 16, 64), (71, 40, 65), (130, 33, 160)]  # around the kernels' token blocks
FORMATS = [
    (WeightFormat.F32, 0),
    (WeightFormat.BF16, 0),
    *((fmt, group) for fmt in (WeightFormat.Q8, WeightFormat.Q4) for group in (32, 64, 128, 0)),
]


def operand_values(operand, fmt):
    """What the weights are really multiplied with."""
    if fmt.quantized:
        return reference.dequantize(operand.q_TC, operand.scale_TG, operand.columns)
    return operand.x_TC.astype(np.float64)


def chain_bound(x_TC, weights_RC, fmt):
    """Error of the chain over C: one fma per k, or per 32 and one more rounding of the scales' product."""
    columns = x_TC.shape[1]
    steps = -(-columns // 32) + 1 if fmt.quantized else columns
    return steps * U * 1.001 * (np.abs(x_TC) @ np.abs(weights_RC).T) + columns * 2.0**-149


def matmul(kernels, bench, packed, shape, operand, fmt, group):
    out_TR = bench.empty((operand.max_tokens, shape[0]), np.float32)
    matrices = MatrixList([(packed, shape[0], 0, MatrixFormat(fmt, group))])
    kernels.matmul(out_TR, matrices, operand, operand.max_tokens)
    return out_TR


@pytest.mark.parametrize(("T", "R", "C"), SIZES)
@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_matmul_values(portable, bench, fmt, group, T, R, C):
    operand = bench.operand(portable, bench.floats(T, C), fmt.quantized)
    packed = bench.packed(portable, bench.floats(R, C), fmt, group)
    found_TR = matmul(portable, bench, packed, (R, C), operand, fmt, group)
    weights_RC, x_TC = reference.unpack_matrix(packed, R, C, fmt, group), operand_values(operand, fmt)
    assert (np.abs(found_TR - x_TC @ weights_RC.T) <= chain_bound(x_TC, weights_RC, fmt)).all()


@pytest.mark.parametrize(("T", "R", "C"), SIZES)
@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_matmul_bits_and_batches(portable, kernels, bench, same_bits, fmt, group, T, R, C):
    x_TC = bench.floats(T, C, scale=2.0)
    x_TC[0, ::3] *= np.float32(1e-38)  # products become denormal
    operand = bench.operand(kernels, x_TC, fmt.quantized)
    packed = bench.packed(portable, bench.floats(R, C), fmt, group)
    together_TR = matmul(kernels, bench, packed, (R, C), operand, fmt, group)
    same_bits(together_TR, matmul(portable, bench, packed, (R, C), operand, fmt, group))
    for t in {0, T // 2, T - 1}:
        alone = bench.operand(kernels, x_TC[t : t + 1], fmt.quantized)
        same_bits(matmul(kernels, bench, packed, (R, C), alone, fmt, group)[0], together_TR[t])


@pytest.mark.parametrize(
    ("fmt", "group"),
    [(WeightFormat.F32, 0), (WeightFormat.BF16, 0), (WeightFormat.Q8, 0), (WeightFormat.Q4, 32), (WeightFormat.Q4, 64)],
)
@pytest.mark.parametrize("shape", [(37, 544), (150, 192)])
def test_any_number_of_tokens(portable, kernels, bench, same_bits, fmt, group, shape):
    """17 groups have no shorter strips; ten tiles are four runs of two, and two more."""
    packed = bench.packed(portable, bench.floats(*shape), fmt, group)
    x_TC = bench.floats(70, shape[1])
    everything_TR = matmul(portable, bench, packed, shape, bench.operand(portable, x_TC, fmt.quantized), fmt, group)
    for T in range(1, 71):
        operand = bench.operand(kernels, x_TC[:T], fmt.quantized)
        same_bits(matmul(kernels, bench, packed, shape, operand, fmt, group), everything_TR[:T])


@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_matrices_fill_their_columns_and_no_others(portable, kernels, bench, same_bits, fmt):
    shapes = [(17, 64), (32, 64), (1, 64), (40, 64)]
    packed = [bench.packed(portable, bench.floats(*shape), fmt, 32) for shape in shapes]
    columns = [50, 0, 49, 70]  # any order, with gaps
    operand = bench.operand(kernels, bench.floats(3, 64), fmt.quantized)
    out_TR = bench.of(np.full((3, 115), 7, np.float32))
    matrices = MatrixList(
        [(p, s[0], c, MatrixFormat(fmt, 32)) for p, s, c in zip(packed, shapes, columns, strict=True)]
    )
    kernels.matmul(out_TR, matrices, operand, 2)
    written = np.zeros(115, bool)
    for matrix, shape, column in zip(packed, shapes, columns, strict=True):
        alone_TR = matmul(portable, bench, matrix, shape, operand, fmt, 32)
        same_bits(out_TR[:2, column : column + shape[0]], alone_TR[:2])
        written[column : column + shape[0]] = True
    assert (out_TR[:2, ~written] == 7).all()
    assert (out_TR[2] == 7).all()


@pytest.mark.parametrize(("T", "C"), [(1, 64), (5, 160), (17, 100), (71, 33)])
def test_mixed_matrices_are_each_read_in_their_format(portable, kernels, bench, same_bits, T, C):
    rows = [17, 160, 1, 40, 32, 16, 16, 300, 5, 48]
    matrices = [
        (bench.packed(portable, bench.floats(n, C), *how), n, how) for n, how in zip(rows, FORMATS, strict=True)
    ]
    operand = bench.operand(kernels, bench.floats(T, C), quantized=True)
    out_TR, first = bench.empty((T, sum(rows)), np.float32), np.cumsum([0, *rows])
    listed = MatrixList([(p, n, int(c), MatrixFormat(*how)) for (p, n, how), c in zip(matrices, first, strict=False)])
    kernels.matmul(out_TR, listed, operand, T)
    for (packed, n, how), column in zip(matrices, first, strict=False):
        same_bits(out_TR[:, column : column + n], matmul(portable, bench, packed, (n, C), operand, *how))


def test_neighbours_in_memory_and_output_of_another_format_are_not_joined(portable, kernels, bench, same_bits):
    C, T, formats = 128, 3, [(WeightFormat.Q4, 32), (WeightFormat.Q4, 64), (WeightFormat.Q4, 128), (WeightFormat.Q8, 0)]
    parts = [bench.packed(portable, bench.floats(32, C), *how) for how in (*formats, *formats[::-1])]
    together, listed, at = bench.of(np.concatenate(parts)), [], 0
    for i, (part, how) in enumerate(zip(parts, (*formats, *formats[::-1]), strict=True)):
        listed.append((together[at : at + len(part)], 32, 32 * i, MatrixFormat(*how)))
        at += len(part)
    operand = bench.operand(kernels, bench.floats(T, C), quantized=True)
    out_TR = bench.empty((T, 32 * len(parts)), np.float32)
    kernels.matmul(out_TR, MatrixList(listed), operand, T)
    for i, (part, (*_, how)) in enumerate(zip(parts, listed, strict=True)):
        alone_TR = matmul(portable, bench, part, (32, C), operand, how.format, how.group)
        same_bits(out_TR[:, 32 * i : 32 * (i + 1)], alone_TR)


def test_bias_is_added_to_its_columns(kernels, bench, same_bits):
    out_TR, bias_R = bench.floats(2001, 40), bench.floats(17)
    expected_TR = out_TR.copy()
    expected_TR[:2000, 5:22] += bias_R
    kernels.add_bias(out_TR, 5, bias_R, tokens=2000)
    same_bits(out_TR, expected_TR)


def unit_sums(kernels, bench, units, x_TC, D, P, fmt, group, chosen=None):
    """The exact sums of the chosen units (all by default), each with its head's columns of x_TC."""
    chosen = range(len(units)) if chosen is None else chosen
    columns = np.concatenate([np.arange(u * P, (u + 1) * P) for u in chosen]) if chosen else np.zeros(0, int)
    operand = bench.operand(kernels, x_TC[:, columns], fmt.quantized)
    sums_TD, fault_T = bench.empty((len(x_TC), D), np.int64), bench.faults(len(x_TC))
    matrices = MatrixList([(units[u], D, 0, MatrixFormat(fmt, group)) for u in chosen])
    kernels.unit_sums(sums_TD, fault_T, matrices, operand, len(x_TC), P, 0)
    assert (fault_T == 0x7FFFFFFF).all()
    return sums_TD


UNIT_CASES = [
    (fmt, min(group, P), T, D, P) for fmt, group in FORMATS for T, D, P in [(1, 33, 32), (3, 64, 64), (2, 130, 96)]
] + [(fmt, 0, T, D, P) for fmt in (WeightFormat.F32, WeightFormat.BF16) for T, D, P in [(3, 17, 1), (2, 48, 30)]]


@pytest.mark.parametrize(("fmt", "group", "T", "D", "P"), UNIT_CASES)
def test_unit_sums_are_sums_of_rounded_contributions(portable, kernels, bench, same_bits, fmt, group, T, D, P):
    x_TC = bench.floats(T, 5 * P)
    units = [bench.packed(portable, bench.floats(D, P, scale=0.1), fmt, group) for _ in range(5)]
    sums_TD = unit_sums(kernels, bench, units, x_TC, D, P, fmt, group)
    expected_TD = np.zeros((T, D), np.int64)
    for u, unit in enumerate(units):
        operand = bench.operand(portable, x_TC[:, u * P : (u + 1) * P], fmt.quantized)
        expected_TD += reference.fixed_point(matmul(portable, bench, unit, (D, P), operand, fmt, group))
    same_bits(sums_TD, expected_TD)


@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_unit_sums_of_any_partition_add_up(portable, kernels, bench, same_bits, fmt):
    T, D, P, units = 3, 50, 32, 7
    x_TC = bench.floats(T, units * P)
    packed = [bench.packed(portable, bench.floats(D, P), fmt, 32) for _ in range(units)]
    whole_TD = unit_sums(kernels, bench, packed, x_TC, D, P, fmt, 32)
    same_bits(whole_TD, unit_sums(portable, bench, packed, x_TC, D, P, fmt, 32))
    for parts in ([[0, 1, 2], [3, 4, 5, 6]], [[6], [2, 4], [], [5, 0, 3, 1]], [[u] for u in range(units)]):
        partial = [unit_sums(kernels, bench, packed, x_TC, D, P, fmt, 32, part) for part in parts]
        same_bits(sum(partial[1:], start=partial[0]), whole_TD)
    for t in range(T):
        same_bits(unit_sums(kernels, bench, packed, x_TC[t : t + 1], D, P, fmt, 32)[0], whole_TD[t])


@pytest.mark.parametrize(("T", "D", "P"), [(1, 33, 32), (3, 200, 64), (70, 130, 96)])
def test_unit_sums_of_units_of_several_formats(portable, kernels, bench, same_bits, T, D, P):
    formats = [(fmt, min(group, P)) for fmt, group in FORMATS]
    operand = bench.operand(kernels, bench.floats(T, len(formats) * P), quantized=True)
    units = [bench.packed(portable, bench.floats(D, P, scale=0.1), *how) for how in formats]
    sums_TD, fault_T = bench.empty((T, D), np.int64), bench.faults(T)
    listed = MatrixList([(unit, D, 0, MatrixFormat(*how)) for unit, how in zip(units, formats, strict=True)])
    kernels.unit_sums(sums_TD, fault_T, listed, operand, T, P, 0)
    assert (fault_T == 0x7FFFFFFF).all()
    expected_TD = np.zeros((T, D), np.int64)
    for u, (unit, how) in enumerate(zip(units, formats, strict=True)):
        alone = bench.operand(portable, np.ascontiguousarray(operand.x_TC[:, u * P : (u + 1) * P]), quantized=True)
        expected_TD += reference.fixed_point(matmul(portable, bench, unit, (D, P), alone, *how))
    same_bits(sums_TD, expected_TD)


def test_wrong_shapes_are_refused(portable, bench):
    operand, fmt = bench.operand(portable, bench.floats(2, 64), quantized=False), WeightFormat.F32
    matrices = MatrixList([(bench.packed(portable, bench.floats(16, 64), fmt, 0), 16, 8, MatrixFormat(fmt, 0))])
    other = MatrixList([(matrices._matrices[0][0], 16, 8, MatrixFormat(WeightFormat.BF16, 0))])
    q4 = MatrixList(
        [(bench.packed(portable, bench.floats(16, 64), WeightFormat.Q4, 32), 16, 8, MatrixFormat(WeightFormat.Q4, 32))]
    )
    out_TR = bench.empty((2, 24), np.float32)
    portable.matmul(out_TR, matrices, operand, 2)
    for wrong in (
        lambda: portable.matmul(out_TR[:, :20].copy(), matrices, operand, 2),  # columns do not fit
        lambda: portable.matmul(out_TR, matrices, operand, 3),  # more tokens than rows
        lambda: portable.matmul(np.zeros((3, 24), np.float32), matrices, operand, 3),  # than vectors
        lambda: portable.matmul(out_TR, q4, operand, 2),  # no int8
        lambda: portable.matmul(out_TR, other, operand, 2),  # other bytes
        lambda: portable.matmul(out_TR.astype(np.float64), matrices, operand, 2),
        lambda: portable.unit_sums(np.zeros((2, 17), np.int64), bench.faults(2), matrices, operand, 2, 64, 0),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="contiguous"):
        portable.matmul(np.zeros((24, 2), np.float32).T, matrices, operand, 2)
    out_TR.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match=r"read-only|writable"):
        portable.matmul(out_TR, matrices, operand, 2)
