"""manifest.json: what is written is read back; anything else is refused with a StoreError."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError
from dist_moe.kernels import WeightFormat
from dist_moe.store.checksum import checksum_text
from dist_moe.store.manifest import Manifest, parse_manifest, read_manifest
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel
from helpers.tiny_store import run_convert


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = tmp_path_factory.mktemp("manifest")
    source = Checkpoint.open(TinyModel().write(directory / "model"))
    return run_convert(source, directory / "store", nodes=3, experts="sliced").manifest


def sealed(value: Any) -> str:
    """The text of a manifest with these contents and the checksum that belongs to them."""
    body = {key: item for key, item in value.items() if key != "checksum"}
    checksum = checksum_text((json.dumps(body, indent=1) + "\n").encode())
    return json.dumps({**body, "checksum": checksum}, indent=1) + "\n"


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in paths_in(item, (*path, key)))]


def test_a_manifest_is_read_back_as_it_was(manifest: Manifest) -> None:
    text = manifest.render()
    again = parse_manifest(text, "m")
    assert again.render() == text
    assert again.recipe() == manifest.recipe()
    for name in ("eps", "attention_factor", "inv_freq"):
        ours, theirs = getattr(manifest.config, name), getattr(again.config, name)
        assert ours.dtype == theirs.dtype == np.float32
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert (again.format, again.nodes, again.experts) == (WeightFormat.Q4, 3, "sliced")
    assert again.shards == manifest.shards
    assert again.files == manifest.files


def test_resealing_in_this_test_is_what_the_writer_does(manifest: Manifest) -> None:
    assert sealed(json.loads(manifest.render())) == manifest.render()


@pytest.mark.parametrize("version", [0, 5])
@pytest.mark.parametrize(("key", "newest"), [("format_version", 4), ("numerics_version", 1)])
def test_another_version_is_named_with_ours_and_what_to_do(
    manifest: Manifest, key: str, newest: int, version: int
) -> None:
    value = json.loads(manifest.render()) | {key: version, "a key of the future": 1}
    known, advice = (newest, "install a newer dist-moe") if version > newest else (1, "make the store again")
    with pytest.raises(StoreError, match=rf"version {version}, .* version {known}: {advice}"):
        parse_manifest(sealed(value), "m")


def test_every_flipped_bit_is_noticed(manifest: Manifest, tmp_path: Path) -> None:
    data = bytearray(manifest.render().encode())
    path = tmp_path / "manifest.json"
    for position in range(0, len(data), 23):
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(StoreError):
            read_manifest(path)
        data[position] ^= 1 << position % 8


@settings(database=None, max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_value_is_refused_or_means_the_same_kind_of_store(manifest: Manifest, data: st.DataObject) -> None:
    value = json.loads(manifest.render())
    path = data.draw(st.sampled_from([path for path in paths_in(value) if path and path[0] != "checksum"]))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.integers(-2, 9), max_size=3),
        st.just({}),
    )
    action = data.draw(st.sampled_from(["replace", "remove", "add", "nudge"]))
    if action == "remove":
        del parent[path[-1]]
    elif action == "add" and isinstance(parent, dict):
        parent["unknown"] = data.draw(values)
    elif action == "nudge" and type(parent[path[-1]]) is int:
        parent[path[-1]] += data.draw(st.sampled_from([-1, 1]))
    else:
        parent[path[-1]] = data.draw(values)
    try:
        parsed = parse_manifest(sealed(value), "m")
    except StoreError:
        return
    assert "unknown" not in parent or "nonfinite" in path  # whose keys are the names of tensors
    assert parsed.render() == sealed(value)


def test_a_changed_number_is_called_damage_and_a_reformatted_text_an_edit(manifest: Manifest) -> None:
    text = manifest.render()
    with pytest.raises(StoreError, match=r"its checksum is [0-9a-f]{16}, but its contents give"):
        parse_manifest(text.replace('"nodes": 3', '"nodes": 2'), "m")
    with pytest.raises(StoreError, match="its text is not as dist-moe writes it"):
        parse_manifest(json.dumps(json.loads(text)), "m")


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("group_size", to=64), "group size 64 does not fit"),
        (change("group_size", to=True), "'group_size' must be a whole number from 0 to 128, not True"),
        (change("weights", to="q5"), "'weights' must be one of f32, bf16, q8, q4, not 'q5'"),
        (change("router", to="q4"), "'router' must be one of f32, bf16"),
        (change("model", "heads", to=7), "'heads' must be a multiple of 'kv_heads'"),
        (change("model", "inv_freq", to=[1]), "'inv_freq' must have head_dim / 2 values"),
        (change("model", "eps", to=0x7FC00000), "'eps' must be finite"),
        (change("model", "dense_layers", to=[5]), "'dense_layers' must lie below 'layers'"),
        (change("model", "experts_per_token", to=9), "'experts_per_token' must lie between"),
        (change("shards", 0, "heads", to=[[0, 9]]), "'heads' must hold ascending ranges within 0..8"),
        (change("shards", 0, "heads", to=[[2, 3], [0, 1]]), "'heads' must hold ascending ranges"),
        (change("shards", 0, "chunks", 0, "stop_layer", to=3), "'stop_layer' must be a whole number from 1 to 2"),
        (change("shards", 0, "chunks", to=[]), "has chunks for 0 of 2 layers"),
        (change("nodes", to=2), "has 3 shards for 2 nodes"),
        (change("files", 0, "name", to="../escape"), "'name' must be a string of the form"),
        (change("files", 0, "checksum", to="xyz"), "'checksum' must be a string of the form"),
        (change("files", 1, "name", to="common.safetensors"), "names a file twice"),
        (change("extra", to=1), "has unknown keys: extra"),
        (change("source", to=[]), "source: is not a JSON object"),
    ],
)
def test_what_is_wrong_is_named(manifest: Manifest, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    value = copy.deepcopy(json.loads(manifest.render()))
    edit(value)
    with pytest.raises(StoreError) as caught:
        parse_manifest(sealed(value), "a/manifest.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("a/manifest.json: ")


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", "{}", "[" * 100_000, '{"format_version": 1e400}', "\ud800"])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(StoreError):
        parse_manifest(text, "m")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="not UTF-8"):
        Store.open(tmp_path)
