"""Routing, grouping by expert, expert chunks.

T tokens, D model dim, E experts, K experts per token, F hidden units of a chunk, N list entries.
"""

import numpy as np
import pytest

from dist_moe.kernels import (
    NO_FAULT,
    ChunkFormat,
    ChunkFormats,
    ChunkList,
    MatrixFormat,
    WeightFormat,
    address_of,
    reference,
)

U = 2.0**-24  # half an ulp of f32 at 1
EXP_ULPS = 2  # half ulps of our exp; test_sampling.py checks it
SILU_ULPS = EXP_ULPS + 3  # and an addition, a division, a product


def route(kernels, bench, logits_TE, K, norm):
    T = len(logits_TE)
    ids_TK, weights_TK, fault_T = bench.empty((T, K), np.int32), bench.empty((T, K), np.float32), bench.faults(T)
    kernels.route(ids_TK, weights_TK, fault_T, logits_TE, norm, 0)
    assert (fault_T == NO_FAULT).all()
    return ids_TK, weights_TK


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (3, 5, 2), (2, 16, 16), (5, 17, 4), (40, 128, 8), (2, 130, 3)])
def test_routing(portable, kernels, bench, same_bits, T, E, K, norm):
    logits_TE = bench.floats(T, E, scale=3.0)
    logits_TE[0] = np.rint(logits_TE[0])  # ties
    logits_TE[-1, 0] += 200  # the others' exponentials vanish
    found = route(portable, bench, logits_TE, K, norm)
    ids_TK, weights_TK = reference.route(logits_TE, K, norm)
    assert np.array_equal(found[0], ids_TK)
    # Differences are rounded, exp'ed, summed in lanes, divided; then the K chosen are summed and divided.
    spread_T1 = (logits_TE.max(axis=1) - logits_TE.min(axis=1)).astype(np.float64)[:, None]
    steps = 2 * EXP_ULPS + -(-E // 16) + 4 + 1 + (K + 1 + 2 * EXP_ULPS if norm else 0)
    bound_TK = weights_TK * (steps + 2 * np.minimum(spread_T1, 87)) * U + 2.0**-125
    assert (np.abs(found[1] - weights_TK) <= bound_TK).all()
    same_bits(route(kernels, bench, logits_TE, K, norm), found)
    for t in {0, T // 2, T - 1}:
        alone = route(kernels, bench, bench.of(logits_TE[t : t + 1]), K, norm)
        same_bits(alone, (found[0][t : t + 1], found[1][t : t + 1]))


def test_equal_logits_take_the_lowest_ids(kernels, bench):
    ids_TK, weights_TK = route(kernels, bench, bench.of(np.zeros((1, 64), np.float32)), 4, False)
    assert ids_TK.tolist() == [[0, 1, 2, 3]]
    assert (weights_TK == np.float32(1 / 64)).all()
    ids_TK, _ = route(kernels, bench, bench.of(np.array([[-0.0, 0.0, 1.0, 1.0]], np.float32)), 4, True)
    assert ids_TK.tolist() == [[2, 3, 0, 1]]


@pytest.mark.parametrize(("T", "E", "K"), [(0, 3, 2), (1, 1, 1), (7, 5, 2), (33, 16, 4), (20, 128, 8)])
def test_grouping_by_expert(kernels, bench, T, E, K):
    ids_TK = bench.of(bench.rng.random((T, E)).argsort(axis=1)[:, :K].astype(np.int32))
    weights_TK = bench.floats(T, K)
    offset_E1, token_N = bench.empty(E + 1, np.int32), bench.empty(T * K, np.int32)
    weight_N = bench.empty(T * K, np.float32)
    kernels.group_by_expert(offset_E1, token_N, weight_N, ids_TK, weights_TK)
    assert offset_E1[0] == 0
    assert offset_E1[E] == T * K
    for e in range(E):
        tokens, places = np.nonzero(ids_TK == e)
        run = slice(offset_E1[e], offset_E1[e + 1])
        assert np.array_equal(token_N[run], tokens)
        assert np.array_equal(weight_N[run], weights_TK[tokens, places])


class Experts:
    """Random chunks of these formats in turn, and a random choice of tokens with weights for each."""

    def __init__(self, bench, kernels, formats, T, D, width, chunks):
        self.bench, self.T, self.D, self.width = bench, T, D, width
        self.x_TD = bench.floats(T, D)
        self.formats = [formats[c % len(formats)] for c in range(chunks)]
        self.matrices, self.chunks, self.tokens, self.weights = [], [], [], []
        for c, fmt in enumerate(self.formats):
            places = [((width, D), fmt.gate_up)] * 2 + [((D, width), fmt.down)]
            values = [bench.floats(*shape, scale=shape[1] ** -0.5) for shape, _ in places]
            how = [(matrix.format, matrix.group) for _, matrix in places]
            parts = [bench.packed(kernels, *one) for one in zip(values, *zip(*how, strict=True), strict=True)]
            self.matrices.append(
                [reference.unpack_matrix(p, *s, *h) for p, (s, _), h in zip(parts, places, how, strict=True)]
            )
            self.chunks.append(bench.of(np.concatenate(parts)))
            # The last chunk serves nobody, the first everybody.
            count = T if c == 0 else 0 if c == chunks - 1 and c else int(bench.rng.integers(1, T + 1))
            self.tokens.append(np.sort(bench.rng.permutation(T)[:count]))
            self.weights.append(bench.rng.uniform(0.05, 1, count).astype(np.float32))

    def sums(self, kernels, chosen=None, only=None):
        """Exact sums [T, D] over the chosen chunks; of one token alone if asked for."""
        chosen = range(len(self.chunks)) if chosen is None else chosen
        runs = []
        for c in chosen:
            mine = np.ones(len(self.tokens[c]), bool) if only is None else self.tokens[c] == only
            runs.append((self.tokens[c][mine] if only is None else np.zeros(mine.sum(), int), self.weights[c][mine]))
        token_N = self.bench.of(np.concatenate([np.zeros(0, int), *(t for t, _ in runs)]).astype(np.int32))
        weight_N = self.bench.of(np.concatenate([np.zeros(0), *(w for _, w in runs)]).astype(np.float32))
        counts = np.array([len(t) for t, _ in runs], np.int64)
        listed = ChunkList(len(chosen) + 1)
        addresses = np.array([address_of(self.chunks[c]) for c in chosen], np.uint64)
        formats = ChunkFormats([self.formats[c] for c in chosen])
        listed.set(addresses, formats, np.cumsum(counts) - counts, counts)
        x_TD = self.x_TD if only is None else self.x_TD[only : only + 1]
        operand = self.bench.operand(kernels, x_TD, any(fmt.gate_up.format.quantized for fmt in self.formats))
        sums_TD, fault_T = self.bench.empty(x_TD.shape, np.int64), self.bench.faults(len(x_TD))
        lists = listed, len(chosen), token_N, weight_N, operand, len(x_TD)
        kernels.experts(sums_TD, fault_T, *lists, self.width, 0)
        assert (fault_T == NO_FAULT).all()
        return sums_TD


def alike(fmt, group):
    """All matrices of all chunks."""
    return [ChunkFormat(MatrixFormat(fmt, group), MatrixFormat(fmt, group))]


F32, BF16 = MatrixFormat(WeightFormat.F32, 0), MatrixFormat(WeightFormat.BF16, 0)
Q8, Q8_ROW = MatrixFormat(WeightFormat.Q8, 64), MatrixFormat(WeightFormat.Q8, 0)
Q4, Q4_32 = MatrixFormat(WeightFormat.Q4, 128), MatrixFormat(WeightFormat.Q4, 32)
MIXED = [ChunkFormat(*pair) for pair in ((Q4, Q8), (F32, Q4_32), (Q8_ROW, BF16), (BF16, F32), (Q4_32, Q4), (BF16, Q8))]

GROUP_SIZES = [(32, 5, 64, 32), (32, 17, 33, 96), (64, 1, 130, 64), (128, 3, 64, 128), (0, 33, 48, 96)]
CASES = [
    (alike(WeightFormat.F32, 0), 5, 33, 32),
    (alike(WeightFormat.F32, 64), 1, 130, 96),
    (alike(WeightFormat.BF16, 0), 3, 48, 128),
    *((alike(WeightFormat.Q8, group), *sizes) for group, *sizes in GROUP_SIZES),
    *((alike(WeightFormat.Q4, group), *sizes) for group, *sizes in GROUP_SIZES),
    *((MIXED, *sizes) for sizes in [(5, 33, 32), (17, 130, 96), (1, 64, 128), (70, 100, 64)]),
]


def hidden_error(x_TD, gate_FD, up_FD, chain):
    """Error of the f32 hidden units: two chains, silu (slope at most 1.1), a product."""
    gate_TF, up_TF = x_TD @ gate_FD.T, x_TD @ up_FD.T
    gate_error = chain * U * (np.abs(x_TD) @ np.abs(gate_FD).T)
    up_error = chain * U * (np.abs(x_TD) @ np.abs(up_FD).T)
    silu_TF = np.abs(reference.silu(gate_TF))
    silu_error = 1.1 * gate_error + SILU_ULPS * U * silu_TF
    return silu_error * (np.abs(up_TF) + up_error) + silu_TF * up_error + U * silu_TF * np.abs(up_TF)


def rounding_error(hidden_TF, error_TF):
    """How far int8 hidden units may be apart if they are `error_TF` apart as floats: one step where near a tie."""
    _, scale_Tj, _ = reference.quantize(hidden_TF.astype(np.float32))
    scale_TF, amax_TF, largest_TF = (
        np.repeat(a.astype(np.float64), 32, axis=1)[:, : hidden_TF.shape[1]]
        for a in (
            scale_Tj,
            np.abs(hidden_TF).reshape(len(hidden_TF), -1, 32).max(axis=2),
            error_TF.reshape(len(hidden_TF), -1, 32).max(axis=2),
        )
    )
    relative_TF = largest_TF / amax_TF + 4 * U
    steps_TF = np.abs(hidden_TF) / scale_TF
    from_tie_TF = np.abs(steps_TF - np.floor(steps_TF) - 0.5)
    near_TF = from_tie_TF <= error_TF / scale_TF + steps_TF * relative_TF
    return scale_TF * near_TF + steps_TF * scale_TF * relative_TF


@pytest.mark.parametrize(("formats", "T", "D", "width"), CASES)
def test_expert_values(portable, bench, formats, T, D, width):
    case = Experts(bench, portable, formats, T, D, width, chunks=max(4, len(formats) + 1))
    operand = bench.operand(portable, case.x_TD, quantized=True)
    int8_TD = reference.dequantize(operand.q_TC, operand.scale_TG, D)
    expected_TD, bound_TD = np.zeros((T, D)), np.zeros((T, D))
    for c, (tokens, weights) in enumerate(zip(case.tokens, case.weights, strict=True)):
        if not len(tokens):
            continue
        (gate_FD, up_FD, down_DF), fmt = case.matrices[c], case.formats[c]
        reads_int8, quantized = fmt.gate_up.format.quantized, fmt.down.format.quantized
        x, weight_T = (
            (int8_TD if reads_int8 else case.x_TD.astype(np.float64))[tokens],
            weights.astype(np.float64)[:, None],
        )
        expected_TD[tokens] += reference.expert_chunk(x, gate_FD, up_FD, down_DF, weights, quantized)
        chain = (-(-D // 32) + 1) if reads_int8 else D
        hidden_TF, error_TF = reference.hidden_units(x, gate_FD, up_FD), hidden_error(x, gate_FD, up_FD, chain)
        if quantized:
            error_TF = rounding_error(hidden_TF, error_TF)
        down_chain = (width // 32 + 1) if quantized else width
        size_TD = np.abs(hidden_TF) @ np.abs(down_DF).T
        bound_TD[tokens] += weight_T * (error_TF @ np.abs(down_DF).T + (down_chain + 1) * U * size_TD) * 1.02
        bound_TD[tokens] += 2.0**-33
    error_TD = np.abs(case.sums(portable) * 2.0**-32 - expected_TD)
    assert (error_TD <= bound_TD).all()
    # Roundings mostly cancel: the worst case must be near for one step of int8, and far for 300 roundings of 2^-24.
    assert (
        error_TD.max()
        < (0.02 if any(fmt.down.format.quantized for fmt in formats) else 4e-6) * np.abs(expected_TD).max()
    )


@pytest.mark.parametrize(("formats", "T", "D", "width"), CASES)
def test_expert_bits_batches_and_partitions(portable, kernels, bench, same_bits, formats, T, D, width):
    case = Experts(bench, portable, formats, T, D, width, chunks=5)
    whole_TD = case.sums(kernels)
    same_bits(whole_TD, case.sums(portable))
    for parts in ([[0, 1], [2, 3, 4]], [[3], [], [4, 0], [2, 1]]):
        partial = [case.sums(kernels, part) for part in parts]
        same_bits(sum(partial[1:], start=partial[0]), whole_TD)
    for t in {0, T // 2, T - 1}:
        same_bits(case.sums(kernels, only=t)[0], whole_TD[t])


@pytest.mark.parametrize("formats", [*(alike(fmt, 32) for fmt in WeightFormat), MIXED])
@pytest.mark.parametrize("T", [130, 70])  # sums beyond a core's cache, sums within it
def test_uneven_experts_and_many_tokens(portable, kernels, bench, same_bits, formats, T):
    """Chunks of 1 to 130 tokens, in any order and taken more than once; rows that do not follow each other."""
    D, width = 2064, 32
    case = Experts(bench, portable, formats, T, D, width, chunks=6)
    for c, count in enumerate((T, 1, 63, 64, 65, 0)):
        case.tokens[c] = np.sort(bench.rng.permutation(T)[:count])
        case.weights[c] = bench.rng.uniform(0.05, 1, count).astype(np.float32)
    whole_TD = case.sums(kernels)
    same_bits(whole_TD, sum((case.sums(portable, [c]) for c in range(1, 6)), start=case.sums(portable, [0])))
    same_bits(case.sums(kernels, [5, 3, 0, 4, 2, 1]), whole_TD)
    same_bits(case.sums(kernels, only=T - 1)[0], whole_TD[T - 1])


def test_hidden_units_beyond_one_batch(kernels, portable, bench, same_bits):
    """Many tokens of many chunks: their hidden units are kept a few megabytes at a time."""
    repeats = 9
    case = Experts(bench, portable, alike(WeightFormat.F32, 0), 4160, 66, 32, chunks=1)
    many_TD = case.sums(kernels, [0] * repeats)
    same_bits(many_TD, case.sums(kernels) * repeats)


def test_no_chunks_give_zeros(kernels, bench):
    case = Experts(bench, kernels, alike(WeightFormat.Q4, 32), 2, 33, 32, chunks=1)
    assert not case.sums(kernels, []).any()


def test_silu_far_from_zero(portable, bench):
    """Gates of +-200 and +-90: exp is cut off at -87 and clamped at 88, silu stays a or nearly 0."""
    fmt, gates = WeightFormat.F32, np.array([200.0, 90.0, 0.0, -90.0, -200.0, 1e-30])
    gate_FD, up_FD, down_DF = np.zeros((32, 6)), np.zeros((32, 6)), np.zeros((6, 32))
    for i, value in enumerate(gates):
        gate_FD[i, 0], up_FD[i, 0], down_DF[i, i] = value, 1, 1
    parts = [bench.packed(portable, bench.of(m.astype(np.float32)), fmt, 0) for m in (gate_FD, up_FD, down_DF)]
    chunk, listed = bench.of(np.concatenate(parts)), ChunkList(1)
    listed.set(np.array([address_of(chunk)], np.uint64), ChunkFormats(alike(fmt, 0)), np.array([0]), np.array([1]))
    operand = bench.operand(portable, bench.of(np.eye(1, 6, dtype=np.float32)), quantized=False)
    sums_TD, fault_T = bench.empty((1, 6), np.int64), bench.faults(1)
    token_N, weight_N = bench.of(np.zeros(1, np.int32)), bench.of(np.ones(1, np.float32))
    portable.experts(sums_TD, fault_T, listed, 1, token_N, weight_N, operand, 1, 32, 0)
    assert (sums_TD[0] * 2.0**-32).tolist() == [200, 90, 0, 0, 0, 0]
