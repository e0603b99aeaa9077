"""GGUF files as stores: integers and scales bit for bit, other types as from Hugging Face, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf.quants import GGMLQuantizationType, quantize

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.source import Source, open_source
from dist_moe.errors import StoreError
from dist_moe.kernels import reference
from dist_moe.kernels.formats import WeightFormat, packed_bytes
from dist_moe.store.carry import conversion_notes, default_format
from dist_moe.store.formats import ModelFormats
from dist_moe.store.reader import Store
from helpers.tiny_gguf import DENSE, MOE, WIDE, gguf_tensors, write_gguf
from helpers.tiny_model import TinyModel
from helpers.tiny_store import contents, run_convert

Q4, Q8 = WeightFormat.Q4, WeightFormat.Q8


def store_of(path: Path, **options: object) -> Store:
    source = open_source(path)
    options.setdefault("format", default_format(source))
    run_convert(source, path.with_suffix(".store"), **options)
    return Store.open(path.with_suffix(".store"))


def matrices_of(store: Store, layer: int) -> dict[str, np.ndarray]:
    """The values of a layer's matrices, put together from its units, under GGUF's names."""
    config, fmt, group = store.config, store.manifest.format, store.manifest.group_size
    dim, head_dim, width = config.model_dim, config.head_dim, store.manifest.layer_chunk_width(layer)
    chunks = store.manifest.layer_chunks_per_expert(layer)
    found: dict[str, list[np.ndarray]] = {}

    def cut(unit: np.ndarray, *parts: tuple[str, int, int]) -> None:
        for name, rows, columns in parts:
            size = packed_bytes(fmt, rows, columns, group)
            found.setdefault(name, []).append(reference.unpack_matrix(unit[:size], rows, columns, fmt, group))
            unit = unit[size:]
        assert not len(unit)

    for head in range(config.heads):
        cut(store.unit("head", layer, head), ("attn_q", head_dim, dim), ("attn_output", dim, head_dim))
    for head in range(config.kv_heads):
        cut(store.unit("kv_head", layer, head), ("attn_k", head_dim, dim), ("attn_v", head_dim, dim))
    for chunk in range(config.layer_experts(layer) * chunks):
        unit = store.unit("chunk", layer, chunk)
        cut(unit, ("ffn_gate", width, dim), ("ffn_up", width, dim), ("ffn_down", dim, width))
    whole = {name: np.concatenate(parts) for name, parts in found.items() if name not in ("attn_output", "ffn_down")}
    whole["attn_output"] = np.concatenate(found["attn_output"], axis=1)
    experts = [found["ffn_down"][first : first + chunks] for first in range(0, len(found["ffn_down"]), chunks)]
    whole["ffn_down"] = np.concatenate([np.concatenate(parts, axis=1) for parts in experts])
    return whole


def check_matrices(store: Store, values: dict[str, np.ndarray]) -> None:
    """Every matrix of the store has exactly these values."""
    for layer in range(store.config.layers):
        for name, found in matrices_of(store, layer).items():
            tensor = f"blk.{layer}.{name}.weight"
            expected = values[tensor if tensor in values else f"blk.{layer}.{name}_exps.weight"]
            assert np.array_equal(found, expected.reshape(found.shape)), tensor
    table = values.get("output.weight", values["token_embd.weight"])
    blocks = [store.unit("vocabulary", 0, index) for index in range(-(-len(table) // 128))]
    fmt = store.manifest.format
    rows = np.concatenate([reference.unpack_matrix(block, 128, table.shape[1], fmt, 32) for block in blocks])
    assert np.array_equal(rows[: len(table)], table)
    assert not rows[len(table) :].any()
    embedding = store.common("embedding")
    if embedding.dtype == np.uint16:
        embedding = reference.bf16_to_f32(embedding)
    assert np.array_equal(embedding, values["token_embd.weight"])


@pytest.mark.parametrize("model", [MOE, DENSE])
@pytest.mark.parametrize(
    ("kind", "fmt"),
    [("Q4_0", None), ("Q4_0", Q8), ("Q8_0", None), ("BF16", None), ("F16", None), ("F32", None), ("Q4_0", "f32")],
)
def test_a_store_has_exactly_the_files_values(
    tmp_path: Path, model: TinyModel, kind: str, fmt: WeightFormat | str | None
) -> None:
    values = write_gguf(tmp_path / "m.gguf", model, kind)
    chosen = {} if fmt is None else {"format": WeightFormat.F32 if fmt == "f32" else fmt}
    store = store_of(tmp_path / "m.gguf", **chosen)
    assert store.manifest.nonfinite == {}
    check_matrices(store, values)


def test_scales_that_no_quantizer_of_ours_would_choose_are_kept(tmp_path: Path) -> None:
    """No code of these blocks is -8 (q4) or +-127 (q8), so packing from the values would choose other scales."""
    random = np.random.default_rng(3)
    shape = gguf_tensors(MOE)["blk.0.attn_q.weight"].shape
    blocks = random.integers(0x11, 0xEF, (*shape[:1], shape[1] // 32, 18)).astype(np.uint8)
    blocks[..., :2] = random.standard_normal((*blocks.shape[:2], 1)).astype(np.float16).view(np.uint8)
    data = {"blk.0.attn_q.weight": blocks.reshape(shape[0], -1)}
    for name, fmt in (("four", Q4), ("eight", Q8)):
        values = write_gguf(tmp_path / f"{name}.gguf", data=data)
        check_matrices(store_of(tmp_path / f"{name}.gguf", format=fmt), values)


def test_every_8_bit_code_is_kept(tmp_path: Path) -> None:
    shape = gguf_tensors(MOE)["blk.0.ffn_down_exps.weight"].shape
    blocks = np.zeros((*shape[:2], shape[2] // 32, 34), np.uint8)
    blocks[..., :2] = np.array([0.5], np.float16).view(np.uint8)
    blocks[..., 2:] = (np.arange(blocks[..., 2:].size, dtype=np.uint32) % 256).reshape(blocks[..., 2:].shape)
    values = write_gguf(
        tmp_path / "m.gguf", matrices="Q8_0", data={"blk.0.ffn_down_exps.weight": blocks.reshape(*shape[:2], -1)}
    )
    assert values["blk.0.ffn_down_exps.weight"].min() == -64  # code -128, which our own quantizer does not use
    check_matrices(store_of(tmp_path / "m.gguf"), values)


@pytest.mark.parametrize(("fmt", "group"), [(Q4, 32), (Q4, 64), (Q8, 0), (WeightFormat.BF16, 32)])
def test_float_files_give_the_weights_of_a_hugging_face_directory(
    tmp_path: Path, fmt: WeightFormat, group: int
) -> None:
    write_gguf(tmp_path / "m.gguf", matrices="F32")
    ours = store_of(tmp_path / "m.gguf", format=fmt, group_size=group)
    run_convert(Checkpoint.open(MOE.write(tmp_path / "hf")), tmp_path / "theirs", format=fmt, group_size=group)
    theirs = Store.open(tmp_path / "theirs")
    for layer in range(2):
        for kind in ("head", "kv_head", "chunk"):
            for index in range(len(ours.unit_addresses(kind, layer))):
                assert np.array_equal(ours.unit(kind, layer, index), theirs.unit(kind, layer, index))


def test_other_groups_are_rounded_anew(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "m.gguf")
    store = store_of(tmp_path / "m.gguf", group_size=64)
    found = matrices_of(store, 0)["attn_q"]
    expected = values["blk.0.attn_q.weight"]
    assert not np.array_equal(found, expected)
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 8


def test_scales_that_are_not_finite_are_counted_and_refused(tmp_path: Path) -> None:
    raw = quantize(gguf_tensors(MOE)["blk.1.attn_k.weight"], GGMLQuantizationType.Q4_0)
    raw[5, :2] = np.array([np.nan], np.float16).view(np.uint8)
    values = write_gguf(tmp_path / "m.gguf", data={"blk.1.attn_k.weight": raw})
    with pytest.raises(StoreError, match=r"not finite|NaN"):
        store_of(tmp_path / "m.gguf")
    store = store_of(tmp_path / "m.gguf", allow_nonfinite=True, force=True)
    assert store.manifest.nonfinite == {"layers.1.k": 32}
    values["blk.1.attn_k.weight"][5, :32] = 0
    check_matrices(store, values)


def notes(source: Source, fmt: WeightFormat, group: int = 32) -> list[str]:
    return conversion_notes(source, ModelFormats.uniform(source.config, fmt, group))


def test_mixed_files_follow_the_majority_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    values = write_gguf(path, types={"output.weight": "Q8_0", "token_embd.weight": "F16"})
    source = open_source(path)
    assert default_format(source) == Q4
    lines = notes(source, Q4)
    assert lines[0].startswith("56 matrices of type Q4_0 (layers.0.q, layers.0.k, layers.0.v ...): integers and scales")
    assert lines[1:] == [
        "1 matrices of type Q8_0 (lm_head): rounded to q4; --quant q8 --group-size 32 keeps every value"
    ]
    assert all("kept bit for bit as q8" in line for line in notes(source, Q8))
    # No group crosses a head, so that o keeps groups of 32.
    wide = [(line.split()[0], "kept bit for bit" in line, "rounded to q4" in line) for line in notes(source, Q4, 64)]
    assert sorted(wide) == [("1", False, True), ("2", True, False), ("54", False, True)]
    assert all("kept exactly as f32" in line for line in notes(source, WeightFormat.F32, 64))
    check_matrices(store_of(path, format=Q8), values)


@pytest.mark.parametrize(("kind", "fmt"), [("Q4_1", Q4), ("IQ4_NL", Q4), ("Q4_K", Q4), ("Q5_K", Q8), ("Q6_K", Q8)])
def test_other_types_are_packed_as_their_values_would_be(tmp_path: Path, kind: str, fmt: WeightFormat) -> None:
    values = write_gguf(tmp_path / "m.gguf", WIDE, kind)
    source = open_source(tmp_path / "m.gguf")
    assert default_format(source) == fmt
    better = ", --quant q8 loses less" if fmt == Q4 else ""
    assert notes(source, fmt) == [
        f"14 matrices of type {kind} (layers.0.q, layers.0.k, layers.0.v ...): decoded exactly, then rounded to "
        f"{fmt.label}; --quant f32 keeps every value{better}"
    ]
    assert "every value kept exactly as f32" in notes(source, WeightFormat.F32)[0]
    check_matrices(store_of(tmp_path / "m.gguf", format=WeightFormat.F32), values)
    (tmp_path / "m.store").rename(tmp_path / "f32.store")
    ours = store_of(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", WIDE, "F32", data=values)
    theirs = store_of(tmp_path / "m.gguf", format=fmt, force=True)
    for kind_of_unit in ("head", "kv_head", "chunk", "vocabulary"):
        assert np.array_equal(ours.unit(kind_of_unit, 0, 1), theirs.unit(kind_of_unit, 0, 1))


def test_a_store_of_a_gguf_is_the_same_on_any_number_of_nodes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    stores = []
    for nodes in (1, 3):
        run_convert(open_source(tmp_path / "m.gguf"), tmp_path / f"s{nodes}", nodes=nodes, experts="sliced")
        stores.append(Store.open(tmp_path / f"s{nodes}", check="full"))
    for kind in ("head", "kv_head", "chunk"):
        for index in range(len(stores[0].unit_addresses(kind, 1))):
            assert np.array_equal(stores[0].unit(kind, 1, index), stores[1].unit(kind, 1, index))
    before = contents(tmp_path / "s1")
    assert run_convert(open_source(tmp_path / "m.gguf"), tmp_path / "s1", experts="sliced").written_files == ()
    assert contents(tmp_path / "s1") == before
