"""Exported tensors are the source's, or what the packed bytes stand for, under the names of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.cli.export import export
from dist_moe.cli.main import execute
from dist_moe.errors import StoreError, UsageError
from dist_moe.kernels import WeightFormat, packed_bytes, reference
from dist_moe.store.export import to_bf16
from dist_moe.store.reader import Store
from dist_moe.store.units import UnitKind, output_group
from helpers.tiny_model import TinyModel
from helpers.tiny_store import run_convert

MakeStore = Callable[..., Path]
Floats = npt.NDArray[np.float64]


def run_export(*arguments: object) -> Result:
    return CliRunner().invoke(export, [str(argument) for argument in arguments])


def exported(tmp_path: Path, *arguments: object) -> dict[str, npt.NDArray[np.float32]]:
    done = run_export(*arguments, "-o", tmp_path / "out.safetensors")
    assert done.exit_code == 0, done.exception
    tensors: dict[str, npt.NDArray[np.float32]] = load_file(tmp_path / "out.safetensors")
    file = SafetensorsFile(tmp_path / "out.safetensors")
    assert [name for name in file.header.decode().split('"') if name in tensors] == done.stdout.splitlines()
    assert (b"__padding" in file.header, file.metadata["format"]) == (False, "pt")
    return tensors


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_store_in_f32_gives_the_source_back(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore, nodes: int
) -> None:
    tensors = exported(tmp_path, make_store(format=WeightFormat.F32, nodes=nodes, experts="sliced"), "--all")
    expected = load_file(checkpoint.path / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(tensors[name], values), name


def test_a_store_in_bf16_gives_what_bf16_keeps_of_the_source(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore
) -> None:
    store = make_store(format=WeightFormat.BF16)
    tensors = exported(tmp_path, store, "--part", "attn", "--part", "mlp", "--lm-head")
    source = load_file(checkpoint.path / "model.safetensors")
    for name, values in tensors.items():
        exact = reference.bf16_to_f32(reference.f32_to_bf16(source[name])) if values.ndim == 2 else source[name]
        assert np.array_equal(values, exact), name
    assert run_export(store, "--all", "--dtype", "bf16", "-o", tmp_path / "b.safetensors").exit_code == 0
    file = SafetensorsFile(tmp_path / "b.safetensors")
    for name, values in source.items():
        assert file.dtype(name) == "BF16"
        assert np.array_equal(file.raw(name), reference.f32_to_bf16(values)), name


@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("fmt", [WeightFormat.Q8, WeightFormat.Q4])
def test_quantized_tensors_are_scale_times_integer(
    tmp_path: Path, make_store: MakeStore, fmt: WeightFormat, group: int
) -> None:
    directory = make_store(format=fmt, group_size=group, nodes=2)
    tensors = exported(tmp_path, directory, "--all")
    store = Store.open(directory)
    config, dim, head_dim = store.config, store.config.model_dim, store.config.head_dim

    def part(kind: UnitKind, layer: int, index: int, offset: int, shape: tuple[int, int], own: int = group) -> Floats:
        packed = store.unit(kind, layer, index)[offset : offset + packed_bytes(fmt, *shape, own)]
        return reference.unpack_matrix(packed, *shape, fmt, own)

    row_bytes = packed_bytes(fmt, head_dim, dim, group)
    for layer in range(config.layers):
        name, o_group = f"model.layers.{layer}.", output_group(config, group)
        heads, kv_heads = range(config.heads), range(config.kv_heads)
        expected = {
            "self_attn.q_proj": np.vstack([part("head", layer, h, 0, (head_dim, dim)) for h in heads]),
            "self_attn.o_proj": np.hstack([part("head", layer, h, row_bytes, (dim, head_dim), o_group) for h in heads]),
            "self_attn.k_proj": np.vstack([part("kv_head", layer, h, 0, (head_dim, dim)) for h in kv_heads]),
            "self_attn.v_proj": np.vstack([part("kv_head", layer, h, row_bytes, (head_dim, dim)) for h in kv_heads]),
        }
        width, per_expert = store.manifest.layer_chunk_width(layer), store.manifest.layer_chunks_per_expert(layer)
        hidden, up = config.layer_hidden(layer), packed_bytes(fmt, width, dim, group)
        for expert in range(config.layer_experts(layer)):
            chunks = range(expert * per_expert, (expert + 1) * per_expert)
            prefix = "mlp." if config.is_dense(layer) else f"mlp.experts.{expert}."
            for key, at in (("gate", 0), ("up", up)):
                rows = np.vstack([part("chunk", layer, chunk, at, (width, dim)) for chunk in chunks])
                expected[f"{prefix}{key}_proj"] = rows[:hidden]
            columns = np.hstack([part("chunk", layer, chunk, 2 * up, (dim, width)) for chunk in chunks])
            expected[f"{prefix}down_proj"] = columns[:, :hidden]
        for key, values in expected.items():
            assert np.array_equal(tensors[f"{name}{key}.weight"], values), key
    blocks = np.vstack([part("vocabulary", 0, block, 0, (128, dim)) for block in range(3)])
    assert np.array_equal(tensors["lm_head.weight"], blocks[: config.vocabulary])


def test_what_is_chosen_is_written_and_nothing_else(tmp_path: Path, make_store: MakeStore) -> None:
    store = make_store()
    norms = {f"model.layers.0.{name}layernorm.weight" for name in ("input_", "post_attention_")}
    norms |= {f"model.layers.0.self_attn.{name}_norm.weight" for name in "qk"}
    assert {*exported(tmp_path, store, "--layer", 0, "--part", "norms")} == norms
    chosen = exported(tmp_path, store, "--layer", "0,1", "--part", "mlp", "--experts", "0,3-4")
    keys = ("gate", "up", "down")
    assert {*chosen} == {f"model.layers.0.mlp.experts.{e}.{k}_proj.weight" for e in (0, 3, 4) for k in keys} | {
        f"model.layers.1.mlp.{k}_proj.weight" for k in keys
    }
    assert {*exported(tmp_path, store, "--layer", "2", "--part", "router")} == {"model.layers.2.mlp.gate.weight"}
    assert {*exported(tmp_path, store, "--embeds", "--lm_head")} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "model.norm.weight" in exported(tmp_path, store, "--part", "norms")
    assert len(exported(tmp_path, store, "--layer", "1", "--part", "attn")) == 8  # the odd model has biases
    assert len(exported(tmp_path, store, "--layer", "1")) == 8 + 4 + 3


def test_npy_files(tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore) -> None:
    store = make_store(format=WeightFormat.F32)
    source = load_file(checkpoint.path / "model.safetensors")
    done = run_export(store, "--layer", 0, "--part", "attn", "--part", "norms", "-o", tmp_path / "a" / "b")
    assert done.exit_code == 0, done.exception
    names = done.stdout.splitlines()
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {f"{name}.npy" for name in names}
    for name in names:
        assert np.array_equal(np.load(tmp_path / "a" / "b" / f"{name}.npy"), source[name])
    assert run_export(store, "--lm-head", "-o", tmp_path / "head.npy").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "head.npy"), source["lm_head.weight"])


def test_a_tied_output_matrix_is_exported_as_the_store_has_it(tmp_path: Path) -> None:
    source = Checkpoint.open(TinyModel(tied=True).write(tmp_path / "tied"))
    run_convert(source, tmp_path / "store", format=WeightFormat.F32)
    tensors = exported(tmp_path, tmp_path / "store", "--embedding", "--lm-head")
    assert np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_only_the_shards_with_the_chosen_tensors_are_needed(tmp_path: Path, make_store: MakeStore) -> None:
    store = make_store(nodes=5)
    (store / "shard-00005-of-00005.safetensors").unlink()
    (store / "config.json").unlink()
    assert exported(tmp_path, store, "--layer", 0, "--part", "mlp", "--experts", "0-3")
    (tmp_path / "out.safetensors").unlink()
    done = run_export(store, "--layer", 0, "--part", "mlp", "-o", tmp_path / "out.safetensors")
    assert isinstance(done.exception, StoreError)
    assert "shard-00005-of-00005.safetensors is missing: it holds layer 0, expert 4" in str(done.exception)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_damaged_unit_leaves_no_file(tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_store()
    unit = Store.open(directory).unit("kv_head", 2, 1).tobytes()
    shard = directory / "shard-00001-of-00001.safetensors"
    place = shard.read_bytes().index(unit)
    with shard.open("r+b") as stream:
        stream.seek(place + 9)
        stream.write(bytes([unit[9] ^ 1]))
    monkeypatch.setattr("dist_moe.store.reader.FULL_CHECK_BYTES", 0)  # as large files are opened
    done = run_export(directory, "--layer", 2, "--part", "attn", "-o", tmp_path / "out.safetensors")
    assert isinstance(done.exception, StoreError)
    assert "tensor 'layers.2.kv_heads', layer 2, KV head 1 is damaged" in str(done.exception)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "3", "-o", "x.safetensors"], r"--layer 3: this model has no layer 3; give 0 to 2"),
        (["--part", "mlp", "--experts", "5", "-o", "x.safetensors"], r"no expert 5; give 0 to 4, or all"),
        (["-o", "x.safetensors"], "this selects no tensor"),
        (["--all", "--layer", "0", "-o", "x.safetensors"], "--all is the whole model"),
        (["--part", "attn", "--experts", "1", "-o", "x.safetensors"], "experts belong to --part mlp"),
        (["--layer", "0", "-o", "x.npy"], "a .npy file holds one tensor, but"),
        (["--lm-head", "--dtype", "bf16", "-o", "x"], "have no such type"),
        (["--lm-head", "-o", "nowhere/x.safetensors"], "cannot be written"),
        (["--layer", "first", "-o", "x"], "--layer: expected numbers like 0,5 or 0-3, or the word all, found 'first'"),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store("store")
    with pytest.raises(UsageError, match=message):
        execute(["export", "store", *words])
    assert not list(tmp_path.glob("x*"))


def test_rounding_to_bf16_keeps_what_is_not_finite() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 0.0, -0.0], np.float32)
    widened = reference.bf16_to_f32(to_bf16(values))
    assert np.isnan(widened[2])
    assert np.array_equal(np.delete(widened, 2), np.array([np.inf, -np.inf, 1, 1 + 2**-6, np.inf, 0, 0], np.float32))
    assert np.signbit(widened[-1])
