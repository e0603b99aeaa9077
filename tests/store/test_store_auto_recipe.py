"""Formats by a budget of bits: what is chosen, by definition and against every other choice; and recipes as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import UsageError
from dist_moe.kernels import Kernels
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice, WeightFormat
from dist_moe.store.auto_recipe import AutoRecipe, Point, auto_recipe, choose, lower_hull, usable_candidates
from dist_moe.store.calibration import Calibration, LayerMoments, group_count, moment_shapes
from dist_moe.store.formats import ModelFormats
from dist_moe.store.plan import StoreOptions, plan_store
from dist_moe.store.recipe_file import parse_recipe
from dist_moe.store.recipe_text import numbers_text, recipe_text
from helpers.tiny_model import TinyModel

TINY = TinyModel(experts=4, head_dim=64, dense_hidden=192)
Q4, Q8 = MatrixFormat(WeightFormat.Q4, 32), MatrixFormat(WeightFormat.Q8, 32)
Recipe = Callable[..., AutoRecipe]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(TINY.write(tmp_path_factory.mktemp("auto")))


def calibration_of(source: Checkpoint, seed: int = 3) -> Calibration:
    """Any sums: what is chosen must follow from them, whatever they are."""
    random, config = np.random.default_rng(seed), source.config
    layers = []
    for layer in range(config.layers):
        arrays = {name: 100 * random.random(shape) for name, shape in moment_shapes(config, layer).items()}
        arrays["tokens_E"] = random.integers(0, 100, arrays["tokens_E"].shape)
        layers.append(LayerMoments(**arrays))
    sensitive_G = random.random(group_count(config.layers))
    final_D = random.random(config.model_dim)
    return Calibration("tiny", source.fingerprint(), (), 100, tuple(layers), final_D, sensitive_G, 10)


@pytest.fixture
def recipe(source: Checkpoint) -> Recipe:
    def make(bits: float, threads: int = 1, calibration: Calibration | None = None) -> AutoRecipe:
        with Kernels(threads) as kernels:
            return auto_recipe(source, calibration or calibration_of(source), bits, kernels, lambda done, total: None)

    return make


@pytest.mark.parametrize("bits", [4.4, 4.6, 5.0, 7.0, 12.0])
def test_the_target_is_met_within_one_step_and_never_exceeded(recipe: Recipe, source: Checkpoint, bits: float) -> None:
    found = recipe(bits)
    assert found.bits_per_weight == found.formats.bits_per_weight(source.config)
    weights = sum(np.prod(source.shape(name)) for name in source.names() if is_matrix(name))
    largest_step = 8 * max(np.prod(source.shape(name)) for name in source.names() if is_matrix(name))
    assert bits - largest_step / weights <= found.bits_per_weight <= bits
    plan_store(source, StoreOptions(formats=found.formats, scales=ScaleChoice.MSE))


def is_matrix(name: str) -> bool:
    return name == "lm_head" or name.split(".")[-1] in ("q", "k", "v", "o", "gate", "up", "down")


def test_a_calibration_in_a_store_of_q4_is_refused(recipe: Recipe, source: Checkpoint) -> None:
    nothing = calibration_of(source)
    nothing.sensitive_G[:] = 0
    with pytest.raises(UsageError, match="rounding to q4 changes nothing, as in a store of q4 weights"):
        recipe(5.0, calibration=nothing)


def test_more_bits_cost_less(recipe: Recipe) -> None:
    costs = [recipe(bits).cost for bits in (4.4, 4.5, 5.0, 8.0, 16.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 100, "bf16"


def test_it_is_expected_to_be_better_than_one_format(recipe: Recipe) -> None:
    found = recipe(4.5)
    assert found.uniform == Q4
    assert found.cost < found.uniform_cost


def test_threads_change_nothing(recipe: Recipe) -> None:
    assert recipe(5.0, 1) == recipe(5.0, 3)


def test_bits_go_to_what_is_sensitive(recipe: Recipe, source: Checkpoint) -> None:
    calibration = calibration_of(source)
    for group, key in ((0, "q"), (2, "v"), (len(calibration.sensitive_G) - 1, "lm_head")):
        sensitive_G = np.full_like(calibration.sensitive_G, 1e-6)
        sensitive_G[group] = 1.0
        found = recipe(6.0, calibration=replace(calibration, sensitive_G=sensitive_G)).formats
        assert found.matrix(key, 0).format in (WeightFormat.Q8, WeightFormat.BF16), key
        assert found.main == WeightFormat.Q4


def test_too_few_bits_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match=r"--target-bits 4: this model needs 4\.\d+ at least"):
        recipe(4.0)


def test_a_calibration_without_sensitivities_is_refused(recipe: Recipe, source: Checkpoint) -> None:
    with pytest.raises(UsageError, match="does not say how sensitive matrices are"):
        recipe(4.5, calibration=replace(calibration_of(source), sensitive_tokens=0))


@pytest.mark.parametrize(("hidden", "groups"), [(160, {32}), (192, {32, 64}), (256, {32, 64, 128})])
def test_candidates_fit_the_model(tmp_path: Path, hidden: int, groups: set[int]) -> None:
    config = Checkpoint.open(TINY.write(tmp_path, expert_hidden=256, dense_hidden=hidden)).config
    assert {found.group for found in usable_candidates(config) if found.format.quantized} == groups


def test_the_choice_is_the_best_of_all_where_steps_are_equal() -> None:
    random = np.random.default_rng(5)
    points = []
    for _ in range(6):
        gains = np.sort(random.random(2))[::-1]
        costs = 3 - np.cumsum([0.0, *gains])
        points.append([Point(Q4, 2 + place, cost) for place, cost in enumerate(costs.tolist())])
    for budget in range(12, 25):
        found = choose(points, budget, 4.0)
        bits, cost = sum(point.bits for point in found), sum(point.cost for point in found)
        assert bits <= budget
        best = min(
            sum(point.cost for point in every)
            for every in itertools.product(*points)
            if sum(point.bits for point in every) <= bits
        )
        assert cost <= best + 1e-12


def test_the_hull_leaves_out_what_a_mixture_beats() -> None:
    low, middle, high = Point(Q4, 1, 1.0), Point(Q4, 2, 0.9), Point(Q8, 3, 0.1)
    worse = Point(Q8, 4, 0.5)
    assert lower_hull([worse, high, middle, low]) == [low, high]
    assert lower_hull([low, replace(middle, cost=0.3), high]) == [low, replace(middle, cost=0.3), high]


def test_a_recipe_as_text_gives_the_same_formats(recipe: Recipe, source: Checkpoint, tmp_path: Path) -> None:
    for formats in (recipe(5.0).formats, recipe(9.0).formats, ModelFormats.uniform(source.config, *vars(Q8).values())):
        text = recipe_text(formats, ScaleChoice.MSE, "of a test")
        read = parse_recipe(text, "test")
        assert read.formats(source.config) == formats
        assert read.scales == ScaleChoice.MSE
    assert numbers_text([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
