"""What is verified: a store on this machine, which of its layers and experts, and over which tokens."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from dist_moe.errors import UsageError
from dist_moe.kernels.formats import WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.manifest import Manifest
from dist_moe.store.reader import Store
from dist_moe.verify.definition import StoreWeights, Weights

MOST_LAYERS_UNASKED = 8

# Of the largest value. f32 and bf16: rounding of f32 chains. q8, q4: where float64 and f32 fall on either side of a
# border between two int8 codes, one code of 127 differs; over a whole model such differences make others.
PART_TOLERANCE = {False: 2e-5, True: 5e-3}
LAYER_TOLERANCE = {False: 2e-5, True: 2e-2}
MODEL_TOLERANCE = {False: 1e-4, True: 5e-2}
# Of a part's root mean square, for what rounding the weights does to its output; a model's logits gather several.
SOURCE_TOLERANCE = {WeightFormat.F32: 2e-5, WeightFormat.BF16: 1e-2, WeightFormat.Q8: 4e-2, WeightFormat.Q4: 0.25}
SOURCE_MODEL_FACTOR = 2.0

ATTENTION_KEYS = ("q", "k", "v", "o")
EXPERT_KEYS = ("gate", "up", "down")


@dataclass(frozen=True)
class Subject:
    """A store and what of it is looked at.

    Attributes:
        store: All of it must be here.
        weights: As numbers, as the store has them.
        source: As its source has them, or None.
        layers: Ascending.
        expert: The expert that is looked at; None: of each layer the one that most tokens pick.
        ids: The tokens of one sequence.
    """

    store: Store
    weights: StoreWeights
    source: Weights | None
    layers: tuple[int, ...]
    expert: int | None
    ids: tuple[int, ...]

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.store.config

    @property
    def manifest(self) -> Manifest:
        """The store's."""
        return self.store.manifest

    def formats(self, layer: int, keys: tuple[str, ...], expert: int = 0) -> list[WeightFormat]:
        """Of some of a layer's matrices."""
        return [self.manifest.matrix_format(key, layer, expert).format for key in keys]

    def part_tolerance(self, formats: list[WeightFormat]) -> float:
        """How far a part of these formats may be from its definition."""
        return PART_TOLERANCE[any(fmt.quantized for fmt in formats)]

    @staticmethod
    def source_tolerance(formats: list[WeightFormat]) -> float:
        """How far it may be from the source's."""
        return max(SOURCE_TOLERANCE[fmt] for fmt in formats)

    def all_formats(self) -> list[WeightFormat]:
        """Those of any matrix of the model, each once."""
        found = {self.manifest.matrix_format("lm_head", 0).format}
        for layer in range(self.config.layers):
            found |= set(self.formats(layer, ATTENTION_KEYS))
            for expert in range(self.config.layer_experts(layer)):
                found |= set(self.formats(layer, EXPERT_KEYS, expert))
        return sorted(found)


def pick_layers(config: ModelConfig, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The layers asked for; none asked for: all of a small model, else the first, the middle and the last.

    Raises:
        UsageError: The model has no such layer.
    """
    for layer in wanted:
        if layer >= config.layers:
            raise UsageError(f"--layer {layer}: the model has layers 0 to {config.layers - 1}")
    if wanted:
        return tuple(sorted(set(wanted)))
    if config.layers <= MOST_LAYERS_UNASKED:
        return tuple(range(config.layers))
    return (0, config.layers // 2, config.layers - 1)


def check_expert(config: ModelConfig, layers: tuple[int, ...], expert: int | None) -> None:
    """Refuse an expert that one of the layers lacks.

    Raises:
        UsageError: Names the layer and its experts.
    """
    for layer in layers:
        count = config.layer_experts(layer)
        if expert is not None and expert >= count:
            has = f"experts 0 to {count - 1}" if count > 1 else "a dense MLP, which is expert 0"
            raise UsageError(f"--expert {expert}: layer {layer} has {has}; choose others with --layer or --expert")


def token_ids(vocabulary: int, count: int) -> tuple[int, ...]:
    """Tokens that only the vocabulary's size decides."""
    generator = np.random.default_rng(zlib.crc32(b"dist-moe verify"))
    return tuple(generator.integers(0, vocabulary, count).tolist())
