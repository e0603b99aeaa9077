"""inspect --against and --diff: figures by their definition, and what is not sound is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.inspect import inspect
from dist_moe.cli.main import execute
from dist_moe.errors import StoreError, UsageError
from dist_moe.kernels import Kernels, WeightFormat
from dist_moe.store.against import Errors, compare
from dist_moe.store.checksum import checksum_rows
from dist_moe.store.decoded import DecodedStore
from dist_moe.store.matrices import matrix_place
from dist_moe.store.reader import Store
from dist_moe.store.recipe_file import parse_recipe
from helpers.tiny_model import TinyModel
from helpers.tiny_store import placement_of, run_convert

MakeStore = Callable[..., Path]


def run_inspect(*arguments: object) -> Result:
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments])


def shown(*arguments: object) -> dict[str, Any]:
    done = run_inspect(*arguments, "--json")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def change_unit(
    directory: Path, offset: int, value: bytes, kind: str = "chunk", layer: int = 0, index: int = 3
) -> None:
    """Overwrite bytes of a unit and mend its checksum, as no reader would notice; files are opened as large ones."""
    store = Store.open(directory)
    sealed = store.sealed_unit(kind, layer, index)  # type: ignore[arg-type]
    data = bytearray(sealed.path.read_bytes())
    place, unit = bytes(data).index(sealed.data.tobytes()), sealed.data.copy()
    unit[offset : offset + len(value)] = np.frombuffer(value, np.uint8)
    data[place : place + len(unit)] = unit.tobytes()
    old, new = (checksum_rows([row]).tobytes() for row in (sealed.data, unit))
    assert bytes(data).count(old) == 1
    with sealed.path.open("r+b") as stream:
        stream.write(bytes(data).replace(old, new))


@pytest.fixture
def as_large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_moe.store.reader.FULL_CHECK_BYTES", 0)


@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("fmt", [WeightFormat.BF16, WeightFormat.Q8, WeightFormat.Q4])
def test_figures_are_those_of_the_definition(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore, fmt: WeightFormat, group: int
) -> None:
    directory = make_store(format=fmt, group_size=group, nodes=2)
    with Kernels(1) as kernels:
        decoded = DecodedStore(Store.open(directory), kernels)
        found = list(compare(decoded, checkpoint, lambda _: None))
        assert [tensor.name for tensor in found] == checkpoint.names()
        for tensor in found:
            ours, source = (read(tensor.name).astype(np.float64) for read in (decoded.whole, checkpoint.read))
            error, total = ours - source, tensor.errors
            assert (total.weights, total.nonfinite, total.padding, total.bad_scales) == (source.size, 0, 0, 0)
            assert (total.wrong_groups, total.empty_groups) == (0, 0)
            assert total.largest == np.abs(error).max()
            assert total.rms == pytest.approx(np.sqrt((error**2).mean()))
            assert total.relative == pytest.approx(np.linalg.norm(error) / np.linalg.norm(source))
            cosine = (ours * source).sum() / np.linalg.norm(ours) / np.linalg.norm(source)
            assert total.cosine == pytest.approx(cosine, abs=1e-12)
            is_matrix = tensor.kind in ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
            assert bool(total.largest) == is_matrix
            assert bool(total.scales) == (is_matrix and fmt.quantized)


def test_the_report_has_a_line_per_layer_and_kind_and_with_full_per_tensor(
    checkpoint: Checkpoint, make_store: MakeStore
) -> None:
    directory = make_store(nodes=2)
    report = shown(directory, "--against", checkpoint.path, "--full")
    assert report["same_source"]
    assert [(row["kind"], row["tensors"]) for row in report["layers"] if row["layer"] == 0] == [
        ("norms", 4), ("q", 1), ("biases", 4), ("k", 1), ("v", 1), ("o", 1), ("router", 1),
        ("gate", 5), ("up", 5), ("down", 5),
    ]  # fmt: skip
    assert {row["tensor"] for row in report["tensors"]} == {*load_file(checkpoint.path / "model.safetensors")}
    down = [row for row in report["tensors"] if row["tensor"].endswith("down_proj.weight")]
    (total,) = (row for row in report["kinds"] if row["kind"] == "down")
    assert total["max"] == max(row["max"] for row in down)
    squares = sum(row["rms"] ** 2 * row["weights"] for row in down)
    assert total["rms"] == pytest.approx((squares / sum(row["weights"] for row in down)) ** 0.5)
    text = run_inspect(directory, "--against", checkpoint.path).stdout
    assert "layer 1  down    q4, groups of 32" in text
    assert "all finite, each in its group, nothing beside the matrices" in text
    assert (
        "model.layers.1.mlp.down_proj.weight" in run_inspect(directory, "--against", checkpoint.path, "--full").stdout
    )


def test_another_version_of_the_model_is_noted(tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore) -> None:
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors["lm_head.weight"][7, 7] += 9
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    report = shown(make_store(format=WeightFormat.F32), "--against", other, "--full")
    assert not report["same_source"]
    changed = [(row["tensor"], row["max"]) for row in report["tensors"] if row["max"]]
    assert changed == [("lm_head.weight", pytest.approx(9, rel=1e-5))]


def test_another_model_is_refused(tmp_path: Path, make_store: MakeStore) -> None:
    TinyModel().write(tmp_path / "other")
    with pytest.raises(UsageError, match="is another model than the store's odd: embedding is of shape"):
        execute(["inspect", str(make_store()), "--against", str(tmp_path / "other")])


@pytest.mark.usefixtures("as_large_files")
@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (0, np.float16(np.nan).tobytes(), "1 scales that are NaN or infinite"),
        (0, np.float16(40).tobytes(), "1 groups farther from the source than zeros would be"),
    ],
)
def test_scales_that_make_no_sense_are_found(
    checkpoint: Checkpoint, make_store: MakeStore, offset: int, value: bytes, problem: str
) -> None:
    directory = make_store()
    change_unit(directory, offset, value)
    done = run_inspect(directory, "--against", checkpoint.path)
    assert isinstance(done.exception, StoreError)
    assert problem in str(done.exception)
    assert "first in model.layers.0.mlp.experts.1.gate_proj.weight" in str(done.exception)
    assert problem in done.stdout


@pytest.mark.usefixtures("as_large_files")
def test_padding_that_is_not_zero_is_found(checkpoint: Checkpoint, make_store: MakeStore) -> None:
    directory = make_store(format=WeightFormat.F32)
    unit = Store.open(directory).unit("vocabulary", 0, 2)  # rows 256 to 383 of 300
    change_unit(directory, len(unit) - 4, np.float32(1).tobytes(), "vocabulary", 0, 2)
    done = run_inspect(directory, "--against", checkpoint.path)
    assert "1 values beside their matrix that are not 0 (first in lm_head.weight)" in str(done.exception)


def test_weights_that_are_not_finite_are_left_out(tmp_path: Path, checkpoint: Checkpoint) -> None:
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors["lm_head.weight"][7, :3] = (np.nan, np.inf, -np.inf)
    save_file(tensors, checkpoint.path / "model.safetensors")
    poisoned = Checkpoint.open(checkpoint.path)
    run_convert(poisoned, tmp_path / "store", allow_nonfinite=True, format=WeightFormat.F32)
    report = shown(tmp_path / "store", "--against", checkpoint.path, "--full")
    (row,) = (row for row in report["tensors"] if row["tensor"] == "lm_head.weight")
    assert (row["nonfinite"], row["max"], row["cosine"]) == (3, 0, 1)


def test_sums_of_nothing_are_figures() -> None:
    assert (Errors().rms, Errors().relative, Errors().cosine) == (0, 0, 1)
    lost = Errors(weights=2, error_squares=2.0, store_squares=2.0)
    assert (lost.relative, lost.cosine) == (float("inf"), 0)


# ---- --diff ----


def test_stores_of_one_recipe_are_equal_however_they_are_cut(checkpoint: Checkpoint, make_store: MakeStore) -> None:
    stores = [make_store("a"), make_store("b", nodes=4, experts="sliced")]
    stores.append(make_store("c", placement=placement_of(checkpoint)))
    for other in stores:
        done = run_inspect("--diff", stores[0], other)
        assert done.exit_code == 0, done.exception
        assert done.stdout.splitlines()[-1] == "equal: every unit, tensor and file"
    report = shown("--diff", stores[0], stores[1])
    assert report["equal"]
    assert report["cut"] == {"nodes": [1, 4], "experts": ["whole", "sliced"]}


@pytest.mark.usefixtures("as_large_files")
def test_a_unit_that_differs_is_named(make_store: MakeStore) -> None:
    stores = [make_store("a"), make_store("b", nodes=3)]
    change_unit(stores[1], 100, b"\x01\x02", "kv_head", 2, 1)
    done = run_inspect("--diff", *stores)
    assert isinstance(done.exception, StoreError)
    assert done.exception.exit_code == 2
    assert "differ in 1 units" in str(done.exception)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["  layer 2  kv_head: 1 of 3 differ", "    layer 2, KV head 1"]
    differing = [kind for kind in shown("--diff", *stores)["kinds"] if kind["differing"]]
    assert differing == [{"kind": "kv_head", "layer": 2, "total": 3, "absent": 0, "differing": ["layer 2, KV head 1"]}]


def test_other_formats_differ_in_all_matrices_and_in_nothing_else(make_store: MakeStore) -> None:
    done = run_inspect("--diff", make_store("a"), make_store("b", format=WeightFormat.Q8), "--json")
    report = json.loads(done.stdout)
    assert report["made_with"] == {"weights": ["q4", "q8"]}
    assert report["formats"]["differing"] == report["formats"]["matrices"] > 0
    counts = {kind["kind"]: (len(kind["differing"]), kind["total"]) for kind in report["kinds"]}
    assert counts["common"][0] == counts["file"][0] == 0
    assert all(differing == total for kind, (differing, total) in counts.items() if kind not in ("common", "file"))


def test_formats_that_differ_are_counted_and_the_first_are_named(checkpoint: Checkpoint, make_store: MakeStore) -> None:
    rules = ('[[rule]]\nexperts = "0-1"\nformat = "q8"\n', '[[rule]]\nkind = ["v", "down"]\nformat = "bf16"\n')
    recipes = [parse_recipe('format = "q4"\n' + rule, "test") for rule in rules]
    stores = [make_store(n, formats=r.formats(checkpoint.config)) for n, r in zip("ab", recipes, strict=True)]
    done = run_inspect("--diff", *stores)
    lines = done.stdout.splitlines()
    names = [name for name in checkpoint.names() if matrix_place(checkpoint.config, 32, name)]
    in_q8 = [name for name in names if ".experts." in name and int(name.split(".")[3]) < 2]
    expected = [name for name in names if name in in_q8 or name.endswith((".v", ".down"))]
    assert lines[1] == f"  made with: other formats of {len(expected)} of {len(names)} matrices"
    assert lines[2:4] == ["    layers.0.v: q4g32 and bf16", "    layers.0.experts.0.gate: q8g32 and q4g32"]
    assert [line.split(":")[0].strip() for line in lines[2:12]] == expected[:10]
    assert lines[12] == f"    and {len(expected) - 10} more"
    report = shown("--diff", *stores)["formats"]
    assert (report["matrices"], report["differing"], len(report["named"])) == (len(names), len(expected), 10)
    assert report["named"][1] == {"matrix": "layers.0.experts.0.gate", "first": "q8g32", "second": "q4g32"}
    report = shown("--diff", *stores, "--full")["formats"]
    assert [matrix["matrix"] for matrix in report["named"]] == expected


def test_o_that_is_packed_alike_is_not_called_different(checkpoint: Checkpoint, make_store: MakeStore) -> None:
    """A head's columns of o have groups of their own, of 32 at most where a head has 32."""
    assert checkpoint.config.head_dim == 32
    rule = '[[rule]]\nkind = "lm_head"\nformat = "q8"\n'
    asked = [parse_recipe(f'format = "q4"\ngroup = {group}\n{rule}', "test") for group in (0, 32)]
    formats = [recipe.formats(checkpoint.config) for recipe in asked]
    stores = [make_store(n, formats=f, group_size=g) for n, f, g in zip("ab", formats, (0, 32), strict=True)]
    named = shown("--diff", *stores, "--full")["formats"]["named"]
    assert named
    assert not [matrix for matrix in named if matrix["matrix"].endswith(".o")]


def test_units_of_shards_that_are_elsewhere_are_counted(make_store: MakeStore) -> None:
    stores = [make_store("a"), make_store("b", nodes=3)]
    (stores[1] / "shard-00002-of-00003.safetensors").unlink()
    done = run_inspect("--diff", *stores)
    assert done.exit_code == 0
    assert "  layer 0  head: 0 of 6 differ, 2 not on this machine" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "equal: every unit, tensor and file that is here"
    assert shown("--diff", *stores)["absent"] > 0


def test_small_files_and_common_tensors_are_compared(tmp_path: Path, checkpoint: Checkpoint) -> None:
    run_convert(checkpoint, tmp_path / "a")
    (checkpoint.path / "generation_config.json").write_text("{}")
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] += 1
    save_file(tensors, checkpoint.path / "model.safetensors")
    run_convert(Checkpoint.open(checkpoint.path), tmp_path / "b")
    kinds = {kind["kind"]: kind["differing"] for kind in shown("--diff", tmp_path / "a", tmp_path / "b")["kinds"]}
    assert (kinds["common"], kinds["file"]) == (["layers.1.attention_norm"], ["generation_config.json"])


def test_stores_of_other_models_are_not_compared(tmp_path: Path, make_store: MakeStore) -> None:
    run_convert(Checkpoint.open(TinyModel().write(tmp_path / "hf")), tmp_path / "other")
    with pytest.raises(UsageError, match="is a store of another model"):
        execute(["inspect", "--diff", str(make_store()), str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify", "--diff", "store"], "ask one at a time"),
        (["--against", "odd", "--diff", "store"], "ask one at a time"),
        (["--full"], "--full: belongs to --against or --diff"),
    ],
)
def test_one_question_at_a_time(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store("store")
    with pytest.raises(UsageError, match=message):
        execute(["inspect", "store", *words])
