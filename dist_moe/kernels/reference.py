"""What every kernel computes, in float64 NumPy: the specification of values and of the packed bytes.

The portable C build must stay within a stated error bound of these; NUMERICS rules say how its bits come about.
Legend: T tokens, S cached positions, D model dim, h query heads, g KV heads, P head dim, E experts, K experts per
token, F hidden units of a chunk, V vocabulary, R matrix rows, C matrix columns, N candidates; _j a group of 32.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.arrays import Array, F32Array, I32Array, I64Array, U8Array
from dist_moe.kernels.formats import BLOCK_POSITIONS, GROUP, TILE_ROWS, VOCABULARY_BLOCK, KvFormat, WeightFormat
from dist_moe.model_config import round_up

F64Array: TypeAlias = npt.NDArray[np.float64]

# ---- packed weights ----


def bf16_to_f32(bits: Array) -> F32Array:
    """The values of bf16 numbers given as uint16: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: F32Array) -> npt.NDArray[np.uint16]:
    """The nearest bf16, ties to even, of finite float32 values."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def weight_scales(weights_RC: F32Array, fmt: WeightFormat, group: int) -> npt.NDArray[np.float16]:
    """The f16 scales [R, groups] of q8 (largest magnitude / 127) or q4 (value of largest magnitude / -8)."""
    rows, columns = weights_RC.shape
    group = group or columns
    padded = np.zeros((rows, -(-columns // group), group), np.float32)
    padded.reshape(rows, -1)[:, :columns] = weights_RC
    at = np.abs(padded).argmax(axis=2, keepdims=True)
    largest = np.take_along_axis(padded, at, 2)[..., 0]
    exact = np.abs(largest) / np.float32(127) if fmt == WeightFormat.Q8 else largest / np.float32(-8)
    with np.errstate(over="ignore"):
        return np.asarray(exact, np.float16)


def quantize_weights(
    weights_RC: F32Array, scale_RG: npt.NDArray[np.float16], fmt: WeightFormat, group: int
) -> tuple[npt.NDArray[np.int32], F64Array]:
    """The signed integers q [R, C] of a q8 or q4 matrix, and the values scale * q."""
    columns = weights_RC.shape[1]
    scale_RC = np.repeat(scale_RG, group or columns, axis=1)[:, :columns].astype(np.float32)
    ratio_RC = np.divide(weights_RC, scale_RC, out=np.zeros_like(weights_RC), where=scale_RC != 0)
    low, high = (-127, 127) if fmt == WeightFormat.Q8 else (-8, 7)
    q_RC = np.clip(np.rint(ratio_RC), low, high).astype(np.int32)
    return q_RC, scale_RC.astype(np.float64) * q_RC


def unpack_matrix(packed: U8Array, rows: int, columns: int, fmt: WeightFormat, group: int) -> F64Array:
    """The values [R, C] of a packed matrix, from its bytes.

    A matrix is tiles of 16 rows. f32, bf16: [C][16] values. q8, q4: f16 scales [groups][16], padded to 64 bytes; then,
    per 32 columns, 64-byte vectors. Vector j holds at byte 4r + b, for row r and b < 4: q + 128 of
    column 4j + b (q8, eight vectors); q + 8 of columns 4j + b and 16 + 4j + b in its low and high half (q4, four).
    """
    tiles = -(-rows // TILE_ROWS)
    bytes_t = packed.reshape(tiles, -1)
    if not fmt.quantized:
        dtype, size = (np.float32, 4) if fmt == WeightFormat.F32 else (np.uint16, 2)
        values = np.ascontiguousarray(bytes_t[:, : columns * TILE_ROWS * size]).view(dtype)
        floats = values if fmt == WeightFormat.F32 else bf16_to_f32(values)
        return floats.reshape(tiles, columns, TILE_ROWS).swapaxes(1, 2).reshape(-1, columns)[:rows].astype(np.float64)
    groups = -(-columns // group) if group else 1
    scales = np.ascontiguousarray(bytes_t[:, : groups * TILE_ROWS * 2]).view(np.float16)
    scale_RG = scales.reshape(tiles, groups, TILE_ROWS).swapaxes(1, 2).reshape(-1, groups).astype(np.float64)
    codes = bytes_t[:, round_up(groups * TILE_ROWS * 2, 64) :]
    if fmt == WeightFormat.Q8:
        q_RC = _vectors_to_rows(codes.reshape(tiles, -1, 8, TILE_ROWS, 4)).astype(np.int64) - 128
    else:
        halves = np.stack([codes & 15, codes >> 4]).reshape(2, tiles, -1, 4, TILE_ROWS, 4)
        vectors = np.concatenate([halves[0], halves[1]], axis=2)  # columns 0 ... 15, then 16 ... 31 of each group
        q_RC = _vectors_to_rows(vectors).astype(np.int64) - 8
    scale_RC = np.repeat(scale_RG, group or round_up(columns, GROUP), axis=1)[:, :columns]
    return (scale_RC * q_RC[:, :columns])[:rows]


def _vectors_to_rows(vectors: Array) -> Array:
    """[tiles, groups, vector j, row r, byte b] -> [tiles * rows, groups * 4j + b]."""
    tiles, groups, count, rows, width = vectors.shape
    return vectors.transpose(0, 3, 1, 2, 4).reshape(tiles * rows, groups * count * width)


# ---- vectors ----


def quantize(x_TC: F32Array) -> tuple[npt.NDArray[np.int8], F32Array, I32Array]:
    """Rule 5, exactly: q int8 [T, C padded to 32], scale float32 and sum int32 [T, groups]."""
    tokens, columns = x_TC.shape
    x_Tjk = np.zeros((tokens, -(-columns // GROUP), GROUP), np.float32)
    x_Tjk.reshape(tokens, -1)[:, :columns] = x_TC
    amax_Tj = np.abs(x_Tjk).max(axis=2)
    tiny_Tj = amax_Tj < np.float32(2.0**-64)
    scale_Tj = np.where(tiny_Tj, np.float32(0), amax_Tj / np.float32(127))
    inverse_Tj = np.where(tiny_Tj, np.float32(0), np.float32(127) / np.where(tiny_Tj, np.float32(1), amax_Tj))
    q_Tjk = np.clip(np.rint(x_Tjk * inverse_Tj[..., None]), -127, 127).astype(np.int8)
    return q_Tjk.reshape(tokens, -1), scale_Tj, q_Tjk.sum(axis=2, dtype=np.int32)


def dequantize(q_TC: npt.NDArray[np.int8], scale_Tj: F32Array, columns: int) -> F64Array:
    """The values [T, C] that an int8 operand stands for."""
    return (q_TC.astype(np.float64) * np.repeat(scale_Tj.astype(np.float64), GROUP, axis=1))[:, :columns]


def rmsnorm(x_TD: Array, gain_D: Array, eps: float) -> F64Array:
    """Root-mean-square norm: x / sqrt(mean(x^2) + eps) * gain."""
    x_TD = x_TD.astype(np.float64)
    return np.asarray(x_TD / np.sqrt(np.mean(x_TD**2, axis=-1, keepdims=True) + eps) * gain_D)


def fixed_point(x: Array) -> I64Array:
    """A unit's float32 contribution as int64: rint(x * 2^32) (rule 7); exact, since |x| < 2^18."""
    return np.rint(x.astype(np.float64) * 2.0**32).astype(np.int64)


def from_fixed_point(sums: I64Array) -> F32Array:
    """The float32 nearest to an exact sum, through float64 as rule 7 says."""
    return (sums.astype(np.float64) * 2.0**-32).astype(np.float32)


# ---- attention ----


def rope_angles(position_T: I64Array, inv_freq_P: F32Array, factor: float) -> tuple[F64Array, F64Array]:
    """Cosines and sines [T, P/2] of position * inv_freq, times YaRN's factor."""
    angle_TP = position_T[:, None].astype(np.float64) * inv_freq_P.astype(np.float64)
    return np.cos(angle_TP) * factor, np.sin(angle_TP) * factor


def rotate(x_ThP: F64Array, cos_TP: Array, sin_TP: Array) -> F64Array:
    """Rotate the pairs (i, i + P/2) of every head."""
    half = x_ThP.shape[-1] // 2
    cos, sin = cos_TP[:, None].astype(np.float64), sin_TP[:, None].astype(np.float64)
    low, high = x_ThP[..., :half], x_ThP[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def narrow(x: F32Array, fmt: KvFormat) -> F64Array:
    """What the cache keeps of K or V [..., P]: f16 rounds, q8 quantizes groups of 32 dims by rule 5."""
    if fmt == KvFormat.F32:
        return x.astype(np.float64)
    if fmt == KvFormat.F16:
        return x.astype(np.float16).astype(np.float64)
    q, scale, _ = quantize(x.reshape(-1, x.shape[-1]))
    return dequantize(q, scale, x.shape[-1]).reshape(x.shape)


def unpack_kv_block(block: U8Array, head_dim: int, fmt: KvFormat) -> tuple[F64Array, F64Array]:
    """K and V [64, P] of one block of one KV head, from its bytes.

    f32, f16: K as 4 tiles [P][16 positions], V as [64][P]. q8: K as 4 tiles of, per 32 dims, eight 64-byte vectors (as
    q8 weights, but signed) and 16 f32 scales; V as int8 [64][P padded to 32], then f32 scales [64][groups].
    """
    tiles = BLOCK_POSITIONS // TILE_ROWS
    k_bytes, v_bytes = block.reshape(2, -1)
    if fmt != KvFormat.Q8:
        dtype = np.float32 if fmt == KvFormat.F32 else np.float16
        k = k_bytes.view(dtype).reshape(tiles, head_dim, TILE_ROWS).swapaxes(1, 2).reshape(BLOCK_POSITIONS, head_dim)
        return k.astype(np.float64), v_bytes.view(dtype).reshape(BLOCK_POSITIONS, head_dim).astype(np.float64)
    groups = -(-head_dim // GROUP)
    parts = k_bytes.reshape(tiles, groups, 8 * 64 + 64)
    codes = np.ascontiguousarray(parts[..., :512]).view(np.int8).reshape(tiles, groups, 8, TILE_ROWS, 4)
    scales = np.ascontiguousarray(parts[..., 512:]).view(np.float32).swapaxes(1, 2).reshape(BLOCK_POSITIONS, groups)
    split = BLOCK_POSITIONS * groups * GROUP
    v_codes = v_bytes[:split].view(np.int8).reshape(BLOCK_POSITIONS, -1)
    v_scales = v_bytes[split:].view(np.float32).reshape(BLOCK_POSITIONS, groups)
    return dequantize(_vectors_to_rows(codes), scales, head_dim), dequantize(v_codes, v_scales, head_dim)


def attention(q_hP: F64Array, k_SgP: F64Array, v_SgP: F64Array, kv_of_h: I32Array, scale: float) -> F64Array:
    """One token's softmax attention [h, P] over its S cached positions, itself included; heads share KV heads."""
    k_hSP, v_hSP = k_SgP.swapaxes(0, 1)[kv_of_h], v_SgP.swapaxes(0, 1)[kv_of_h]
    score_hS = np.einsum("hp,hsp->hs", q_hP, k_hSP) * scale
    weight_hS = np.exp(score_hS - score_hS.max(axis=1, keepdims=True))
    return np.asarray(np.einsum("hs,hsp->hp", weight_hS / weight_hS.sum(axis=1, keepdims=True), v_hSP))


# ---- experts ----


def route(logits_TE: F32Array, k: int, norm_topk_prob: bool) -> tuple[I32Array, F64Array]:
    """The k best experts of each token, ties to the lowest id, and their softmax weights over all experts."""
    ids_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, :k]
    p_TE = np.exp(logits_TE.astype(np.float64) - logits_TE.max(axis=1, keepdims=True))
    weights_TK = np.take_along_axis(p_TE / p_TE.sum(axis=1, keepdims=True), ids_TK, axis=1)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(axis=1, keepdims=True)
    return ids_TK.astype(np.int32), weights_TK


def silu(a: F64Array) -> F64Array:
    """Sigmoid-weighted a / (1 + exp(-a)), exp clamped at 88 as in rule 4."""
    return np.asarray(a / (1.0 + np.exp(np.minimum(-a, 88.0))))


def hidden_units(x_TD: F64Array, gate_FD: F64Array, up_FD: F64Array) -> F64Array:
    """The hidden units silu(gate x) * up x, [T, F], of an expert chunk."""
    return np.asarray(silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T))


def expert_chunk(
    x_TD: F64Array, gate_FD: F64Array, up_FD: F64Array, down_DF: F64Array, weight_T: Array, quantized: bool
) -> F64Array:
    """One chunk's contributions weight * down(hidden units), [T, D]; quantized weights read hidden units as int8."""
    hidden_TF = hidden_units(x_TD, gate_FD, up_FD)
    if quantized:
        q_TF, scale_Tj, _ = quantize(hidden_TF.astype(np.float32))
        hidden_TF = dequantize(q_TF, scale_Tj, hidden_TF.shape[1])
    return np.asarray(weight_T[:, None] * (hidden_TF @ down_DF.T))


# ---- logits and sampling ----


def vocabulary_blocks(logits_V: F32Array, temperature: float, valid: int) -> tuple[F64Array, F64Array]:
    """Per 128 logits: the largest, and the sum of exp((logit - largest) / temperature) below `valid`."""
    blocks = -(-len(logits_V) // VOCABULARY_BLOCK)
    padded = np.full(blocks * VOCABULARY_BLOCK, -np.inf)
    padded[: min(valid, len(logits_V))] = logits_V[:valid]
    logits_Bv = padded.reshape(blocks, VOCABULARY_BLOCK)
    max_B = logits_Bv.max(axis=1)
    with np.errstate(invalid="ignore"):
        exponent_Bv = (logits_Bv - max_B[:, None]) / (temperature or 1.0)
    return max_B, np.exp(exponent_Bv, where=logits_Bv > -np.inf, out=np.zeros_like(logits_Bv)).sum(axis=1)


def ranked(logits_V: F32Array, valid: int) -> npt.NDArray[np.intp]:
    """Ids below `valid` by (logit descending, id ascending)."""
    return np.argsort(-logits_V[:valid], kind="stable")


def kept_tokens(
    logits_V: F32Array, valid: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.intp], F64Array]:
    """The ids that the sampler may draw, best first, and their probabilities.

    In order: temperature; top_k (0: all); the smallest prefix that holds top_p of what is left; tokens of at least
    min_p of the best one's probability.
    """
    ids = ranked(logits_V, valid)[: top_k or None]
    mass = np.exp((logits_V[ids].astype(np.float64) - logits_V[ids[0]]) / temperature)
    before = np.cumsum(mass) - mass
    kept = ((before < top_p * mass.sum()) | (top_p >= 1)) & (mass >= min_p * mass[0])
    kept[0] = True
    return ids[kept], mass[kept] / mass[kept].sum()


def typical_tokens(p_N: F64Array, typical_p: float) -> npt.NDArray[np.bool_]:
    """Which tokens of a distribution locally typical sampling keeps, as transformers' TypicalLogitsWarper.

    Those whose surprise -log p is closest to its expectation, until they hold typical_p; equally close ones stay.
    """
    surprise = -np.log(p_N)
    distance = np.abs(surprise - (p_N * surprise).sum())
    order = np.argsort(distance, kind="stable")
    before = np.cumsum(p_N[order]) - p_N[order]
    return np.asarray(distance <= distance[order][before < typical_p].max())


def uniform(seed: int, sample_index: int, position: int) -> float:
    """53 bits of Philox keyed by the seed at counter (sample index, position), in [0, 1) (rule 14)."""
    words = [value >> shift & 0xFFFFFFFF for value in (sample_index, position, seed) for shift in (0, 32)]
    low, high, _, _ = philox4x32((words[0], words[1], words[2], words[3]), (words[4], words[5]))
    return ((high << 32 | low) >> 11) * 2.0**-53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, four 32-bit words (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
