"""The .npz file of `dist-moe profile`: `counts` int64 [layers, experts], `sets` [layers, samples, K], `facts` as JSON.

`place` takes the records of `run --routing`, too.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.cli.npz_arrays import NpzArrays
from dist_moe.cli.npz_reading import open_npz, read_array
from dist_moe.cli.routing_file import RoutingReader
from dist_moe.engine.routing.routing_facts import RoutingFacts
from dist_moe.engine.routing.routing_profile import ProfileCounter, RoutingProfile
from dist_moe.errors import UsageError
from dist_moe.model_config import ModelConfig

FORMAT_VERSION = 1

_MAKE_ONE = "make one with dist-moe profile TEXT -o OUT.npz"


def write_profile(path: Path, facts: RoutingFacts, profile: RoutingProfile) -> None:
    """Write a profile.

    Raises:
        UsageError: The file cannot be written.
    """
    words = {"profile_version": FORMAT_VERSION, "origin": profile.origin, "tokens": profile.tokens, **asdict(facts)}
    text = json.dumps(words, ensure_ascii=False)
    arrays = {"facts": np.array(text), "counts": profile.counts_LE, "sets": profile.sets_LSK}
    with NpzArrays(path, arrays):
        pass


def read_profile(path: Path, config: ModelConfig) -> RoutingProfile:
    """Read the profile of a model, or the record of a run of it.

    Raises:
        UsageError: The file cannot be read, is neither, or is of another model.
    """
    with open_npz(path, "the profile of a model's routing", _MAKE_ONE) as archive:
        is_profile = "counts.npy" in archive.namelist()
        profile = _read(archive, config, path) if is_profile else None
    return profile or _from_record(path, config)


def _read(archive: zipfile.ZipFile, config: ModelConfig, path: Path) -> RoutingProfile:
    facts: dict[str, Any] = dict(json.loads(str(read_array(archive, "facts"))))
    if facts.get("profile_version") != FORMAT_VERSION:
        raise UsageError(f"{path}: a profile of another version than {FORMAT_VERSION}: make it again")
    layers = tuple(int(layer) for layer in facts["routed_layers"])
    counts_LE, sets_LSK = read_array(archive, "counts"), read_array(archive, "sets")
    experts, picks = int(facts["experts"]), int(facts["experts_per_token"])
    _require_model(path, config, str(facts["model"]), (layers, experts, picks))
    shapes = (counts_LE.shape, (sets_LSK.shape[0], sets_LSK.shape[2]))
    if shapes != ((len(layers), experts), (len(layers), picks)) or counts_LE.dtype.kind + sets_LSK.dtype.kind != "ii":
        raise ValueError(f"arrays of {counts_LE.shape} and {sets_LSK.shape} do not fit its facts")
    if not sets_LSK.size or not 0 <= int(sets_LSK.min()) <= int(sets_LSK.max()) < experts or int(counts_LE.min()) < 0:
        raise ValueError("its numbers are out of range")
    return RoutingProfile(str(facts["origin"]), layers, int(facts["tokens"]), counts_LE.astype(np.int64), sets_LSK)


def _from_record(path: Path, config: ModelConfig) -> RoutingProfile:
    reader = RoutingReader(path)
    facts = reader.facts
    _require_model(path, config, facts.model, (facts.routed_layers, facts.experts, facts.experts_per_token))
    if not reader.tokens:
        raise UsageError(f"{path}: holds no token: {_MAKE_ONE}")
    counter = ProfileCounter(facts)
    for experts_TLK in reader.steps():
        counter.add_picks(experts_TLK)
    return counter.profile(path.name)


def _require_model(path: Path, config: ModelConfig, name: str, found: tuple[tuple[int, ...], int, int]) -> None:
    """Refuse the routing of a model of other sizes."""
    layers = tuple(layer for layer in range(config.layers) if not config.is_dense(layer))
    expected = (layers, config.experts, config.experts_per_token)
    if found != expected:
        raise UsageError(
            f"{path}: is of {name} ({_words(found)}), not of this model ({_words(expected)}): make a profile of this "
            "model with dist-moe profile"
        )


def _words(sizes: tuple[tuple[int, ...], int, int]) -> str:
    return f"{len(sizes[0])} layers with {sizes[1]} experts, {sizes[2]} per token"
