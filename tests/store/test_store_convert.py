"""Conversion: unpacked units are the source's weights, and bytes depend on the source and the format alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError, UsageError
from dist_moe.kernels import WeightFormat, packed_bytes, reference
from dist_moe.kernels._native import lib
from dist_moe.kernels.reference_scales import least_error_scales
from dist_moe.store.manifest import NUMERICS_VERSION
from dist_moe.store.plan import source_name
from dist_moe.store.reader import Store
from dist_moe.store.units import UNIT_KINDS, UnitKind, output_group, unit_count
from helpers.tiny_store import ODD, contents, run_convert

GOLDEN_MODELS = Path(__file__).parents[1] / "golden" / "models"
MakeStore = Callable[..., Path]
Floats = npt.NDArray[np.float64]


def values_of(weights_RC: npt.NDArray[np.float32], fmt: WeightFormat, group: int) -> Floats:
    """What a packed whole matrix stands for, by the NumPy definition."""
    if fmt == WeightFormat.F32:
        return weights_RC.astype(np.float64)
    if fmt == WeightFormat.BF16:
        return reference.bf16_to_f32(reference.f32_to_bf16(weights_RC)).astype(np.float64)
    choose = least_error_scales if fmt == WeightFormat.Q4 else reference.weight_scales
    return reference.quantize_weights(weights_RC, choose(weights_RC, fmt, group), fmt, group)[1]


class Unpacker:
    """Cuts units of a store into their matrices and unpacks those."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.format, self.group = store.manifest.format, store.manifest.group_size

    def matrices(self, kind: UnitKind, layer: int, index: int, *shapes: tuple[int, int, int]) -> list[Floats]:
        """`shapes` are (rows, columns, group) of the parts, which must fill the unit."""
        unit, parts, start = self.store.unit(kind, layer, index), [], 0
        for rows, columns, group in shapes:
            stop = start + packed_bytes(self.format, rows, columns, group)
            parts.append(reference.unpack_matrix(unit[start:stop], rows, columns, self.format, group))
            start = stop
        assert start == len(unit)
        return parts


@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_units_hold_the_weights_of_the_source(
    checkpoint: Checkpoint, make_store: MakeStore, fmt: WeightFormat, group: int
) -> None:
    store = Store.open(make_store(nodes=2, format=fmt, group_size=group))
    unpacker, config = Unpacker(store), store.config
    dim, head_dim = config.model_dim, config.head_dim

    def source(name: str, own_group: int = group) -> Floats:
        return values_of(checkpoint.read(name), fmt, own_group)

    for layer in range(config.layers):
        name = f"layers.{layer}."
        o_group = output_group(config, group)
        wq, wk, wv = (source(name + key) for key in "qkv")
        output = checkpoint.read(name + "o")
        for head in range(config.heads):
            span = slice(head * head_dim, (head + 1) * head_dim)
            rows, columns = unpacker.matrices("head", layer, head, (head_dim, dim, group), (dim, head_dim, o_group))
            assert np.array_equal(rows, wq[span])
            assert np.array_equal(columns, values_of(np.ascontiguousarray(output[:, span]), fmt, o_group))
        for head in range(config.kv_heads):
            span = slice(head * head_dim, (head + 1) * head_dim)
            k_rows, v_rows = unpacker.matrices("kv_head", layer, head, *[(head_dim, dim, group)] * 2)
            assert np.array_equal(k_rows, wk[span])
            assert np.array_equal(v_rows, wv[span])
        check_chunks(unpacker, layer, source)
    head_rows = source("lm_head")
    for block in range(3):
        (rows,) = unpacker.matrices("vocabulary", 0, block, (128, dim, group))
        expected = head_rows[block * 128 : (block + 1) * 128]
        assert np.array_equal(rows[: len(expected)], expected)
        assert not rows[len(expected) :].any()


def check_chunks(unpacker: Unpacker, layer: int, source: Callable[[str], Floats]) -> None:
    store, group = unpacker.store, unpacker.group
    dim, width = store.config.model_dim, store.manifest.layer_chunk_width(layer)
    per_expert = store.manifest.layer_chunks_per_expert(layer)
    for expert in range(store.config.layer_experts(layer)):
        gate, up, down = (source(f"layers.{layer}.experts.{expert}.{key}") for key in ("gate", "up", "down"))
        for chunk in range(per_expert):
            shapes = (width, dim, group), (width, dim, group), (dim, width, group)
            parts = unpacker.matrices("chunk", layer, expert * per_expert + chunk, *shapes)
            hidden = slice(chunk * width, (chunk + 1) * width)
            for part, whole in zip((parts[0], parts[1], parts[2].T), (gate, up, down.T), strict=True):
                expected = whole[hidden]
                assert np.array_equal(part[: len(expected)], expected)
                assert not part[len(expected) :].any()


def test_common_tensors_are_the_source_exactly(checkpoint: Checkpoint, make_store: MakeStore) -> None:
    store = Store.open(make_store())
    names = [name for name in checkpoint.names() if name.endswith(("norm", "_bias"))]
    assert len(names) == 1 + 3 * (4 + 4)
    for name in names:
        assert np.array_equal(store.common(name), checkpoint.read(name))
    assert np.array_equal(store.common("embedding"), checkpoint.read("embedding"))
    router = reference.unpack_matrix(store.common("layers.0.router"), 5, 36, WeightFormat.F32, 0)
    assert np.array_equal(router, checkpoint.read("layers.0.router"))
    assert (store.manifest.router_format, store.manifest.embedding_format) == (WeightFormat.F32, WeightFormat.F32)


@pytest.mark.parametrize("model", sorted(path.name for path in GOLDEN_MODELS.iterdir() if path.is_dir()))
def test_every_golden_model_becomes_a_store(tmp_path: Path, model: str) -> None:
    source = Checkpoint.open(GOLDEN_MODELS / model)
    run_convert(source, tmp_path / "store", format=WeightFormat.F32, nodes=2, experts="sliced")
    store = Store.open(tmp_path / "store", check="full")
    embedding = store.common("embedding")
    if store.manifest.embedding_format == WeightFormat.BF16:
        embedding = reference.bf16_to_f32(embedding)
    assert np.array_equal(embedding, source.read("embedding"))
    assert (embedding.dtype == store.common("embedding").dtype) == (source.source_dtype("embedding") != "bf16")


@pytest.mark.parametrize("fmt", [WeightFormat.Q4, WeightFormat.BF16])
def test_unit_bytes_do_not_depend_on_nodes_or_layout(make_store: MakeStore, fmt: WeightFormat) -> None:
    stores = [
        Store.open(make_store(f"{layout}{nodes}", nodes=nodes, experts=layout, format=fmt))
        for layout in ("whole", "sliced")
        for nodes in (1, 3, 4)
    ]
    for layer in range(3):
        for kind in UNIT_KINDS:
            for index in range(unit_count(stores[0].config, 32, kind, layer)):
                expected = stores[0].unit(kind, layer, index)
                assert all(np.array_equal(store.unit(kind, layer, index), expected) for store in stores)
    assert len({contents(store.directory)["common.safetensors"] for store in stores}) == 1


def test_the_same_source_and_options_give_the_same_files(tmp_path: Path, make_store: MakeStore) -> None:
    once = contents(make_store("once", nodes=3))
    again = contents(make_store("again", nodes=3, threads=3))
    assert once == again
    copy = Checkpoint.open(ODD.write(tmp_path / "elsewhere" / "odd"))
    run_convert(copy, tmp_path / "copy", nodes=3)
    assert contents(tmp_path / "copy") == once
    assert set(once) == {
        "manifest.json",
        "common.safetensors",
        *(f"shard-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)),
        "config.json",
    }


def test_weights_that_are_not_finite_are_refused_counted_and_named(tmp_path: Path) -> None:
    tensors = ODD.tensors()
    tensors["model.layers.0.self_attn.k_proj.weight"][33, :3] = np.nan
    tensors["model.layers.2.mlp.experts.4.down_proj.weight"][7, 5] = np.inf
    tensors["model.norm.weight"][0] = -np.inf
    source = Checkpoint.open(ODD.write(tmp_path / "poisoned", tensors))
    with pytest.raises(StoreError, match=r"final_norm: 1\).*--allow-nonfinite"):
        run_convert(source, tmp_path / "store", nodes=4)
    made = run_convert(source, tmp_path / "store", nodes=4, allow_nonfinite=True)
    expected = {"final_norm": 1, "layers.0.k": 3, "layers.2.experts.4.down": 1}
    assert made.manifest.nonfinite == expected
    assert Store.open(tmp_path / "store").manifest.nonfinite == expected
    with pytest.raises(StoreError, match=r"layers.0.k: 3, layers.2.experts.4.down: 1"):
        run_convert(source, tmp_path / "store", nodes=4)


def test_more_nodes_than_heads_are_refused(make_store: MakeStore) -> None:
    with pytest.raises(UsageError, match=r"--nodes 7: this model has 6 query heads"):
        make_store(nodes=7)


def test_the_numerics_version_is_that_of_the_kernels() -> None:
    assert lib.DM_NUMERICS_VERSION == NUMERICS_VERSION


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/Qwen3-30B-A3B", "Qwen3-30B-A3B"),
        ("models--Qwen--Qwen3-30B-A3B/snapshots/0123abcd", "Qwen3-30B-A3B"),
        ("dist_moe/demo/model", "demo"),
        ("a\tb", "a_b"),
    ],
)
def test_a_checkpoint_is_called_after_its_directory(tmp_path: Path, path: str, name: str) -> None:
    assert source_name(tmp_path / path) == name
