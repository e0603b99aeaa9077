"""Experts, MoE blocks, attention and whole layers of a store: against float64, its source, and other ISA levels.

Legend: T tokens, D model dim, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels import Kernels
from dist_moe.kernels.arrays import Array, F32Array, F64Array
from dist_moe.verify import definition
from dist_moe.verify.check import Arrays, Check, close, describe_settings, differing, folded, rms_deviation
from dist_moe.verify.definition import Weights
from dist_moe.verify.parts import Parts, Routed, sums_as_values
from dist_moe.verify.subject import ATTENTION_KEYS, EXPERT_KEYS, LAYER_TOLERANCE, Subject

LAYER_LEVELS = ("expert", "moe", "attn", "layer")
FLOAT64, SOURCE = "float64", "source"
_ROUTER_TOLERANCE = 2e-5


@dataclass(frozen=True)
class LayerRun:
    """What the kernels made of a layer at one ISA level, from the same residual at each."""

    before_TD: F32Array
    attention_TD: Array  # exact sums
    middle_TD: F32Array
    routed: Routed
    after_TD: F32Array
    number: int  # of the expert that was looked at
    expert: Routed

    def results(self, level: str) -> Arrays:
        """What of it belongs to a level."""
        routed = self.routed
        mixture = (routed.normed_TD, routed.logits_TE, routed.ids_TK, routed.weights_TK, routed.sums_TD)
        return {
            "expert": (self.expert.sums_TD,),
            "moe": mixture,
            "attn": (self.attention_TD,),
            "layer": (self.middle_TD, self.after_TD),
        }[level]


def run_layer(parts: Parts, layer: int, before_TD: F32Array, expert: int | None) -> LayerRun:
    """Everything that is looked at in a layer; `expert` None takes the one that most tokens pick."""
    attention_TD = parts.attention(layer, before_TD)
    middle_TD = parts.after_attention(layer, before_TD)
    after_TD, routed = parts.after_experts(layer, middle_TD)
    number = int(np.bincount(routed.ids_TK.ravel()).argmax()) if expert is None else expert
    found = parts.expert(layer, number, middle_TD)
    return LayerRun(before_TD, attention_TD, middle_TD, routed, after_TD, number, found)


def run_layers(parts: Parts, subject: Subject) -> dict[int, LayerRun]:
    """The layers that are looked at, each fed with what the kernels made of those before it."""
    x_TD, found = parts.embed(), {}
    for layer in range(max(subject.layers) + 1):
        if layer in subject.layers:
            found[layer] = run_layer(parts, layer, x_TD, subject.expert)
            x_TD = found[layer].after_TD
        else:
            x_TD = parts.after_experts(layer, parts.after_attention(layer, x_TD))[0]
    return found


def value_checks(subject: Subject, layer: int, run: LayerRun, levels: Sequence[str]) -> Iterator[Check]:
    """A layer's parts against float64, and against the source's weights if there are any."""
    if "expert" in levels:
        yield from _expert(subject, layer, run)
    if "moe" in levels:
        yield from _mixture(subject, layer, run)
    if "attn" in levels:
        yield from _attention(subject, layer, run)
    if "layer" in levels:
        yield from _layer(subject, layer, run)


def bits_checks(
    subject: Subject, runs: dict[int, LayerRun], levels: Sequence[str], settings: Sequence[tuple[str, int]]
) -> Iterator[Check]:
    """Each level's results at other ISA levels and thread counts, from the same residuals.

    Args:
        subject: What is verified.
        runs: The results that are expected, by layer.
        levels: Of them.
        settings: (ISA level, threads); one line for all of them unless some differ.
    """
    found: dict[str, list[Check]] = {level: [] for level in levels}
    names = f"layer{'s' if len(runs) > 1 else ''} {', '.join(map(str, runs))}"
    for isa, threads in settings:
        with Kernels(threads=threads, isa=isa) as kernels:
            parts = Parts(subject.store, kernels, subject.ids)
            others = {layer: run_layer(parts, layer, run.before_TD, run.number) for layer, run in runs.items()}
        what = f"{names}, {isa}, {threads} thread{'s' if threads > 1 else ''}"
        for level in levels:
            count = sum(differing(others[layer].results(level), run.results(level)) for layer, run in runs.items())
            found[level].append(Check(level, what, "best level", float(count), None))
    for checks in found.values():
        yield from folded(f"{names}, {describe_settings(settings)}", checks)


def _expert(subject: Subject, layer: int, run: LayerRun) -> Iterator[Check]:
    number, found_TD = run.number, sums_as_values(run.expert.sums_TD)
    formats = subject.formats(layer, EXPERT_KEYS, number)
    what = f"layer {layer}, expert {number}"

    def define(weights: Weights) -> F64Array:
        return definition.expert(weights, layer, number, definition.mlp_norm(weights, layer, run.middle_TD))

    yield close("expert", what, FLOAT64, found_TD, define(subject.weights), subject.part_tolerance(formats))
    if subject.source is not None:
        deviation = rms_deviation(found_TD, define(subject.source))
        yield Check("expert", what, SOURCE, deviation, subject.source_tolerance(formats))


def _mixture(subject: Subject, layer: int, run: LayerRun) -> Iterator[Check]:
    routed, weights, what = run.routed, subject.weights, f"layer {layer}"
    normed_TD = definition.mlp_norm(weights, layer, run.middle_TD)
    if not subject.config.is_dense(layer):
        logits_TE = definition.router(weights, layer, normed_TD)
        yield close("moe", f"{what}, router", FLOAT64, routed.logits_TE, logits_TE, _ROUTER_TOLERANCE)
        lost = choice_loss(logits_TE, routed)
        yield Check("moe", f"{what}, choice of experts", FLOAT64, lost, _ROUTER_TOLERANCE)
        expected_TK = routing_weights(logits_TE, routed, subject.config.norm_topk_prob)
        yield close("moe", f"{what}, routing weights", FLOAT64, routed.weights_TK, expected_TK, 5 * _ROUTER_TOLERANCE)
    formats = sorted(
        {fmt for number in np.unique(routed.ids_TK).tolist() for fmt in subject.formats(layer, EXPERT_KEYS, number)}
    )
    found_TD = sums_as_values(routed.sums_TD)

    def define(weights: Weights) -> F64Array:
        normed_TD = definition.mlp_norm(weights, layer, run.middle_TD)
        return definition.mixture(weights, layer, normed_TD, routed.ids_TK, routed.weights_TK)

    yield close("moe", f"{what}, sum of experts", FLOAT64, found_TD, define(weights), subject.part_tolerance(formats))
    if subject.source is not None:
        deviation = rms_deviation(found_TD, define(subject.source))
        yield Check("moe", f"{what}, sum of experts", SOURCE, deviation, subject.source_tolerance(formats))


def _attention(subject: Subject, layer: int, run: LayerRun) -> Iterator[Check]:
    formats = subject.formats(layer, ATTENTION_KEYS)
    found_TD = sums_as_values(run.attention_TD)
    if subject.config.attention_bias:
        found_TD = found_TD + subject.weights.tensor(f"layers.{layer}.o_bias")
    expected_TD = definition.attention(subject.weights, layer, run.before_TD)
    yield close("attn", f"layer {layer}", FLOAT64, found_TD, expected_TD, subject.part_tolerance(formats))
    if subject.source is not None:
        deviation = rms_deviation(found_TD, definition.attention(subject.source, layer, run.before_TD))
        yield Check("attn", f"layer {layer}", SOURCE, deviation, subject.source_tolerance(formats))


def _layer(subject: Subject, layer: int, run: LayerRun) -> Iterator[Check]:
    """The whole layer from its input, in float64 throughout, with the experts that the kernels chose."""
    expected_TD = whole_layer(subject.weights, layer, run.before_TD.astype(np.float64), run.routed)
    formats = subject.formats(layer, ATTENTION_KEYS) + subject.formats(layer, EXPERT_KEYS)
    tolerance = LAYER_TOLERANCE[any(fmt.quantized for fmt in formats)]
    yield close("layer", f"layer {layer}", FLOAT64, run.after_TD, expected_TD, tolerance)


def whole_layer(weights: Weights, layer: int, x_TD: F64Array, routed: Routed) -> F64Array:
    """A layer's output in float64, with the experts that were chosen and weights of its own."""
    x_TD = x_TD + definition.attention(weights, layer, x_TD)
    normed_TD = definition.mlp_norm(weights, layer, x_TD)
    weights_TK: Array = routed.weights_TK
    if not weights.config.is_dense(layer):
        logits_TE = definition.router(weights, layer, normed_TD)
        weights_TK = routing_weights(logits_TE, routed, weights.config.norm_topk_prob)
    return x_TD + definition.mixture(weights, layer, normed_TD, routed.ids_TK, weights_TK)


def choice_loss(logits_TE: F64Array, routed: Routed) -> float:
    """By how much, of the largest logit, a chosen expert is worse than one that was not; 0 if none is."""
    chosen = routed.ids_TK.shape[1]
    if any(len(set(ids)) != chosen for ids in routed.ids_TK.tolist()):
        return float("inf")
    wanted_T = np.sort(logits_TE, axis=1)[:, -chosen]
    worst_T = np.take_along_axis(logits_TE, routed.ids_TK.astype(np.int64), axis=1).min(axis=1)
    return float((wanted_T - worst_T).max() / np.abs(logits_TE).max())


def routing_weights(logits_TE: F64Array, routed: Routed, norm_topk_prob: bool) -> F64Array:
    """The softmax over all experts at those that were chosen."""
    p_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    p_TE = p_TE / p_TE.sum(axis=1, keepdims=True)
    weights_TK = np.take_along_axis(p_TE, routed.ids_TK.astype(np.int64), axis=1)
    return np.asarray(weights_TK / weights_TK.sum(axis=1, keepdims=True) if norm_topk_prob else weights_TK)
