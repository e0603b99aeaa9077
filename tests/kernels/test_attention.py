"""Rotation, the key/value cache, attention over blocks.

T tokens, S positions, h query heads, g KV heads, P head dim, R columns of a row of q, k and v.
"""

import numpy as np
import pytest

from dist_moe.kernels import NO_FAULT, KvFormat, KvView, MatrixList, Operand, kv_block_bytes, reference

U = 2.0**-24  # half an ulp of f32 at 1
EXP_ULPS = 2  # half ulps of our exp; test_sampling.py checks it
LAYERS, LAYER = 2, 1


def rope_angles(kernels, bench, position_T, inv_freq_P, factor):
    shape = (len(position_T), len(inv_freq_P))
    cos_TP, sin_TP = bench.empty(shape, np.float32), bench.empty(shape, np.float32)
    kernels.rope_angles(cos_TP, sin_TP, position_T, inv_freq_P, factor)
    return cos_TP, sin_TP


@pytest.mark.parametrize(("half", "factor"), [(1, 1.0), (15, 1.0), (16, 1.25), (64, 1.138629436), (65, 1.0)])
def test_rope_angles(portable, kernels, bench, same_bits, half, factor):
    far = [4096, 40959, 131071, 1048575, 2**24 + 1]
    position_T = bench.of(np.array([*range(600), *far], np.int64))
    inv_freq_P = bench.of((1e6 ** -(np.arange(half) / half)).astype(np.float32))
    found = rope_angles(kernels, bench, position_T, inv_freq_P, np.float32(factor))
    same_bits(found, rope_angles(portable, bench, position_T, inv_freq_P, np.float32(factor)))
    for one, expected in zip(found, reference.rope_angles(position_T, inv_freq_P, np.float32(factor)), strict=True):
        # One rounding to f32; the reduced f64 angle is off by some 2^-53 of the position, the f64 sine by 2^-51.
        absolute_T1 = factor * (2.0**-51 + position_T[:, None] * 2.0**-52)
        assert (np.abs(one - expected) <= np.abs(expected) * U + absolute_T1).all()
    assert (found[0][0] == np.float32(factor)).all()
    assert not found[1][0].any()


@pytest.mark.parametrize(("h", "P"), [(1, 2), (3, 30), (2, 48), (16, 128), (1, 130)])
def test_norm_rope_values_and_bits(portable, kernels, bench, same_bits, h, P):
    T, first, stride, eps = 21, 7, 7 + h * P + 5, np.float32(1e-6)
    rows_TR, gain_P = bench.floats(T, stride, scale=4.0), bench.floats(P)
    inv_freq_P = bench.of((1e4 ** -(np.arange(P // 2) / (P // 2))).astype(np.float32))
    cos_TP, sin_TP = rope_angles(portable, bench, bench.of(np.arange(T) * 7), inv_freq_P, 1.0)
    results = []
    for each in (portable, kernels):
        out_TR = bench.of(rows_TR)
        each.norm_rope(out_TR, first, h, gain_P, cos_TP, sin_TP, eps, tokens=20)
        results.append(out_TR)
    same_bits(results[1], results[0])
    found_TR = results[0]
    normed = reference.rmsnorm(rows_TR[:, first : first + h * P].reshape(T, h, P), gain_P, float(eps))
    expected = reference.rotate(normed, cos_TP, sin_TP)[:20]
    pairs = np.abs(normed[..., : P // 2]) + np.abs(normed[..., P // 2 :])
    # The norm's error (test_vectors.py), then two products and a sum of at most |low| + |high|.
    bound = ((-(-P // 16) + 4) / 2 + 6 + 3) * U * np.concatenate([pairs, pairs], axis=-1)[:20]
    assert (np.abs(found_TR[:20, first : first + h * P].reshape(20, h, P) - expected) <= bound).all()
    untouched = np.ones(stride, bool)
    untouched[first : first + h * P] = False
    same_bits(found_TR[:, untouched], rows_TR[:, untouched])
    same_bits(found_TR[20], rows_TR[20])


class Cache:
    """Sequences of random q, k and v in a poisoned cache of two layers, only the second of which is used."""

    def __init__(self, bench, fmt, lengths, h, g, P):
        self.bench, self.fmt, self.h, self.g, self.P = bench, fmt, h, g, P
        self.k_column, self.v_column = h * P + 3, h * P + 3 + g * P  # a gap of three floats
        self.stride = self.v_column + g * P + 2
        self.block_bytes = kv_block_bytes(fmt, P)
        self.blocks, self.first_block, self.rows = [], [], []
        for length in lengths:
            self.first_block.append(len(self.blocks))
            rows = bench.floats(length, self.stride)
            rows[:, ::3] *= np.float32(1e-7)  # denormal as f16
            rows.view(np.uint32)[:, ::2] &= 0xFFFFF000  # ties between two f16
            self.rows.append(rows)
            for _ in range(-(-length // 64)):
                block = bench.empty(LAYERS * g * self.block_bytes, np.uint8)
                block.fill(0xFF)  # NaN, so that reading what is not written shows
                self.blocks.append(block)

    def step(self, tokens):
        """Rows [T, R] and the view of (sequence, position) pairs."""
        rows_TR = self.bench.of(np.stack([self.rows[s][p] for s, p in tokens]))
        table_T = self.bench.of(np.array([self.first_block[s] for s, _ in tokens], np.int64))
        position_T = self.bench.of(np.array([p for _, p in tokens], np.int64))
        return rows_TR, KvView(self.blocks, table_T, position_T, LAYER * self.g * self.block_bytes, self.fmt)

    def store(self, kernels, tokens):
        """Write K and V of the tokens; returns the faults."""
        rows_TR, view = self.step(tokens)
        fault_T = self.bench.faults(len(tokens))
        kernels.kv_store(view, fault_T, rows_TR, self.k_column, self.v_column, self.g, self.P, LAYER)
        return fault_T

    def store_all(self, kernels):
        tokens = [(s, p) for s, rows in enumerate(self.rows) for p in range(len(rows))]
        assert (self.store(kernels, tokens) == NO_FAULT).all()

    def attend(self, kernels, tokens, kv_of_h):
        rows_TR, view = self.step(tokens)
        out_TC, fault_T = self.bench.empty((len(tokens), self.h * self.P), np.float32), self.bench.faults(len(tokens))
        scale = np.float32(self.P**-0.5)
        kernels.attention(out_TC, fault_T, rows_TR, view, kv_of_h, scale, self.g, self.P, LAYER)
        assert (fault_T == NO_FAULT).all()
        return out_TC

    def values(self, sequence):
        """Q, K and V [S, heads, P] as the kernels see them."""
        rows, gP = self.rows[sequence], self.g * self.P
        q = rows[:, : self.h * self.P].reshape(-1, self.h, self.P)
        k, v = (rows[:, c : c + gP].reshape(-1, self.g, self.P) for c in (self.k_column, self.v_column))
        q_kind = KvFormat.Q8 if self.fmt == KvFormat.Q8 else KvFormat.F32
        return (
            reference.narrow(np.ascontiguousarray(q), q_kind),
            reference.narrow(np.ascontiguousarray(k), self.fmt),
            reference.narrow(np.ascontiguousarray(v), self.fmt),
        )


CASES = [(KvFormat.F32, 3, 1, 2), (KvFormat.F32, 2, 2, 30), (KvFormat.F16, 4, 2, 48), (KvFormat.F32, 1, 1, 1)] + [
    (fmt, h, g, P) for fmt in KvFormat for h, g, P in [(6, 2, 32), (5, 2, 128), (3, 3, 96)]
]
GROUPS = {6: [0, 0, 0, 1, 1, 1], 5: [0, 0, 1, 1, 1], 4: [0, 0, 1, 1], 3: [0, 1, 2], 2: [1, 0], 1: [0]}


def kv_of(bench, h, g):
    return bench.of(np.minimum(GROUPS[h], g - 1).astype(np.int32))


@pytest.mark.parametrize(("fmt", "h", "g", "P"), CASES)
def test_cache_keeps_what_the_format_can(portable, kernels, bench, same_bits, fmt, h, g, P):
    bench.rng = np.random.default_rng(5)
    cache = Cache(bench, fmt, [70, 3], h, g, P)
    cache.store_all(kernels)
    for s, length in enumerate((70, 3)):
        _, k_SgP, v_SgP = cache.values(s)
        for position in (0, 64) if s == 0 else (0,):
            block = cache.blocks[cache.first_block[s] + position // 64].reshape(LAYERS, g, -1)
            assert (block[0] == 0xFF).all(), "another layer was written"
            for head in range(g):
                k, v = reference.unpack_kv_block(block[LAYER, head], P, fmt)
                count = min(64, length - position)
                assert np.array_equal(k[:count], k_SgP[position : position + count, head])
                assert np.array_equal(v[:count], v_SgP[position : position + count, head])
                assert np.isnan(v[count:]).all()
                assert np.isnan(k[count:]).all()
    other = Cache(bench, fmt, [70, 3], h, g, P)
    other.rows = cache.rows
    other.store_all(portable)
    for mine, others in zip(cache.blocks, other.blocks, strict=True):
        same_bits(mine, others)


def attention_bound(q_hP, k_SgP, v_SgP, kv_of_h, P):
    """Error of one token's output: that of the scores enters every weight twice, then come the sums."""
    scale, S = P**-0.5, len(k_SgP)
    k_hSP, v_hSP = k_SgP.swapaxes(0, 1)[kv_of_h], v_SgP.swapaxes(0, 1)[kv_of_h]
    score_hS = np.einsum("hp,hsp->hs", q_hP, k_hSP) * scale
    size_hS = np.einsum("hp,hsp->hs", np.abs(q_hP), np.abs(k_hSP)) * scale
    score_error = ((P + 2) * U * size_hS).max(axis=1)
    # Differences of scores are rounded once in a block and once per merge; so are the products with alpha and beta.
    spread = score_hS.max(axis=1) - score_hS.min(axis=1)
    blocks = -(-S // 64)
    weight_error = 2 * score_error + 3 * spread * U + (2 * EXP_ULPS + 2) * (blocks + 1) * U
    weight_hS = np.exp(score_hS - score_hS.max(axis=1, keepdims=True))
    weight_hS /= weight_hS.sum(axis=1, keepdims=True)
    sums_error = (64 + 8 + 4 * blocks) * U
    mean_hP = np.einsum("hs,hsp->hp", weight_hS, np.abs(v_hSP))
    return (2 * weight_error[:, None] + 2 * sums_error) * mean_hP * 1.01 + 1e-36


@pytest.mark.parametrize(("fmt", "h", "g", "P"), CASES)
def test_attention_values(portable, bench, fmt, h, g, P):
    lengths = [1, 65, 200]
    cache = Cache(bench, fmt, lengths, h, g, P)
    cache.store_all(portable)
    kv_of_h = kv_of(bench, h, g)
    for s, positions in enumerate([[0], [0, 1, 31, 63, 64], [62, 127, 128, 199]]):
        q_ShP, k_SgP, v_SgP = cache.values(s)
        found_TC = cache.attend(portable, [(s, p) for p in positions], kv_of_h)
        for found_C, p in zip(found_TC, positions, strict=True):
            arguments = q_ShP[p], k_SgP[: p + 1], v_SgP[: p + 1], kv_of_h
            expected_hP = reference.attention(*arguments, float(np.float32(P**-0.5)))
            assert (np.abs(found_C.reshape(h, P) - expected_hP) <= attention_bound(*arguments, P)).all()


@pytest.mark.parametrize(("fmt", "h", "g", "P"), CASES)
def test_attention_bits_and_batches(portable, kernels, bench, same_bits, fmt, h, g, P):
    cache = Cache(bench, fmt, [1, 130, 70], h, g, P)
    cache.rows[1][:, : h * P] *= 40  # scores that differ by more than 87: some weights vanish
    cache.store_all(portable)
    kv_of_h = kv_of(bench, h, g)
    tokens = [(0, 0), (2, 69), (1, 5), (1, 63), (1, 64), (1, 128), (1, 129), (2, 3)]
    together_TC = cache.attend(kernels, tokens, kv_of_h)
    same_bits(together_TC, cache.attend(portable, tokens, kv_of_h))
    for t, token in enumerate(tokens):
        same_bits(cache.attend(kernels, [token], kv_of_h)[0], together_TC[t])
    same_bits(cache.attend(kernels, tokens[::-1], kv_of_h)[::-1], together_TC)


def test_heads_may_be_computed_apart(portable, bench, same_bits):
    cache = Cache(bench, KvFormat.F16, [70], 6, 2, 32)
    cache.store_all(portable)
    together_TC = cache.attend(portable, [(0, 69)], kv_of(bench, 6, 2))
    for head, kv_head in enumerate(GROUPS[6]):
        alone = Cache(bench, KvFormat.F16, [70], 1, 2, 32)
        alone.blocks = cache.blocks
        alone.rows = [np.ascontiguousarray(cache.rows[0][:, head * 32 : head * 32 + alone.stride])]
        found_TC = alone.attend(portable, [(0, 69)], bench.of(np.array([kv_head], np.int32)))
        same_bits(found_TC[0], together_TC[0, head * 32 : head * 32 + 32])


def test_prefill_in_chunks_is_the_same(kernels, bench, same_bits):
    whole, parts = (Cache(bench, KvFormat.Q8, [75], 2, 1, 64) for _ in range(2))
    parts.rows = whole.rows
    kv_of_h = bench.of(np.zeros(2, np.int32))
    whole.store_all(kernels)
    expected_TC = whole.attend(kernels, [(0, p) for p in range(75)], kv_of_h)
    for first in range(0, 75, 7):
        tokens = [(0, p) for p in range(first, min(first + 7, 75))]
        parts.store(kernels, tokens)
        same_bits(parts.attend(kernels, tokens, kv_of_h), expected_TC[first : first + 7])


def test_a_rank_without_heads(kernels, bench, same_bits):
    """A rank may own no heads: every kernel takes zero of them and touches nothing."""
    rows_TR, fault_T, gain_P, angles_TP = bench.floats(2, 5), bench.faults(2), bench.floats(32), bench.floats(2, 16)
    before_TR = rows_TR.copy()
    view = KvView([bench.empty(64, np.uint8)], np.zeros(2, np.int64), np.arange(2), 0, KvFormat.F16)
    kernels.norm_rope(rows_TR, 0, 0, gain_P, angles_TP, angles_TP, np.float32(1e-6))
    kernels.kv_store(view, fault_T, rows_TR, 0, 0, 0, 32, LAYER)
    out_TC, none_h = bench.empty((2, 0), np.float32), np.zeros(0, np.int32)
    kernels.attention(out_TC, fault_T, rows_TR, view, none_h, np.float32(1), 0, 32, LAYER)
    kernels.matmul(rows_TR, MatrixList([]), Operand(2, 64, True), 2)
    assert (fault_T == NO_FAULT).all()
    same_bits(rows_TR, before_TR)


def test_views_beyond_their_blocks_are_refused(bench):
    block = bench.empty(4096, np.uint8)
    with pytest.raises(TypeError, match="does not reach block 1"):
        KvView([block], np.zeros(1, np.int64), np.array([64], np.int64), 0, KvFormat.F16)
    with pytest.raises(TypeError, match="64-byte"):
        KvView([block[1:]], np.zeros(1, np.int64), np.zeros(1, np.int64), 0, KvFormat.F16)
