"""Stores whose matrices have their own formats: what is packed, read back, cut anew, compared and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError, UsageError
from dist_moe.kernels import Kernels, reference
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice, WeightFormat
from dist_moe.kernels.reference_scales import least_error_scales
from dist_moe.model_config import ModelConfig
from dist_moe.store.checksum import checksum_text
from dist_moe.store.decoded import DecodedStore
from dist_moe.store.differences import compare_stores
from dist_moe.store.formats import LayerFormats, ModelFormats, check_formats
from dist_moe.store.inspection import inspect_path, verify_lone_file
from dist_moe.store.layout import weight_files
from dist_moe.store.manifest import parse_manifest, read_manifest
from dist_moe.store.plan import StoreOptions, plan_store
from dist_moe.store.reader import Store
from dist_moe.store.recut import recut
from dist_moe.store.sizes import store_sizes
from dist_moe.store.unit_parts import unit_bytes, unit_sizes, units_bytes
from dist_moe.store.units import UNIT_KINDS, unit_count
from dist_moe.store.verify import verify_store
from helpers.tiny_model import TinyModel
from helpers.tiny_store import contents, ignore, placement_of, run_convert

F32, BF16, Q8, Q4 = (WeightFormat.F32, WeightFormat.BF16, WeightFormat.Q8, WeightFormat.Q4)
# 128 hidden units: groups of 32, 64 and 128 all fit; a dense layer in the middle.
WIDE = TinyModel(
    layers=3,
    model_dim=72,
    heads=4,
    kv_heads=2,
    head_dim=64,
    experts=5,
    experts_per_token=2,
    expert_hidden=256,
    dense_hidden=128,
    dense_layers=(1,),
    vocabulary=300,
)
EVERY = [
    MatrixFormat(F32, 0),
    MatrixFormat(BF16, 0),
    *(MatrixFormat(fmt, g) for fmt in (Q8, Q4) for g in (32, 64, 128)),
]
ROWS = [MatrixFormat(F32, 0), MatrixFormat(BF16, 0), MatrixFormat(Q8, 0), MatrixFormat(Q4, 0)]


def drawn(config: ModelConfig, choices: list[MatrixFormat], seed: int = 5) -> ModelFormats:
    """A format by chance for every matrix."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> tuple[MatrixFormat, ...]:
        return tuple(choices[i] for i in rng.integers(0, len(choices), count))

    def layer(experts: int) -> LayerFormats:
        q, k, v, o = some(4)
        return LayerFormats(q, k, v, o, some(experts), some(experts))

    return ModelFormats(tuple(layer(config.layer_experts(i)) for i in range(config.layers)), choices[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(WIDE.write(tmp_path_factory.mktemp("wide")))


@pytest.fixture(scope="module")
def store(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("mixed") / "store"
    run_convert(source, directory, formats=drawn(source.config, EVERY), nodes=2)
    return Store.open(directory, check="full")


def values_of(weights_RC: np.ndarray, own: MatrixFormat) -> np.ndarray:
    """What a packed matrix stands for, by the NumPy definition."""
    if own.format == F32:
        return weights_RC.astype(np.float64)
    if own.format == BF16:
        return reference.bf16_to_f32(reference.f32_to_bf16(weights_RC)).astype(np.float64)
    scales = least_error_scales(weights_RC, own.format, own.group)
    return reference.quantize_weights(weights_RC, scales, own.format, own.group)[1]


def expected(source: Checkpoint, formats: ModelFormats, name: str) -> np.ndarray:
    """A matrix as its own format makes it; the columns of o head by head."""
    own, values_RC, P = formats.of_name(name), source.read(name), source.config.head_dim
    if not name.endswith(".o"):
        return values_of(values_RC, own)
    group = MatrixFormat(own.format, min(own.group, P) if own.group else P)
    heads = [np.ascontiguousarray(values_RC[:, first : first + P]) for first in range(0, values_RC.shape[1], P)]
    return np.concatenate([values_of(head, group) for head in heads], axis=1)


@pytest.mark.parametrize("choices", [EVERY, ROWS], ids=["groups", "rows"])
def test_every_matrix_is_what_its_own_format_makes_of_it(
    source: Checkpoint, tmp_path: Path, choices: list[MatrixFormat]
) -> None:
    formats = drawn(source.config, choices)
    manifest = run_convert(
        source, tmp_path / "s", formats=formats, nodes=3, experts="sliced", scales=ScaleChoice.MSE
    ).manifest
    assert (manifest.format_version, manifest.formats) == (4, formats)
    with Kernels(1) as kernels:
        decoded = DecodedStore(Store.open(tmp_path / "s", check="full"), kernels)
        names = [name for name in decoded.names() if len(decoded.shape(name)) == 2 and not name.endswith("router")]
        assert len(names) == 1 + 3 * 4 + 11 * 3 + 1
        for name in names[1:]:
            assert np.array_equal(decoded.whole(name), expected(source, formats, name)), name


def test_units_lie_in_a_tensor_of_their_formats_and_have_its_bytes(store: Store) -> None:
    manifest, sizes = store.manifest, set[int]()
    for kind in UNIT_KINDS:
        for layer in range(1 if kind == "vocabulary" else 3):
            count = unit_count(store.config, manifest.group_size, kind, layer)
            found = [len(store.unit(kind, layer, index)) for index in range(count)]
            assert found == unit_sizes(manifest, kind, layer).tolist()
            assert found == [unit_bytes(manifest, kind, layer, index) for index in range(count)]
            assert units_bytes(manifest, kind, layer, range(1, count)) == sum(found[1:])
            addresses = store.unit_addresses(kind, layer)
            assert all(store.unit(kind, layer, i).ctypes.data == addresses[i] for i in range(count))
            sizes.update(found)
    assert len(sizes) > 8
    own = manifest.formats.layers[0]
    label = f"{own.gate_up[3].format.label}g{own.gate_up[3].group}"
    name = store.sealed_unit("chunk", 0, 3 * manifest.layer_chunks_per_expert(0)).tensor
    assert name.startswith(f"layers.0.chunks.{label}".removesuffix("g0"))


def test_bytes_do_not_depend_on_threads_and_a_recut_is_a_fresh_store(
    source: Checkpoint, store: Store, tmp_path: Path
) -> None:
    formats = drawn(source.config, EVERY)
    run_convert(source, tmp_path / "threads", formats=formats, nodes=2, threads=3)
    assert contents(tmp_path / "threads") == contents(store.directory)
    cut = StoreOptions(nodes=3, experts="sliced", threads=1)
    recut(store, tmp_path / "recut", cut, ignore)
    run_convert(source, tmp_path / "fresh", formats=formats, nodes=3, experts="sliced")
    assert contents(tmp_path / "recut") == contents(tmp_path / "fresh")
    difference = compare_stores(store, Store.open(tmp_path / "fresh"), lambda _: None)
    assert difference.equal
    assert not difference.facts
    placed = replace(cut, placement=placement_of(source, 3, group_size=128))
    recut(store, tmp_path / "placed", placed, ignore)
    run_convert(source, tmp_path / "fresh placed", formats=formats, placement=placed.placement)
    assert contents(tmp_path / "placed") == contents(tmp_path / "fresh placed")


def test_an_interrupted_store_goes_on_and_other_formats_are_refused(
    source: Checkpoint, store: Store, tmp_path: Path
) -> None:
    formats = drawn(source.config, EVERY)
    run_convert(source, tmp_path / "s", formats=formats, nodes=2)
    (tmp_path / "s" / "shard-00002-of-00002.safetensors").unlink()
    assert run_convert(source, tmp_path / "s", formats=formats, nodes=2).written_files == (
        "shard-00002-of-00002.safetensors",
    )
    assert contents(tmp_path / "s") == contents(store.directory)
    first = formats.layers[0]
    changed = replace(first, q=next(own for own in EVERY if own != first.q))
    other = replace(formats, layers=(changed, *formats.layers[1:]))
    with pytest.raises(StoreError, match=r"made with other options \(other formats of some matrices\)"):
        run_convert(source, tmp_path / "s", formats=other, nodes=2)


def test_planned_sizes_are_those_of_the_files(source: Checkpoint, store: Store) -> None:
    plan = plan_store(source, StoreOptions(formats=drawn(source.config, EVERY), nodes=2))
    sizes = store_sizes(plan, {"config.json": b"{}"})
    found = {name: (store.directory / name).stat().st_size for name in weight_files(plan)}
    assert {"common.safetensors": sizes.common_bytes, **dict(sizes.shards)} == found
    assert sizes.total_bytes == sum(found.values()) + 2
    units = [
        len(store.unit(kind, layer, index))
        for kind in UNIT_KINDS
        for layer in range(1 if kind == "vocabulary" else 3)
        for index in range(unit_count(store.config, 128, kind, layer))
    ]
    assert sum(part.bytes for part in sizes.parts) == sum(units)


def test_a_manifest_of_formats_is_read_back_and_damage_refused(store: Store) -> None:
    text = store.manifest.render()
    again = parse_manifest(text, "m")
    assert (again.render(), again.formats) == (text, store.manifest.formats)
    value = json.loads(text)
    for edit, message in (
        ({"lm_head": "q5g32"}, "unknown format"),
        ({"lm_head": "q4g0"}, "whole rows"),
        ({"layers": value["formats"]["layers"][:2]}, "has 2 layers of 3"),
        ({"layers": value["formats"]["layers"][1:]}, "do not follow"),
        ({"layers": [{**value["formats"]["layers"][0], "down": "4*q4g32"}]}, "together 5 experts"),
        ({"layers": [{**value["formats"]["layers"][0], "down": "9*q4g32"}]}, "together 5 experts"),
        ({"layers": [{**value["formats"]["layers"][0], "stop_layer": 2}]}, "unlike layers"),
        ({"lm_head": None}, "must be a string"),
    ):
        with pytest.raises(StoreError, match=message):
            parse_manifest(sealed(value | {"formats": value["formats"] | edit}), "m")
    with pytest.raises(StoreError, match="'group_size' must be the largest"):
        parse_manifest(sealed(value | {"group_size": 64}), "m")
    with pytest.raises(StoreError, match="'weights' must be"):
        parse_manifest(sealed(value | {"weights": "bf16"}), "m")


def test_formats_that_do_not_go_together_are_refused(source: Checkpoint) -> None:
    config = source.config
    one = ModelFormats.uniform(config, Q4, 32)
    for formats, group, message in (
        (replace(one, lm_head=MatrixFormat(Q8, 0)), 32, "groups of 0 and 32 in a store"),
        (replace(one, lm_head=MatrixFormat(Q8, 64)), 32, "groups of 64 in a store with chunks for groups of 32"),
        (replace(one, layers=one.layers[:2]), 32, "other layers or experts"),
        (ModelFormats.uniform(replace(config, experts=4), Q4, 32), 32, "other layers or experts"),
    ):
        with pytest.raises(UsageError, match=message):
            check_formats(config, formats, group)
    odd = replace(config, head_dim=20)
    with pytest.raises(UsageError, match="head_dim 20 is not a multiple of 32"):
        check_formats(odd, replace(ModelFormats.uniform(odd, BF16, 32), lm_head=MatrixFormat(Q8, 32)), 32)
    narrow = replace(config, expert_hidden=96)
    with pytest.raises(UsageError, match="group size 64 does not fit"):
        check_formats(narrow, replace(one, lm_head=MatrixFormat(Q8, 64)), 64)


def test_a_store_of_equal_formats_is_the_one_of_the_short_form(source: Checkpoint, tmp_path: Path) -> None:
    for fmt, group in ((Q8, 64), (BF16, 32)):
        run_convert(source, tmp_path / "short", format=fmt, group_size=group, force=True)
        run_convert(source, tmp_path / "long", formats=ModelFormats.uniform(source.config, fmt, group), force=True)
        assert contents(tmp_path / "short") == contents(tmp_path / "long")
        assert read_manifest(tmp_path / "long" / "manifest.json").format_version == 1


def test_bits_per_weight_count_scales_and_no_padding(source: Checkpoint) -> None:
    config = source.config
    assert ModelFormats.uniform(config, BF16, 32).bits_per_weight(config) == 16
    # D = 72: three scales of 32 for rows of 72 weights, two of 64.
    mixed = replace(ModelFormats.uniform(config, Q4, 32), lm_head=MatrixFormat(Q8, 64))
    assert mixed.bits_by_part(config)["lm_head"] == (300 * (72 * 8 + 2 * 16), 300 * 72)
    o_bits = 3 * 72 * 4 * (64 * 4 + 2 * 16)
    rows_bits = 3 * (4 + 2 + 2) * 64 * (72 * 4 + 3 * 16)
    assert mixed.bits_by_part(config)["attention"] == (o_bits + rows_bits, 3 * (4 + 4 + 2 + 2) * 64 * 72)


def test_a_shard_tells_its_tensors_units_without_its_manifest(store: Store, tmp_path: Path) -> None:
    assert verify_store(store.directory, store.manifest, store.manifest.files, lambda _: None) == []
    name = "shard-00001-of-00002.safetensors"
    alone = tmp_path / name
    alone.write_bytes((store.directory / name).read_bytes())
    chunks = [tensor for tensor in inspect_path(alone).files[0].tensors if tensor.kind == "chunks"]
    units = sorted(
        i
        for tensor in chunks
        if tensor.name.startswith("layers.0.")
        for first, stop in tensor.units or ()
        for i in range(first, stop)
    )
    assert units == [i for first, stop in store.manifest.shards[0].runs("chunk", 0) for i in range(first, stop)]
    assert len({tensor.format for tensor in chunks}) > 3
    assert verify_lone_file(alone) == []
    data = bytearray(alone.read_bytes())
    data[len(data) // 2] ^= 1
    alone.write_bytes(data)
    assert "is damaged" in verify_lone_file(alone)[0]


def test_scales_may_be_searched_for_in_a_store_of_several_formats(source: Checkpoint, tmp_path: Path) -> None:
    formats = drawn(source.config, EVERY)
    manifest = run_convert(source, tmp_path / "s", formats=formats, scales=ScaleChoice.MSE).manifest
    assert (manifest.format_version, manifest.scales) == (4, ScaleChoice.MSE)
    assert parse_manifest(manifest.render(), "m").scales == ScaleChoice.MSE
    again = recut(Store.open(tmp_path / "s"), tmp_path / "t", StoreOptions(nodes=2, threads=1), ignore).manifest
    assert again.scales == ScaleChoice.MSE


def sealed(value: dict[str, object]) -> str:
    """The text of a manifest with these contents and the checksum that belongs to them."""
    body = {key: item for key, item in value.items() if key != "checksum"}
    checksum = checksum_text((json.dumps(body, indent=1) + "\n").encode())
    return json.dumps({**body, "checksum": checksum}, indent=1) + "\n"
