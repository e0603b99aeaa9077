"""The kernels, put together to transformers' modules, against what transformers computed (README.md says how).

Everything is f32 on both sides, so what is left is rounding: 2^-24 per operation, chains of 48 products.
T tokens, D model dim, H query heads, G kv heads, P head dim, E experts, K experts per token, F hidden units.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dist_moe.kernels import (
    NO_FAULT,
    ChunkFormat,
    ChunkFormats,
    ChunkList,
    Kernels,
    KvFormat,
    KvView,
    MatrixFormat,
    MatrixList,
    Operand,
    WeightFormat,
    address_of,
    aligned_empty,
    kv_block_bytes,
    packed_bytes,
)
from dist_moe.model_config import chunk_width, round_up

HERE = Path(__file__).parent
F32 = WeightFormat.F32
PLAIN = MatrixFormat(F32, 0)
RELATIVE = 2e-6  # of the largest value: a module is some 100 roundings of 6e-8 that mostly cancel


@pytest.fixture(scope="module")
def k():
    with Kernels(threads=2) as kernels:
        yield kernels


def load(name):
    with np.load(HERE / f"{name}.npz") as file:
        return SimpleNamespace(**{key: file[key] for key in file.files})


def assert_close(found, expected, relative=RELATIVE):
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def faults(tokens):
    return np.full(tokens, NO_FAULT, np.int32)


def pack(k, weights):
    weights = np.ascontiguousarray(weights, np.float32)
    packed = aligned_empty(packed_bytes(F32, *weights.shape, 0), np.uint8)
    assert k.pack(packed, weights, None, F32, 0) == 0
    return packed


def operand_of(x):
    operand = Operand(len(x), x.shape[1], quantized=False)
    operand.x_TC[...] = x
    return operand


def multiply(k, weights, x):
    out = np.full((len(x), len(weights)), np.nan, np.float32)
    k.matmul(out, MatrixList([(pack(k, weights), len(weights), 0, PLAIN)]), operand_of(x), len(x))
    return out


def normalise(k, x, gain, eps):
    out = np.full_like(x, np.nan)
    k.rmsnorm(out, x, gain, np.float32(eps))
    return out


def attend(k, q_THP, k_TGP, v_TGP):
    """Causal attention of one sequence through an f32 cache, from rows that hold q, k and v."""
    (T, H, P), G = q_THP.shape, k_TGP.shape[1]
    rows_TR = np.concatenate([a.reshape(T, -1) for a in (q_THP, k_TGP, v_TGP)], axis=1)
    blocks = [aligned_empty(G * kv_block_bytes(KvFormat.F32, P), np.uint8) for _ in range(-(-T // 64))]
    view, fault_T = KvView(blocks, np.zeros(T, np.int64), np.arange(T), 0, KvFormat.F32), faults(T)
    k.kv_store(view, fault_T, rows_TR, H * P, (H + G) * P, G, P, 0)
    out_TC = np.full((T, H * P), np.nan, np.float32)
    kv_of_h = np.arange(H, dtype=np.int32) // (H // G)
    k.attention(out_TC, fault_T, rows_TR, view, kv_of_h, np.float32(P**-0.5), G, P, 0)
    assert (fault_T == NO_FAULT).all()
    return out_TC


def whole_attention(k, w, x_TD, bias):
    """Qwen3MoeAttention: q, k, v, norm and rotation, attention, o_proj as an exact sum over heads."""
    (H, P, D), G, T = w.wq_HPD.shape, w.wk_GPD.shape[0], len(x_TD)
    weights_RD = np.concatenate([w.wq_HPD.reshape(-1, D), w.wk_GPD.reshape(-1, D), w.wv_GPD.reshape(-1, D)])
    rows_TR = multiply(k, weights_RD, x_TD)
    if bias:
        k.add_bias(rows_TR, 0, np.concatenate([w.bq_HP.ravel(), w.bk_GP.ravel(), w.bv_GP.ravel()]))
    cos_TP, sin_TP = (np.ascontiguousarray(a[:, : P // 2]) for a in (w.cos_TP, w.sin_TP))
    k.norm_rope(rows_TR, 0, H, w.qnorm_P, cos_TP, sin_TP, np.float32(w.eps))
    k.norm_rope(rows_TR, H * P, G, w.knorm_P, cos_TP, sin_TP, np.float32(w.eps))
    heads = rows_TR.reshape(T, -1, P)
    out_TC = attend(k, heads[:, :H], heads[:, H : H + G], heads[:, H + G :])
    units = MatrixList([(pack(k, w.wo_DHP[:, h]), D, 0, PLAIN) for h in range(H)])
    sums_TD, fault_T, y_TD = np.empty((T, D), np.int64), faults(T), np.zeros((T, D), np.float32)
    k.unit_sums(sums_TD, fault_T, units, operand_of(out_TC), T, P, 0)
    k.add_exact(y_TD, fault_T, sums_TD, w.bo_D if bias else None, 0)
    assert (fault_T == NO_FAULT).all()
    return y_TD


def mixture(k, w, x_TD, ids_TK, weights_TK):
    """The sum over each token's experts, cut into chunks and padded as a store cuts and pads them."""
    (E, F, D), T = w.gate_EFD.shape, len(x_TD)
    width = chunk_width(F, 0)
    padding = ((0, 0), (0, round_up(F, 32) - F), (0, 0))
    gate_EFD, up_EFD, down_EFD = (np.pad(a, padding) for a in (w.gate_EFD, w.up_EFD, w.down_EDF.swapaxes(1, 2)))
    offset_E1, token_N = np.empty(E + 1, np.int32), np.empty(ids_TK.size, np.int32)
    weight_N = np.empty(ids_TK.size, np.float32)
    k.group_by_expert(offset_E1, token_N, weight_N, ids_TK, weights_TK)
    chunks, experts = [], []
    for e in range(E):
        for first in range(0, round_up(F, 32), width):
            part = slice(first, first + width)
            matrices = (gate_EFD[e, part], up_EFD[e, part], down_EFD[e, part].T)
            packed = np.concatenate([pack(k, matrix) for matrix in matrices])
            chunks.append(aligned_empty(len(packed), np.uint8))
            chunks[-1][...] = packed
            experts.append(e)
    listed = ChunkList(len(chunks))
    addresses = np.array([address_of(chunk) for chunk in chunks], np.uint64)
    listed.set(addresses, ChunkFormats([ChunkFormat(PLAIN, PLAIN)]), offset_E1[experts], np.diff(offset_E1)[experts])
    sums_TD, fault_T, y_TD = np.empty((T, D), np.int64), faults(T), np.zeros((T, D), np.float32)
    k.experts(sums_TD, fault_T, listed, len(chunks), token_N, weight_N, operand_of(x_TD), T, width, 0)
    k.add_exact(y_TD, fault_T, sums_TD, None, 0)
    assert (fault_T == NO_FAULT).all()
    return y_TD


def choose(k, logits_TE, count, norm):
    ids_TK = np.full((len(logits_TE), count), -1, np.int32)
    weights_TK, fault_T = np.full(ids_TK.shape, np.nan, np.float32), faults(len(logits_TE))
    k.route(ids_TK, weights_TK, fault_T, logits_TE, norm, 0)
    assert (fault_T == NO_FAULT).all()
    return ids_TK, weights_TK


def test_rmsnorm(k):
    golden = load("rmsnorm")
    for x, weight, eps, y in (
        (golden.x_TD, golden.weight_D, golden.eps, golden.y_TD),
        (golden.x_THP.reshape(-1, 48), golden.weight_P, golden.head_eps, golden.y_THP.reshape(-1, 48)),
    ):
        # Either side is a mean of 80 squares and six operations: 12 roundings of 6e-8 at most.
        np.testing.assert_allclose(normalise(k, x, weight, eps), y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_rope(k, kind):
    golden = load("rope")
    get = lambda name: getattr(golden, f"{kind}_{name}")  # noqa: E731
    half, position_T = len(get("inv_freq")), golden.positions_T.astype(np.int64)
    cos_TP, sin_TP = (np.full((len(position_T), half), np.nan, np.float32) for _ in range(2))
    factor = np.float32(get("attention_factor"))
    k.rope_angles(cos_TP, sin_TP, position_T, get("inv_freq"), factor)
    # transformers rounds the angle to f32; we do not.
    bound_TP = factor * (position_T[:, None] * get("inv_freq") * 2.0**-24 + 2.0**-22)
    assert (np.abs(cos_TP - get("cos_TP")[:, :half]) <= bound_TP).all()
    assert (np.abs(sin_TP - get("sin_TP")[:, :half]) <= bound_TP).all()
    # The rotation alone, with transformers' angles. norm_rope normalises first: undo that with the rows' own norm.
    their_cos_TP, their_sin_TP = (np.ascontiguousarray(get(f"{f}_TP")[:, :half]) for f in ("cos", "sin"))
    for x, rotated in ((get("q_THP"), get("q_rot_THP")), (get("k_TGP"), get("k_rot_TGP"))):
        rows = x.reshape(len(x), -1).copy()
        k.norm_rope(rows, 0, x.shape[1], np.ones(2 * half, np.float32), their_cos_TP, their_sin_TP, np.float32(0))
        length = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True))
        assert_close(rows.reshape(x.shape) * length, rotated, 1e-6)


def test_attention_core(k):
    golden = load("attention")
    assert_close(attend(k, golden.q_THP, golden.k_TGP, golden.v_TGP).reshape(golden.o_THP.shape), golden.o_THP)


def test_attention_module(k):
    golden = load("attention")
    assert_close(whole_attention(k, golden, golden.x_TD, bias=True), golden.y_TD)


@pytest.mark.parametrize("norm", [True, False])
def test_router(k, norm):
    golden = load(f"router_{str(norm).lower()}")
    assert_close(multiply(k, golden.router_ED, golden.x_TD), golden.logits_TE)
    ids_TK, weights_TK = choose(k, golden.logits_TE, 4, norm)
    assert np.array_equal(ids_TK, golden.ids_TK)
    np.testing.assert_allclose(weights_TK, golden.weights_TK, rtol=2e-6, atol=0)


def test_expert(k):
    golden = load("expert")
    T = len(golden.x_TD)
    one = SimpleNamespace(gate_EFD=golden.gate_FD[None], up_EFD=golden.up_FD[None], down_EDF=golden.down_DF[None])
    y_TD = mixture(k, one, golden.x_TD, np.zeros((T, 1), np.int32), np.ones((T, 1), np.float32))
    assert_close(y_TD, golden.y_TD)


def test_moe_block(k):
    golden = load("moe_block")
    ids_TK, weights_TK = choose(k, multiply(k, golden.router_ED, golden.x_TD), 2, norm=True)
    assert np.array_equal(ids_TK, golden.ids_TK)
    assert_close(mixture(k, golden, golden.x_TD, ids_TK, weights_TK), golden.y_TD)


def test_layer(k):
    golden = load("layer")
    x_TD = golden.x_TD + whole_attention(k, golden, normalise(k, golden.x_TD, golden.norm1_D, golden.eps), bias=False)
    normed_TD = normalise(k, x_TD, golden.norm2_D, golden.eps)
    chosen = choose(k, multiply(k, golden.router_ED, normed_TD), int(golden.top_k), norm=True)
    assert_close(x_TD + mixture(k, golden, normed_TD, *chosen), golden.y_TD)
