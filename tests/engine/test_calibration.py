"""What calibration adds up, against a forward pass in float64, and on any cut into steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dist_moe.engine.calibrating import calibrate
from dist_moe.kernels import KvFormat, reference
from dist_moe.store.calibrated import CalibratedImportance
from dist_moe.store.calibration import LEAST_TOKENS, Calibration, merge
from helpers.tiny_model import TinyModel, random_ids

TINY = TinyModel(layers=3, dense_layers=(1,))
IDS = [random_ids(count, TINY.vocabulary, seed=count) for count in (29, 70)]
EPS = 1e-6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("calibrated"))


@pytest.fixture
def calibrated(make_store, make_engine, directory: Path):
    def run(weights: str = "f32", ids=IDS, **options: object) -> Calibration:
        engine = make_engine(make_store(directory, weights), kv=KvFormat.F32, **options)
        found = calibrate(engine, ids, lambda: False)
        assert engine.model.observer is None
        return found

    return run


def attended(normed_TD: np.ndarray, tensors: dict, name: str) -> np.ndarray:
    """What o_proj reads of one document, float64 [T, heads * head_dim]."""
    T, P = len(normed_TD), TINY.head_dim
    inv_freq_P = (1e6 ** (-np.arange(0, P, 2) / P)).astype(np.float32)
    cos_TP, sin_TP = reference.rope_angles(np.arange(T), inv_freq_P, 1.0)

    def heads(key: str) -> np.ndarray:
        made = (normed_TD @ tensors[f"{name}{key}_proj.weight"].astype(np.float64).T).reshape(T, -1, P)
        if key == "v":
            return made
        return reference.rotate(reference.rmsnorm(made, tensors[f"{name}{key}_norm.weight"], EPS), cos_TP, sin_TP)

    q, k, v = heads("q"), heads("k"), heads("v")
    kv_of_h = (np.arange(TINY.heads) // (TINY.heads // TINY.kv_heads)).astype(np.int32)
    rows = [reference.attention(q[t], k[: t + 1], v[: t + 1], kv_of_h, P**-0.5).reshape(-1) for t in range(T)]
    return np.stack(rows)


class Definition:
    """The sums of some documents in float64, layer by layer."""

    def __init__(self, directory: Path) -> None:
        self.tensors = load_file(directory / "model.safetensors")
        self.sums: dict[tuple[int, str], np.ndarray] = {}

    def read(self, ids: tuple[int, ...]) -> None:
        x_TD = self.tensors["model.embed_tokens.weight"][list(ids)].astype(np.float64)
        for layer in range(TINY.layers):
            name = f"model.layers.{layer}."
            normed_TD = self.norm(x_TD, name + "input_layernorm.weight")
            self.add(layer, "input_D", (normed_TD**2).sum(axis=0))
            heads_TC = attended(normed_TD, self.tensors, name + "self_attn.")
            self.add(layer, "output_C", (heads_TC**2).sum(axis=0))
            x_TD = x_TD + heads_TC @ self.tensors[name + "self_attn.o_proj.weight"].astype(np.float64).T
            after = (x_TD**2).sum(axis=0)
            x_TD = x_TD + self.experts(layer, self.norm(x_TD, name + "post_attention_layernorm.weight"))
            self.add(layer, "residual_2D", np.stack([after, (x_TD**2).sum(axis=0)]))
        self.add(TINY.layers, "final_D", (self.norm(x_TD, "model.norm.weight") ** 2).sum(axis=0))

    def experts(self, layer: int, normed_TD: np.ndarray) -> np.ndarray:
        name = f"model.layers.{layer}.mlp."
        dense = layer in TINY.dense_layers
        ids_TK, weights_TK = np.zeros((len(normed_TD), 1), np.int32), np.ones((len(normed_TD), 1))
        if not dense:
            logits_TE = normed_TD @ self.tensors[name + "gate.weight"].astype(np.float64).T
            ids_TK, weights_TK = reference.route(logits_TE.astype(np.float32), TINY.experts_per_token, True)
        out_TD = np.zeros_like(normed_TD)
        count = 1 if dense else TINY.experts
        hidden = TINY.dense_hidden if dense else TINY.expert_hidden
        inputs_ED, hidden_EF = np.zeros((count, TINY.model_dim)), np.zeros((count, hidden))
        for expert in range(count):
            part = name if dense else f"{name}experts.{expert}."
            gate, up, down = (
                self.tensors[f"{part}{key}_proj.weight"].astype(np.float64) for key in ("gate", "up", "down")
            )
            tokens, places = np.nonzero(ids_TK == expert)
            weight_N1 = weights_TK[tokens, places].astype(np.float64)[:, np.newaxis]
            hidden_NF = reference.hidden_units(normed_TD[tokens], gate, up)
            inputs_ED[expert] = ((weight_N1 * normed_TD[tokens]) ** 2).sum(axis=0)
            hidden_EF[expert] = ((weight_N1 * hidden_NF) ** 2).sum(axis=0)
            np.add.at(out_TD, tokens, weight_N1 * (hidden_NF @ down.T))
        self.add(layer, "experts_ED", inputs_ED)
        self.add(layer, "hidden_EF", hidden_EF)
        self.add(layer, "tokens_E", np.bincount(ids_TK.ravel(), minlength=count))
        self.add(layer, "mass_E", np.bincount(ids_TK.ravel(), weights_TK.ravel(), minlength=count))
        return out_TD

    def norm(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        return reference.rmsnorm(x_TD, self.tensors[name], EPS)

    def add(self, layer: int, name: str, values: np.ndarray) -> None:
        self.sums[layer, name] = self.sums.get((layer, name), 0) + values


def arrays(calibration: Calibration) -> list[np.ndarray]:
    return [*(array for layer in calibration.layers for array in layer.values()), calibration.final_D]


def test_sums_equal_their_definition(calibrated, directory: Path) -> None:
    found = calibrated()
    expected = Definition(directory)
    for ids in IDS:
        expected.read(ids)
    assert found.tokens == 99
    for (layer, name), sums in expected.sums.items():
        own = found.final_D if name == "final_D" else getattr(found.layers[layer], name)
        assert own.shape == sums.shape, (layer, name)
        if name == "tokens_E":
            assert np.array_equal(own, sums)
        else:
            np.testing.assert_allclose(own, sums, rtol=2e-4, atol=1e-5 * sums.max(), err_msg=f"{layer} {name}")


@pytest.mark.parametrize("weights", ["f32", "q4"])
def test_the_cut_into_steps_changes_no_bit(calibrated, weights: str) -> None:
    one, other = calibrated(weights, prefill_chunk=512), calibrated(weights, prefill_chunk=7)
    for found, expected in zip(arrays(one), arrays(other), strict=True):
        assert found.any()
        assert np.array_equal(found, expected)


def test_texts_add_up(calibrated) -> None:
    parts = [calibrated(ids=[ids]) for ids in IDS]
    merged, whole = merge(parts), calibrated()
    assert merged.tokens == whole.tokens
    for found, expected in zip(arrays(merged), arrays(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_experts_with_few_tokens_take_the_mean_of_their_layer(calibrated) -> None:
    calibration = calibrated()
    layer = calibration.layers[0]
    few = layer.sparse
    enough = [expert for expert in range(TINY.experts) if expert not in few]
    assert few
    assert enough
    assert {expert for expert in range(TINY.experts) if layer.tokens_E[expert] < LEAST_TOKENS} == set(few)
    importance = CalibratedImportance(calibration)
    for key, sums_EC in (("up", layer.experts_ED), ("down", layer.hidden_EF)):
        mean_C = sums_EC.sum(axis=0)
        found = importance.importance_C(f"layers.0.experts.{few[0]}.{key}")
        assert np.array_equal(found, importance.importance_C(f"layers.0.experts.{few[-1]}.{key}"))
        np.testing.assert_allclose(found, mean_C / mean_C.mean(), rtol=1e-6)
        own_C = sums_EC[enough[0]]
        np.testing.assert_allclose(
            importance.importance_C(f"layers.0.experts.{enough[0]}.{key}"), own_C / own_C.mean(), rtol=1e-6
        )
    assert importance.importance_C("layers.0.router") is None
