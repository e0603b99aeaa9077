"""What all ranks of a job compute together, as hashes: equal on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dist_moe.kernels import Kernels, KvFormat, hash_floats
from dist_moe.kernels.arrays import F32Array
from dist_moe.model.step import Slice, Step
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import plan_job
from dist_moe.store.reader import Store
from dist_moe.verify.check import Check
from dist_moe.verify.model_level import Way, hash_of, model_logits, ways

_HALVES = {"attention": ("attn",), "experts": ("expert", "moe", "layer")}


def joint_hashes(
    store: Store, kernels: Kernels, exchange: Exchange, ids: Sequence[int], layers: Sequence[int], levels: Sequence[str]
) -> dict[str, str]:
    """Hashes by name ("level: what"), whole on rank 0; collective.

    Args:
        store: The store, all of which is on every host.
        kernels: Of this rank.
        exchange: Of all ranks.
        ids: One sequence.
        layers: Whose residuals are hashed.
        levels: Whose hashes are wanted.
    """
    found: dict[str, str] = {}
    if "kernel" in levels:
        own = f"{kernels.self_test():016x}"
        others = exchange.world.gather_texts(own)
        found["kernel: self-test of each rank"] = own if set(others) == {own} else " ".join(others)
    wanted = [level for level in levels if level in ("expert", "moe", "attn", "layer")]
    if wanted:
        found |= _residuals(store, kernels, exchange, ids, layers, wanted)
    if "model" in levels:
        for way in ways():
            logits_TV = model_logits(store, kernels, exchange, ids, way)
            found[f"model: logits, {way.name}"] = "" if logits_TV is None else hash_of(logits_TV)
    return found


def compare_hashes(ranks: int, found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[Check]:
    """One line for each hash that one rank has; one that is absent differs."""
    for name, value in expected.items():
        level, what = name.split(": ", 1)
        yield Check(level, f"{what}, {ranks} ranks", "1 rank", float(found.get(name) != value), None)


def _residuals(
    store: Store,
    kernels: Kernels,
    exchange: Exchange,
    ids: Sequence[int],
    layers: Sequence[int],
    levels: Sequence[str],
) -> dict[str, str]:
    """The residual after each half of some layers, by the level that it belongs to."""
    way, found = Way(), dict[str, str]()
    job = plan_job(store.config, store.manifest.group_size, way.layout, node_of_rank=exchange.world.node_of_rank)
    model = Transformer(store, job, exchange, kernels, KvFormat.F16, len(ids))

    def observe(layer: int, half: str, x_TD: F32Array) -> None:
        for level in _HALVES[half]:
            if layer in layers and level in levels:
                found[f"{level}: residual after {half} of layer {layer}"] = (
                    f"{hash_floats(np.ascontiguousarray(x_TD), 0):016x}"
                )

    model.observer = observe
    model.run_layers(Step((Slice(0, 0, tuple(ids)),), (), (), False, store.config.vocabulary))
    return found
